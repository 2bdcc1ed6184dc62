"""Runs `command.py` as `python -m benchmarks.study`."""

import sys

from benchmarks.study.command import main

sys.exit(main())
