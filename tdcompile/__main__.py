"""``python -m tdcompile``: the command, where its script is not on the path."""

from tdcompile.cli import main

main()
