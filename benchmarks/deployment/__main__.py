"""Runs `command.py` as `python -m benchmarks.deployment`."""

from benchmarks.deployment.command import main

main()
