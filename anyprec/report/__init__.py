"""What people look at: tables (rich) and plots (matplotlib) of measured results."""
