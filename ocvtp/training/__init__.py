"""TODO ocvtp/training/__init__.py"""
