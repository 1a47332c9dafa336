"""The scorers of this package, each in the file of its name; see `ocvtp.selectors.scorer`."""
