"""Integer networks: a converted network at one configuration, for the runtimes of chips.

It is lowered once (`lowering.py`) to a graph of operators that says what is an integer, changed by
passes into what chips compute (`integers.py`), and written by one file for each target
(`targets.py`).
"""
