"""Training an OC-pruner: the Lightning module, its settings, and what is drawn on the way."""
