"""The network of the pruner `surprise`: what a token's surroundings do not foretell."""
