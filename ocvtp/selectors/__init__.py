"""What learns to choose tokens for a frozen language model: scorers, and how they are trained."""
