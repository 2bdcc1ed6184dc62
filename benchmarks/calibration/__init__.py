"""What calibration and reconstruction are worth, without training."""
