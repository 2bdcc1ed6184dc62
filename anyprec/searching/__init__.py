"""Search of a precision for every layer: budgets, and algorithms on plain numbers.

Nothing in this folder's algorithms knows torch: they see a budget, a table of costs and a callable that
gives the loss of a configuration.
"""
