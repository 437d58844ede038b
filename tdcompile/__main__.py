"""``python -m tdcompile``: the command, where its script is not on the path."""

import sys

from tdcompile.cli.main import main

sys.exit(main())
