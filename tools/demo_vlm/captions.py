"""Everything that a caption or a question can say of one object of a drawn scene.

T texts; O kinds of objects: shape x colour x size, as in `Batch.kinds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.questions import ENGLISH, PLURALS, SIZES


@dataclass(frozen=True)
class Caption:
    """A text, and what an object must be for it to be about that; None where it does not matter.

    Args:
        text: e.g. "a small red star".
        shape: one of `SHAPES`. colour: of `COLOURS`. size: of `SIZES`.
    """

    text: str
    shape: str | None = None
    colour: str | None = None
    size: str | None = None


def object_captions() -> list[Caption]:
    """Of one object: a small red star, a red star, a star, a red object, a small object, ..."""
    captions = []
    for shape, colour, size in product((None, *SHAPES), (None, *COLOURS), (None, *SIZES)):
        words = [word for word in (size, colour, shape or "object") if word]
        if shape or colour or size:
            captions.append(Caption(" ".join(["a", *words]), shape, colour, size))
    return captions


def question_captions() -> list[Caption]:
    """The questions about scenes, each as a caption of what it asks for."""
    words = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}
    asked = {
        "existence": ("shape", "colour"),
        "colour": ("shape", "size"),
        "shape": ("colour", "size"),
        "count": ("shape",),
    }
    captions = []
    for kind, template in ENGLISH.items():
        for values in product(*(words[name] for name in asked[kind])):
            said = dict(zip(asked[kind], values, strict=True))
            plural = {"plural": PLURALS[said["shape"]]} if "shape" in said else {}
            captions.append(Caption(template.format(**said, **plural), **said))
    return captions


def pair_captions() -> list[Caption]:
    """A red star, and so on: shapes, and colours of each."""
    return [c for c in object_captions() if c.shape and c.colour and not c.size]


def described(captions: Sequence[Caption]) -> Tensor:
    """[T, O] 1 for the kinds of objects that a text is about."""
    found = torch.zeros(len(captions), len(SHAPES), len(COLOURS), len(SIZES))
    for row, caption in zip(found, captions, strict=True):
        names = ((SHAPES, caption.shape), (list(COLOURS), caption.colour), (SIZES, caption.size))
        places = [slice(None) if name is None else known.index(name) for known, name in names]
        row[tuple(places)] = 1
    return found.flatten(1)
