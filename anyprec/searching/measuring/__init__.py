"""What a configuration is worth: forward passes on a fixed set of batches."""
