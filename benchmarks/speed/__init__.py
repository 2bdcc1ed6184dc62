"""Time of a training step and of conversion."""
