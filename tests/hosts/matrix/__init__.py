"""One test surface for all hosts: families of tiny models, and what generate() and forward() do."""
