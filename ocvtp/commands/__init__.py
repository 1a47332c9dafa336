"""One file per command of `ocvtp`: its flags (`add_arguments`) and what it does (`run`)."""
