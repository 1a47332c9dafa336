"""Pruners in inference servers."""
