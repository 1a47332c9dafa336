"""The adapters, one file a model family."""
