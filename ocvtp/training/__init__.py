"""Training an OC-pruner: the Lightning module, its data, its settings, and what is drawn on the way."""
