"""The command line of mmdefense; :mod:`mmdefense.cli.app` is its entrance."""
