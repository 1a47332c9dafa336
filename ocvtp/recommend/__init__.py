"""From a model and a task to one pruner at one budget: accuracy and time of many, side by side."""
