"""Sizes and times of checkpoints, and damaged ones."""
