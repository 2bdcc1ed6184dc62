"""Data passes without gradients: step sizes and norm statistics."""
