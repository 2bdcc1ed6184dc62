"""The converted network: how it is made, what it knows of itself, what it costs."""
