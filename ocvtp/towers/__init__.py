"""Looking inside a vision tower: hooks, what they record, rows and windows of its tokens."""
