"""Search algorithms compared at equal evaluations, and the work that they save."""
