"""One file per command of `ocvtp`, which says what it does (`run`); all flags are in `flags`."""
