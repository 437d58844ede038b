"""``python -m tdcompile``: the command, where its script is not on the path."""

import sys

from tdcompile.cli import main

sys.exit(main())
