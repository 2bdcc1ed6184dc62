"""Runs `command.py` as `python -m benchmarks.search`."""

import sys

from benchmarks.search.command import main

sys.exit(main())
