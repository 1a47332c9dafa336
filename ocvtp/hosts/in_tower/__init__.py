"""Pruners before and inside a vision tower, and what of it need not run."""
