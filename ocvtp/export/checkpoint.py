"""Training checkpoint -> artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ocvtp.slots.artifact import explained
from ocvtp.slots.network import OCPruner, OCPrunerConfig

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


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file of torch.save that holds tensors and plain values; runs no code of it.

    Raises:
        ValueError: if it is missing, damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; pass the path of a file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes it raise
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is never loaded"
            f" ({' '.join(str(error).split())[:160]})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; pass a dictionary of tensors.")
    return content
