"""``python -m dolium.cli``."""

import sys

from dolium.cli.main import entry

sys.exit(entry())
