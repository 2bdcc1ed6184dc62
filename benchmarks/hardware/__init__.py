"""The table of hardware as a page of the documentation."""
