"""``python -m viralfx``: the command line."""

import sys

from viralfx.cli import main

sys.exit(main())
