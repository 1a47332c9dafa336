"""Operations of a language model that reads a prompt, by three conventions, and of vision towers.

n tokens, d width, m width of the MLP, L layers; F2 = 4 n d^2 + 2 n^2 d + 2 n d m and
F3 = 4 n d^2 + 2 n^2 d + 3 n d m are multiplications with their additions (MACs) of one layer whose
MLP has two or three matrices. With grouped-query attention 4 d^2 is 2 d q + 2 d k, of the widths of
queries and keys, and 2 n^2 d is 2 n^2 q: a generalisation that the papers do not need.

Attention counts whole, also the half that a causal mask leaves out; norms, activations, softmax and
positions count nothing.

T tokens of a block of a tower (with the CLS, where there is one), P patches of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ocvtp.flops.sizes import TextSizes, TowerSizes

Convention = Literal["oc-vtp", "macs", "true"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
_OC_VTP_TEXT = 32

MEANINGS: dict[Convention, str] = {
    "oc-vtp": "2 F2 a layer, n = visual + 32; the figures of OC-VTP's paper",
    "macs": "F3 a layer, n = visual; those of PyramidDrop, SparseVLM",
    "true": "2 F3 a layer, n = visual + text, and one row of lm_head; what runs",
}


def linear(rows: int, inputs: int, outputs: int) -> int:
    """Operations of a matrix product, two for each multiplication and addition."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """Operations of attention without its projections; `width` of all heads together."""
    return 4 * queries * keys * width


def layer(text: TextSizes, num_tokens: int) -> int:
    """True operations of one layer of the language model, 2 F3."""
    return 2 * _macs(text, num_tokens, matrices=3)


def decode_step(text: TextSizes, num_columns: int) -> int:
    """True operations of one layer that reads one column, the last of `num_columns`."""
    projections = linear(1, text.width, 2 * (text.query_width + text.key_width))
    mlp = 3 * linear(1, text.width, text.ffn)
    return projections + mlp + attention(1, num_columns, text.query_width)


def lm_head(text: TextSizes) -> int:
    """Operations of the one row of `lm_head` that the first answered token takes."""
    return linear(1, text.width, text.vocabulary)


def language_model(
    text: TextSizes, visual: Sequence[int], text_length: int, convention: Convention
) -> int:
    """Operations of the language model until its first answered token.

    Args:
        text: its sizes.
        visual: of each layer, the visual tokens that it reads.
        text_length: tokens of the prompt that are none; only `true` reads it.
        convention: one of `CONVENTIONS`.
    """
    if convention == "oc-vtp":
        return sum(2 * _macs(text, n + _OC_VTP_TEXT, matrices=2) for n in visual)
    if convention == "macs":
        return sum(_macs(text, n, matrices=3) for n in visual)
    return sum(layer(text, n + text_length) for n in visual) + lm_head(text)


def _macs(text: TextSizes, n: int, matrices: int) -> int:
    projections = 2 * n * text.width * (text.query_width + text.key_width)
    return projections + 2 * n**2 * text.query_width + matrices * n * text.width * text.ffn


@dataclass(frozen=True)
class BlockRows:
    """T of one block of a tower.

    Args:
        attention: of each segment of an image that attends inside itself.
        mlp: of its MLP: fewer under pruners that merge.
    """

    attention: tuple[int, ...]
    mlp: int

    @classmethod
    def equal(cls, rows: int) -> BlockRows:
        """A block that attends to all of its tokens and merges nothing."""
        return cls((rows,), rows)


def tower(sizes: TowerSizes, patches: int, rows: Sequence[BlockRows], num_halves: int) -> int:
    """Operations of a vision tower on one view of an image.

    Args:
        sizes: of the tower.
        patches: P.
        rows: of each block.
        num_halves: how many halves of blocks run, the attention of a block and its MLP.
    """
    total = linear(patches, sizes.patch_inputs, sizes.width)
    for number, (block, weights) in enumerate(zip(rows, sizes.blocks, strict=True)):
        if 2 * number < num_halves:
            total += linear(sum(block.attention), weights[0], 1)
            pairs = sum(length**2 for length in block.attention)
            total += attention(1, pairs, sizes.width)
        if 2 * number + 1 < num_halves:
            total += linear(block.mlp, weights[1], 1)
    return total
