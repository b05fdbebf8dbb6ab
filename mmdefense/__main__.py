"""``python -m mmdefense`` is ``mmdefense``."""

from mmdefense.cli import main

main()
