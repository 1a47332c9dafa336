"""Operations of a prompt until its first answered token, pruned or not.

V views of an image, N visual tokens of a view, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ocvtp.flops import follow_image, formulas
from ocvtp.flops.formulas import CONVENTIONS, Convention
from ocvtp.flops.sizes import sizes_of
from ocvtp.hosts.base import Savings
from ocvtp.pruners import Compose, Pruner

NOTHING_SAVED = Savings(cut_tower=False, project_kept=False)


@dataclass(frozen=True)
class Count:
    """Operations (FLOPs) of one prompt until its first answered token; a batch takes as many times.

    A product with its addition is two. Causal attention counts whole, and norms, activations and
    softmax count nothing.

    Args:
        tower: of the vision tower. projector: of what maps its tokens to the language model.
        select: of choosing what stays: the pruner's own `select` and what it reads, as far as they
            are matrix products, convolutions or attention.
        layers: of each layer of the language model. lm_head: of its one row.
        visual: of each layer, the visual tokens that it reads, of all images of the prompt;
            newlines of tiles count among them.
        text_length: other tokens of the prompt.
        conventions: operations of the language model alone as papers count them, and as they are
            (`true`: `layers` and `lm_head`).
    """

    tower: int
    projector: int
    select: int
    layers: tuple[int, ...]
    lm_head: int
    visual: tuple[int, ...]
    text_length: int
    conventions: dict[Convention, int]

    @property
    def language_model(self) -> int:
        """Of the language model."""
        return sum(self.layers) + self.lm_head

    @property
    def total(self) -> int:
        """Of everything that runs before the first token."""
        return self.tower + self.projector + self.select + self.language_model


def count(
    model: Any,
    *,
    num_visual: int | None = None,
    text_length: int = 32,
    num_keep: int | None = None,
    pruner: Pruner | Compose | None = None,
    num_images: int = 1,
    num_newlines: int = 0,
    savings: Savings | None = None,
) -> Count:
    """Count the operations of one prompt until its first answered token.

    `count(config).total / count(config, pruner=pruner).total` bounds the speed-up of a pruner.

    Args:
        model: a transformers model, or its configuration: no weights are needed; or what
            `sizes_of` made of these, for many counts of one model.
        num_visual: visual tokens of an image before pruning; None for the usual number: of an image
            of fixed size; of two tiles by two and the whole (LLaVA-NeXT, LLaVA-OneVision,
            InternVL); of a square of 672 pixels (Qwen-VL).
        text_length: tokens of the prompt that are none of an image's.
        num_keep: visual tokens that the language model reads of an image, whatever chooses them:
            nothing is counted for the choice, and nothing is saved before it.
        pruner: see `ocvtp.build_pruner`; its `select` runs on random tokens.
        num_images: of the prompt.
        num_newlines: tokens that end the rows of an image, 48 of LLaVA-NeXT's square. No
            published figure counts them. Inside the language model pruners drop them like visual
            tokens; before it at most those without a kept token are dropped, and here none.
        savings: what hosts leave out; None for what `ocvtp.attach` leaves out by default, and
            nothing without a pruner.

    Raises:
        ValueError: for a family whose operations are not known, sizes that do not fit, or a pruner
            whose budget depends on what is in the image, or exceeds its tokens.
    """
    if pruner is not None and num_keep is not None:
        raise ValueError(f"got num_keep={num_keep} and a pruner, which has its own; pass one.")
    sizes = sizes_of(model)
    seen = sizes.usual_tokens if num_visual is None else num_visual
    for name, value, least in (
        ("num_visual", seen, 1), ("text_length", text_length, 1), ("num_images", num_images, 1),
        ("num_newlines", num_newlines, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}={value}; pass at least {least}.")
    if num_keep is not None and not 0 <= num_keep <= seen:
        raise ValueError(f"num_keep={num_keep}; pass 0 to the {seen} tokens of an image.")
    if savings is None:
        savings = NOTHING_SAVED if pruner is None else Savings()
    apart = num_newlines + sizes.host.num_registers
    found = follow_image.follow(sizes, pruner, seen, text_length, savings, apart)
    visual = found.visual
    if num_keep is not None:
        visual = (num_keep + apart,) * sizes.text.layers
    visual = tuple(num_images * tokens for tokens in visual)
    return Count(
        tower=num_images * found.tower,
        projector=num_images * found.projector,
        select=num_images * found.select,
        layers=tuple(formulas.layer(sizes.text, tokens + text_length) for tokens in visual),
        lm_head=formulas.lm_head(sizes.text),
        visual=visual,
        text_length=text_length,
        conventions={
            name: formulas.language_model(sizes.text, visual, text_length, name)
            for name in CONVENTIONS
        },
    )
