"""``python -m mmdefense`` is ``mmdefense``."""

from mmdefense.cli.app import main

main()
