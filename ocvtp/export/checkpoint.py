"""Training checkpoint -> artifact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from ocvtp.learning import artifact
from ocvtp.learning.artifact import explained
from ocvtp.learning.network import PrunerNetwork
from ocvtp.pruners import trainable
from ocvtp.pruners.catalog import entry
from ocvtp.slots.tensor_file import load_tensors

_PREFIX = "network."
NetworkT = TypeVar("NetworkT", bound=PrunerNetwork)


def export_checkpoint(
    checkpoint: str | Path, output: str | Path, with_decoder: bool = False
) -> PrunerNetwork:
    """Write `model.safetensors` and `config.json` of a training checkpoint.

    Args:
        checkpoint: `best.ckpt` or `last.ckpt` of `ocvtp train`.
        output: folder to write; made if it is not there.
        with_decoder: keep what only training needs, e.g. the decoder of an OC-pruner.

    Returns:
        the network that was written, in evaluation mode.

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
        kept = content["ocvtp"]
        kind: type[PrunerNetwork] = trainable.of_format(kept.get("format")).network_class
        config = kind.read_config({**kept["config"], "training": kept["training"]})
        weights = content["state_dict"].items()
        own = {k.removeprefix(_PREFIX): v for k, v in weights if k.startswith(_PREFIX)}
        network = artifact.restore(partial(kind, config), artifact.Weights.of_tensors(own))
    return save(network, output, with_decoder)


def save(network: NetworkT, output: str | Path, with_decoder: bool) -> NetworkT:
    """Write the artifact, by default without what only trains; returns what was written."""
    network = network.eval() if with_decoder else network.eval().for_inference()
    about = entry(trainable.of_network(network).name)
    said = {"pruner": about.name, "title": about.title, "paper": about.paper}
    network.save_pretrained(output, model_card_kwargs=said)
    return network
