"""The authors' released weights -> artifact.

`weights.pth` of https://arxiv.org/abs/2511.20439 is a plain state dict. Every size but the heads of
the decoder follows from the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ocvtp.export.checkpoint import save
from ocvtp.learning import artifact
from ocvtp.learning.artifact import explained
from ocvtp.slots.config import OCPrunerConfig
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.slots.network import OCPruner
from ocvtp.slots.queries import noise_table
from ocvtp.slots.tensor_file import load_tensors

# official prefix -> ours; the first that fits counts
_NAMES = (
    ("encode_project.mlp.0.", "encode.0."),
    ("encode_project.mlp.1.", "encode.1."),
    ("encode_project.mlp.4.", "encode.3."),
    ("initializ.", "queries."),
    ("aggregat.norm_in.", "attention.norm_inputs."),
    ("aggregat.norm_slots_0.", "attention.norm_slots."),
    ("aggregat.norm_slots_1.", "attention.norm_ffn."),
    ("aggregat.proj_q.", "attention.to_query."),
    ("aggregat.proj_k.", "attention.to_key."),
    ("aggregat.proj_v.", "attention.to_value."),
    ("aggregat.gru.", "attention.gru."),
    ("aggregat.ffn.mlp.", "attention.ffn."),
    ("decode.mask_token", "decoder.mask_token"),
    ("decode.posit_embed._pe", "decoder.positions.weight"),
    ("decode.project1.project.", "decoder.project_tokens.linear."),
    ("decode.project1.norm.", "decoder.project_tokens.norm."),
    ("decode.project2.project.", "decoder.project_slots.linear."),
    ("decode.project2.norm.", "decoder.project_slots.norm."),
    ("decode.norm0.", "decoder.norm."),
    ("decode.backbone.", "decoder.backbone."),
)
_PAPER_WIDTH = 1024  # of CLIP ViT-L/14-336, the tower of the released weights


def export_official(
    weights: str | Path,
    output: str | Path,
    with_decoder: bool = False,
    num_heads: int = 4,
    tower: str | None = None,
    layer: int = 9,
) -> OCPruner:
    """Write `model.safetensors` and `config.json` of the authors' released weights.

    Args:
        weights: their `weights.pth`.
        output: folder to write; made if it is not there.
        with_decoder: keep the decoder, which only training and reconstruction need.
        num_heads: of the decoder, the one size that no tensor shows; the authors use 4.
        tower: hub id of the vision tower; None for CLIP ViT-L/14-336 where the width fits.
        layer: number of `hidden_states` that the weights were trained on.

    Raises:
        ValueError: if the file is not theirs; names what is missing or left over. Nothing is
            written then.
    """
    state = load_tensors(weights)
    with explained(f"{weights} is not the official state dict of OC-VTP"):
        network = convert(state, num_heads=num_heads, tower=tower, layer=layer)
    return save(network, output, with_decoder)


def convert(
    state: Mapping[str, Any], *, num_heads: int = 4, tower: str | None = None, layer: int = 9
) -> OCPruner:
    """The network, with its decoder, of an official state dict.

    Raises:
        ValueError: for names that are unknown or missing, and shapes that do not fit.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        prefix = next((pair for pair in _NAMES if str(name).startswith(pair[0])), None)
        if prefix is None or not isinstance(tensor, Tensor):
            unknown.append(str(name))
        else:
            ours[prefix[1] + name[len(prefix[0]) :]] = tensor
    if unknown:
        raise ValueError(f"{len(unknown)} unknown entries, e.g. {sorted(unknown)[:5]}.")
    config = _infer(ours, num_heads, tower, layer)
    with torch.device("meta"):
        expected = OCPruner(config).state_dict()
    ours["queries.noise"] = noise_table(config.noise_rows, config.slot_dim, config.noise_seed)
    missing, extra = sorted(expected.keys() - ours.keys()), sorted(ours.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"missing {missing[:5]}, left over {extra[:5]} (in this library's names).")
    return artifact.restore(partial(OCPruner, config), artifact.Weights.of_tensors(ours))


def _infer(
    ours: dict[str, Tensor], num_heads: int, tower: str | None, layer: int
) -> OCPrunerConfig:
    """All sizes, from the tensors."""

    def size(name: str, dim: int) -> int:
        if name not in ours or ours[name].ndim <= dim:
            raise ValueError(f"the tensor of {name!r} is missing or has another shape.")
        return int(ours[name].shape[dim])

    feature_dim = size("encode.0.weight", 0)
    tokens = size("decoder.positions.weight", 1)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"its position embedding has {tokens} tokens, which is no square grid.")
    layers = {int(k.split(".")[3]) for k in ours if k.startswith("decoder.backbone.layers.")}
    if tower is None and feature_dim == _PAPER_WIDTH:
        tower = OCPrunerConfig.tower
    return OCPrunerConfig(
        feature_dim=feature_dim,
        hidden_dim=size("encode.1.weight", 0),
        slot_dim=size("queries.mean", 2),
        ffn_dim=size("attention.ffn.0.weight", 0),
        grid_hw=(side, side),
        decoder=DecoderConfig(
            num_layers=len(layers),
            num_heads=num_heads,
            ffn_dim=size("decoder.backbone.layers.0.linear1.weight", 0),
        ),
        tower=tower,
        layer=layer,
        training={"source": "the authors' released weights"},
    )
