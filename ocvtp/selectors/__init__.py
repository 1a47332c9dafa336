"""Scorers that learn which visual tokens to keep, and what trains them."""
