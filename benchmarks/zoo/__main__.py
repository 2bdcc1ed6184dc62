"""Runs `command.py` as `python -m benchmarks.zoo`."""

from benchmarks.zoo.command import main

main()
