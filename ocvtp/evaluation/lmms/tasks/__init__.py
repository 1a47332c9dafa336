"""Tasks of lmms-eval on our files."""
