"""What a configuration may cost, and what it costs."""
