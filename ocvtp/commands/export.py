"""`ocvtp export`: a checkpoint or the official weights to an artifact."""

from __future__ import annotations

import argparse

from ocvtp.commands import output
from ocvtp.export import export_checkpoint, export_official, export_official_selector
from ocvtp.learning import PrunerNetwork


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    if (arguments.model is None) != (arguments.official_selector is None):
        raise ValueError(
            "--official-selector and --model go together: the weights, and the model that they were"
            " trained in; pass both, or neither."
        )
    output.folder(arguments.output)
    network: PrunerNetwork
    if arguments.official:
        network = export_official(
            arguments.official,
            arguments.output,
            arguments.with_decoder,
            arguments.num_heads,
            arguments.tower,
            arguments.layer,
        )
    elif arguments.official_selector:
        network = export_official_selector(
            arguments.official_selector, arguments.output, arguments.model
        )
    else:
        network = export_checkpoint(arguments.checkpoint, arguments.output, arguments.with_decoder)
    facts = {
        "output": arguments.output,
        "parameters": sum(p.numel() for p in network.parameters()),
        "tower": network.config.tower,
        "layer": network.config.layer,
    }
    text = "wrote {output}: {parameters:,} parameters, {reads}"
    output.emit(facts, text.format(**facts, reads=network.describe()), arguments.json)
    return 0
