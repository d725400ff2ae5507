"""What calibration tells of every matrix: second moments of inputs and of gradients."""
