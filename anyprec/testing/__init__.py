"""What a converted network must keep, as checks for your own tests.

`assert_promises` converts a float network of yours, tries every promise that anyprec makes, and
raises an error that lists the broken ones. `check_promises` returns a `Report` instead.
`check_structure` looks at the structure alone: it needs no values, so the network may be on the
meta device.
"""

from anyprec.testing.promises import assert_promises, check_promises
from anyprec.testing.report import BrokenPromiseError, Report
from anyprec.testing.structure import check_structure

__all__ = [
    "BrokenPromiseError",
    "Report",
    "assert_promises",
    "check_promises",
    "check_structure",
]
