"""Time and memory of pruned models: stages of a request, side by side with the bare model."""
