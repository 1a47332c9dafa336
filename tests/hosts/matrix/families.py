"""Tiny models of every family, their inputs, and prompts pruned by hand; one entry each.

B rows of a batch, L' columns of a short prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import qwen_reference
import reference
import reference_internvl
import reference_next
import reference_onevision
import tiny_qwen
import torch
from reference import IMG, Inputs, Side
from tiny_internvl import tiny_internvl
from tiny_models import tiny_llava
from tiny_next import tiny_next
from tiny_onevision import tiny_onevision
from torch import Tensor

from ocvtp import Selection, VisualTokens
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.registry import host_class

Row = tuple[int | str, ...]
"""Numbers stand for so many text tokens, `IMG` for an image; images have another size each."""
ONE: list[Row] = [(5, IMG, 4)]
SEVERAL: list[Row] = [(5, IMG, 3, IMG, IMG, 4)]
BATCH: list[Row] = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]
TEXT: list[Row] = [(7,), (4,)]
Places = list[list[int]]


def some(tokens: VisualTokens) -> Selection:
    """Keep every second token, another number of every image: what `places` are by hand."""
    keep = 2 * torch.arange(1, 6).repeat(tokens.batch_size, 1)
    counts = torch.arange(tokens.batch_size) % 3 + 3
    return Selection(keep, torch.arange(5) < counts[:, None])


def places(num_images: int) -> Places:
    """Numbers of the tokens that are kept of every image."""
    return [[2 * place for place in range(1, image % 3 + 4)] for image in range(num_images)]


@dataclass(frozen=True, eq=False)
class Family:
    """One family of models.

    Args:
        host: its `model_type`.
        towers: name of a vision tower -> a tiny model with it; the first one has all features.
        make: rows and the side of padding -> what a processor returns.
        single: a batch and the number of a row -> that row, without its padding.
        shorten: model, inputs, side -> the prompt of which `places` are kept, made by hand.
        ids: that prompt and the inputs -> [B, L'] its `input_ids`, 0 on padding.
        make_unresized: `make` with images whose tokens the model reads as the tower gives them;
            None where it always does.
    """

    host: str
    towers: dict[str, Callable[[], Any]]
    make: Callable[[Sequence[Row], Side], Inputs]
    single: Callable[[Inputs, int], Inputs]
    shorten: Callable[[Any, Inputs, Side], Any]
    ids: Callable[[Any, Inputs], Tensor] = lambda short, inputs: short.gather(inputs["input_ids"])
    make_unresized: Callable[[Sequence[Row], Side], Inputs] | None = None

    def with_processor(self) -> tuple[Any, Any]:
        """Its model of random weights, and a processor."""
        return load_model(f"random:tiny-{host_class(self.host).name}")

    @cached_property
    def model(self) -> Any:
        """The first one, after a first call, in which transformers installs hooks of its own."""
        model = next(iter(self.towers.values()))()
        inputs = self.make(ONE, "left")
        model.generate(**inputs, max_new_tokens=1)
        self.shorten(model, inputs, "left")
        return model


@contextmanager
def untouched(family: Family) -> Iterator[Family]:
    """Its model is the same behind the block as before it, but for what every call changes."""
    before = reference.fingerprint(family.model)
    yield family
    changed = {key for key, _ in reference.fingerprint(family.model).items() ^ before.items()}
    assert changed <= {"model.rope_deltas."}


def shorten_llava(model: Any, inputs: Inputs, side: Side) -> Any:
    return reference.shorten(model, inputs, places(len(inputs["pixel_values"])), side)


def shorten_next(model: Any, inputs: Inputs, side: Side) -> Any:
    sizes = reference_next.sizes_of(inputs)
    pairs = zip(sizes, places(len(sizes)), strict=True)
    kept = [[reference_next.cells(size)[place] for place in own] for size, own in pairs]
    return reference_next.shorten_next(model, inputs, kept, "rows", side)


def shorten_onevision(model: Any, inputs: Inputs, side: Side) -> Any:
    images = reference_onevision.images_of(inputs)
    pairs = zip(images, places(len(images)), strict=True)
    kept = [[reference_onevision.views(image)[0][place] for place in own] for image, own in pairs]
    return reference_onevision.shorten_onevision(model, inputs, kept, "rows", side)


def make_internvl(rows: Sequence[Row], side: Side) -> Inputs:
    inputs = reference_internvl.make_internvl(rows, side)
    return {name: value for name, value in inputs.items() if len(value)}


def shorten_internvl(model: Any, inputs: Inputs, side: Side) -> Any:
    images = reference_internvl.views(inputs, "per_image")
    pairs = zip(images, places(len(images)), strict=True)
    kept = [image[place] for image, own in pairs for place in own]
    return reference_internvl.shorten_internvl(model, inputs, kept, side)


def make_qwen(rows: Sequence[Row], side: Side) -> Inputs:
    sizes = iter([(4, 4), (5, 3), (3, 6)])
    sized = [tuple(next(sizes) if part == IMG else part for part in row) for row in rows]
    return tiny_qwen.make_batch(sized, side)


def shorten_qwen(model: Any, inputs: Inputs, side: Side) -> Any:
    """On what the model itself makes of the images: by `look`, their bits would differ."""
    grids = inputs["image_grid_thw"]
    with torch.no_grad():
        read = model.model.get_image_features(inputs["pixel_values"], grids, return_dict=True)
    sizes = [len(image) for image in read.pooler_output]
    deep = [
        torch.cat([*rows]) if isinstance(rows, tuple) else rows
        for rows in getattr(read, "deepstack_features", None) or []
    ]
    layers = [rows.split(sizes) for rows in deep]
    by_image = zip(*layers, strict=True) if layers else [()] * len(sizes)
    pairs = zip(read.pooler_output, by_image, strict=True)
    looked = [qwen_reference.Looked([], [], [], rows, list(more)) for rows, more in pairs]
    return qwen_reference.shorten(model, inputs, places(len(sizes)), side, looked)


def qwen(host: str, tiny: Callable[[], Any]) -> Family:
    """The families differ in their towers only."""
    return Family(
        host=host,
        towers={"own": tiny},
        make=make_qwen,
        single=tiny_qwen.single,
        shorten=shorten_qwen,
        ids=lambda short, inputs: short.ids,
    )


FAMILIES = (
    Family(
        host="llava",
        towers={
            "CLIP": lambda: tiny_llava("clip"),
            "SigLIP": lambda: tiny_llava("siglip"),
            "DINOv2": lambda: tiny_llava("dinov2"),
            "DINOv2 with registers": lambda: tiny_llava("dinov2_with_registers"),
            "DINOv3": lambda: tiny_llava("dinov3_vit"),
        },
        make=reference.make_batch,
        single=reference.single,
        shorten=shorten_llava,
    ),
    Family(
        host="llava_next",
        towers={
            "CLIP": lambda: tiny_next("clip"),
            "SigLIP": lambda: tiny_next("siglip"),
            "DINOv2": lambda: tiny_next("dinov2"),
        },
        make=reference_next.make_next,
        single=reference_next.single_next,
        shorten=shorten_next,
    ),
    Family(
        host="llava_onevision",
        towers={"SigLIP": tiny_onevision},
        make=lambda rows, side: reference_onevision.make_onevision(
            rows, side, reference_onevision.EITHER
        ),
        single=reference_onevision.single_onevision,
        shorten=shorten_onevision,
        make_unresized=lambda rows, side: reference_onevision.make_onevision(
            rows, side, reference_onevision.EXACT
        ),
    ),
    Family(
        host="internvl",
        towers={"own": tiny_internvl},
        make=make_internvl,
        single=reference_internvl.single_internvl,
        shorten=shorten_internvl,
    ),
    qwen("qwen2_vl", tiny_qwen.tiny_qwen2),
    qwen("qwen2_5_vl", tiny_qwen.tiny_qwen),
    qwen("qwen3_vl", tiny_qwen.tiny_qwen3),
)

QUICK = ("llava", "qwen2_5_vl")
EVERY_FAMILY = [
    pytest.param(f, id=f.host, marks=[] if f.host in QUICK else [pytest.mark.slow])
    for f in FAMILIES
]
"""For tests of many cases on every host: two of them stand for the others in the fast run."""
