"""Search algorithms on plain numbers: they know no torch.

`Question` and `run_search` are their face; the modules behind it are the algorithms.
"""

from anyprec.searching.algorithms.constraints import make_space
from anyprec.searching.algorithms.question import Answer, Question, run_search
from anyprec.searching.algorithms.registry import ALGORITHMS, Settings

__all__ = ["ALGORITHMS", "Answer", "Question", "Settings", "make_space", "run_search"]
