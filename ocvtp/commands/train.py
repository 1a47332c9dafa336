"""`ocvtp train`: LightningCLI parses its settings, see `ocvtp.training.run`."""

from __future__ import annotations

from collections.abc import Sequence

from ocvtp.commands import output
from ocvtp.shipped import with_configs
from ocvtp.training.run import train


def run_words(words: Sequence[str]) -> int:
    """Train and say where the checkpoints are."""
    result = train(with_configs(words, "train"))
    text = (
        f"best checkpoint: {result.best}\nlast checkpoint: {result.last}\n"
        f"export it with:  ocvtp export --checkpoint {result.best} --output DIR"
    )
    output.emit({}, text, as_json=False)
    return 0
