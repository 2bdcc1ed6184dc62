"""Search of a precision for every layer: budgets, and algorithms on plain numbers.

The algorithms know no torch: they see a budget, a table of costs and a callable that gives the loss
of a configuration.
"""
