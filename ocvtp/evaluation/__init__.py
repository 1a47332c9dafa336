"""Accuracy, and what is kept, of pruned models: tasks, runs, intervals, reports."""
