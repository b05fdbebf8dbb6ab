"""The command line of mmdefense; its entry point is :mod:`mmdefense.cli.app`."""
