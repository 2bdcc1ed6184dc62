"""What a configuration may cost: limits, and how a user writes them."""

from anyprec.searching.budget.budgets import Budget
from anyprec.searching.budget.reading import BudgetLike, parse_budget, parse_budgets

__all__ = ["Budget", "BudgetLike", "parse_budget", "parse_budgets"]
