"""`ocvtp export`: a checkpoint or the official weights to an artifact."""

from __future__ import annotations

import argparse

from ocvtp.commands import output
from ocvtp.export import export_checkpoint, export_official


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="best.ckpt or last.ckpt of `ocvtp train`")
    source.add_argument("--official", metavar="WEIGHTS", help="the authors' weights.pth")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--with-decoder", action="store_true", help="keep the training decoder")
    parser.add_argument("--num-heads", type=int, default=4, help="of an official decoder")
    parser.add_argument("--tower", help="hub id of the vision tower of official weights")
    parser.add_argument("--layer", type=int, default=9, help="that official weights read")
    output.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was written."""
    output.folder(arguments.output)
    if arguments.official:
        network = export_official(
            arguments.official,
            arguments.output,
            arguments.with_decoder,
            arguments.num_heads,
            arguments.tower,
            arguments.layer,
        )
    else:
        network = export_checkpoint(arguments.checkpoint, arguments.output, arguments.with_decoder)
    facts = {
        "output": arguments.output,
        "parameters": sum(p.numel() for p in network.parameters()),
        "tower": network.config.tower,
        "layer": network.config.layer,
    }
    text = "wrote {output}: {parameters:,} parameters, hidden_states[{layer}] of {tower}"
    output.emit(facts, text.format(**facts), arguments.json)
    return 0
