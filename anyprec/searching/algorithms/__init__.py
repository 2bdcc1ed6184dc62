"""Search algorithms on plain numbers: they know no torch."""
