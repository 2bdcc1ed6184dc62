"""What a network gets from images without labels: step sizes, norm statistics, better weights."""
