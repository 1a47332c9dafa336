"""Training checkpoint -> artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ocvtp.slots.artifact import explained
from ocvtp.slots.config import OCPrunerConfig
from ocvtp.slots.network import OCPruner
from ocvtp.slots.tensor_file import load_tensors

_PREFIX = "network."


def export_checkpoint(
    checkpoint: str | Path, output: str | Path, with_decoder: bool = False
) -> OCPruner:
    """Write `model.safetensors` and `config.json` of a training checkpoint.

    Args:
        checkpoint: `best.ckpt` or `last.ckpt` of `ocvtp train`.
        output: folder to write; made if it is not there.
        with_decoder: keep the decoder, which only training and reconstruction need.

    Raises:
        ValueError: if the file is not such a checkpoint. Nothing is written then.
    """
    content = load_tensors(checkpoint)
    with explained(f"{checkpoint} is not a checkpoint of `ocvtp train`"):
        if not isinstance(content.get("ocvtp"), Mapping) or "state_dict" not in content:
            raise ValueError(
                "it lacks the entry 'ocvtp'; pass best.ckpt or last.ckpt of a training run, or use"
                " --official for the authors' weights."
            )
        config = OCPrunerConfig.from_dict(dict(content["ocvtp"]["config"]))
        network = OCPruner(replace(config, training=dict(content["ocvtp"]["training"])))
        weights = content["state_dict"].items()
        network.load_state_dict(
            {k.removeprefix(_PREFIX): v for k, v in weights if k.startswith(_PREFIX)}
        )
    return save(network, output, with_decoder)


def save(network: OCPruner, output: str | Path, with_decoder: bool) -> OCPruner:
    """Write the artifact, by default without the decoder; returns what was written."""
    network = network.eval() if with_decoder else network.eval().without_decoder()
    network.save_pretrained(output)
    return network
