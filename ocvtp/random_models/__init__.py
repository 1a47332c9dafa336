"""Models with random weights: tiny ones of every family, and ones of full size."""
