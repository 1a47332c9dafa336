"""What a pruner asks for, what it is given, and what it answers.

Letters in shapes, in every file: B images (I of them inside the language model, all of one size),
N visual tokens of an image without its CLS, K tokens kept of it, H x W its grid, D width of the
tower, D' width of the language model, M text tokens, S slots. Where a file needs other letters,
it explains them.

`hidden_states[i]` is the *input* of block i, so block i's output is `hidden_states[i + 1]`; blocks
are numbered from 0. Negative numbers count from the end as in Python: block -2 of a 24-block tower
is block 22 and its output is `hidden_states[-2]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Stage = Literal["pixels", "encoder", "llm_input", "llm_layers"]
STAGES: tuple[Stage, ...] = ("pixels", "encoder", "llm_input", "llm_layers")

AttentionKind = Literal[
    "cls", "cls_sharpest", "received", "given", "global", "last", "last_heads", "text", "visual"
]
OF_CLS: tuple[AttentionKind, ...] = ("cls", "cls_sharpest")
"""Those that a tower without a CLS has not."""
AttentionKey = tuple[int, AttentionKind]
"""(block, kind): `cls` is the CLS row, `cls_sharpest` that of one head, the one in which its
logarithm varies most among the image's patches (standard deviation), `received` the mean over all
queries (CLS and registers included, unless `Needs.patch_queries`), `given` the mean over the patch
keys of each patch query, `global` the mean over the queries of those patches that receive at least
twice the mean of all. In the language model, whose blocks are its layers: `last` is the row of the
prompt's last token, `text` the mean over the rows that the pruner's `raters` name, `visual` the
mean over the image's own tokens of their attention among each other; `last_heads` is `last` of
every head, [B, N, H]. Where nothing is said of heads, it is their mean; all are in fp32."""

Layout = Literal["grid", "variable", "joint", "per_tile"]
"""How an image becomes tokens: of one `grid` for all images, or of a `variable` one; as a base view
and tiles `joint`ly, or of each of these as an image of its own, `per_tile`."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Needs:
    """What a pruner reads besides `features` and `grid_hw`; what is not named is not computed.

    Args:
        hidden: layers of `hidden_states` of the vision tower.
        attention: `(block, kind)` pairs, see `AttentionKey`.
        keys: blocks whose attention keys are wanted (with the CLS key and query where there is a
            CLS).
        cls_queries: blocks of `keys` whose CLS query must be there.
        patch_queries: whether `received` attention is the mean over the patches' queries alone,
            those of the CLS and of registers left out.
        cls: whether the CLS row of the selected layer is wanted.
        projected: whether the projected tokens (what the language model would read) are wanted.
        text: whether the text embeddings of the language model are wanted.
        clip: whether CLIP's image and text embeddings of the shared space are wanted.
        column: a layer of the language model, whose attention a column of the reader's own gets
            after the prompt, see `LayerTokens.column`; None for no such column.
    """

    hidden: tuple[int, ...] = ()
    attention: tuple[AttentionKey, ...] = ()
    keys: tuple[int, ...] = ()
    cls_queries: tuple[int, ...] = ()
    patch_queries: bool = False
    cls: bool = False
    projected: bool = False
    text: bool = False
    clip: bool = False
    column: int | None = None

    def __or__(self, other: Needs) -> Needs:
        """Everything that either asks for.

        Raises:
            ValueError: if they mean different things by `received` attention.
        """
        if (
            self.reads_received
            and other.reads_received
            and self.patch_queries != other.patch_queries
        ):
            raise ValueError(
                "one of these pruners reads the attention received from all queries, the other that"
                " received from patches alone; attach them one after the other, not together."
            )
        return Needs(
            hidden=_union(self.hidden, other.hidden),
            attention=_union(self.attention, other.attention),
            keys=_union(self.keys, other.keys),
            cls_queries=_union(self.cls_queries, other.cls_queries),
            patch_queries=self.patch_queries or other.patch_queries,
            cls=self.cls or other.cls,
            projected=self.projected or other.projected,
            text=self.text or other.text,
            clip=self.clip or other.clip,
            column=other.column if self.column is None else self.column,
        )

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of the vision tower whose queries or keys are read."""
        return _union(self.keys, tuple(block for block, _ in self.attention))

    @property
    def reads_received(self) -> bool:
        """Whether any of it is `received` attention."""
        return any(kind == "received" for _, kind in self.attention)

    @property
    def reads_cls(self) -> bool:
        """Whether any of it is the CLS token's: a tower without one has it not."""
        asked = any(kind in OF_CLS for _, kind in self.attention)
        return self.cls or bool(self.cls_queries) or asked


def take(values: Tensor, indices: Tensor) -> Tensor:
    """[B, N] or [B, N, D] at the tokens [B, K] of every image: [B, K] or [B, K, D]."""
    if values.ndim == 3:
        indices = indices[:, :, None].expand(-1, -1, values.shape[2])
    return values.gather(1, indices)


def _union(a: tuple[_T, ...], b: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys((*a, *b)))


def _holds(mapping: Mapping[Any, Tensor], key: Any) -> bool:
    """Whether a mapping answers to a key, also one that computes its values when asked."""
    try:
        mapping[key]
    except KeyError:
        return False
    return True


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of B images and what was asked for about them.

    Args:
        features: [B, N, D], what would go to the projector, CLS and registers apart.
        grid_hw: rows and columns of the token grid; N = H W unless images are packed.
        valid: [B, N] bool, False on padding; None when all tokens are real.
        grids: [B, V, 2], rows and columns of each image's views where images have several or other
            ones: tokens are in raster order, view after view, 0 x 0 where an image has fewer; None
            when every image is one `grid_hw`. Training encoders tell.
        cls: [B, D], CLS row of the selected layer.
        hidden: layer -> [B, N, D].
        attention: (block, kind) -> [B, N], fp32; see `AttentionKey`.
        keys: block -> [B, N, D], all heads side by side, before positions turn them.
        cls_keys: block -> [B, D].
        cls_queries: block -> [B, D].
        num_heads: heads of the tower's attention.
        projected: [B, N, D'].
        text: [B, M, D'], the prompt around each image; `text_valid` [B, M] marks real tokens.
        clip_visual: [B, N, P], the tokens in CLIP's shared space, not normalised.
        clip_text: [B, T, P], the prompt there, one row for each T-th part that CLIP can read;
            `clip_text_valid` [B, T] marks real parts, None when all are.
    """

    features: Tensor
    grid_hw: tuple[int, int]
    valid: Tensor | None = None
    grids: Tensor | None = None
    cls: Tensor | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[AttentionKey, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    cls_keys: Mapping[int, Tensor] = field(default_factory=dict)
    cls_queries: Mapping[int, Tensor] = field(default_factory=dict)
    num_heads: int | None = None
    projected: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    clip_visual: Tensor | None = None
    clip_text: Tensor | None = None
    clip_text_valid: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.features.shape[0]

    @property
    def num_tokens(self) -> int:
        """N, the visual tokens of an image, padding included."""
        return self.features.shape[1]

    @property
    def real(self) -> Tensor:
        """[B, N] `valid`, all True where all tokens are real."""
        if self.valid is not None:
            return self.valid
        size = self.features.shape[:2]
        return torch.ones(size, dtype=torch.bool, device=self.features.device)

    def missing(self, needs: Needs) -> list[str]:
        """Names of what `needs` asks for and is not here."""
        absent = [f"hidden[{i}]" for i in needs.hidden if not _holds(self.hidden, i)]
        absent += [
            f"attention[{block}, {kind}]"
            for block, kind in needs.attention
            if not _holds(self.attention, (block, kind))
        ]
        absent += [f"keys[{i}]" for i in needs.keys if not _holds(self.keys, i)]
        absent += [
            f"cls_queries[{i}]" for i in needs.cls_queries if not _holds(self.cls_queries, i)
        ]
        given = {"cls": self.cls, "projected": self.projected, "text": self.text}
        given["clip"] = self.clip_visual if self.clip_text is not None else None
        absent += [name for name, value in given.items() if getattr(needs, name) and value is None]
        if needs.column is not None and getattr(self, "column", None) is None:
            absent.append("column")
        return absent

    def map(self, function: Any) -> VisualTokens:
        """Apply `function` to every tensor: `tokens.map(lambda t: t[:1])` is the first image."""
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = function(value)
            elif isinstance(value, Mapping):
                changed[f.name] = {key: function(tensor) for key, tensor in value.items()}
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class LayerTokens(VisualTokens):
    """The visual tokens of B images before a layer of the language model.

    `features` are its hidden states, `attention` and `keys` of its layers (turned by their
    positions, counted from the row's first token), `num_heads` those of the keys, `text` the hidden
    states of the text after each image (of all text, where none follows). Images of one call come
    together where they are equally long.

    Args:
        places: [B, N] the number of every token among those of its image in the tower, to look up
            what the tower said of it; -1 for separators between rows or tiles.
        text_keys: layer -> [B, M, D].
        normed: `final` -> [B, N, D'], `features` after the language model's last norm; `layer` ->
            after the norm that precedes the attention of the coming layer.
        text_normed: the same of `text`, where it is read.
        tower: what the vision tower gave, [B, ...] images of N' tokens, as `tower_needs` names it.
        column: vectors [l + 1, D'] -> [B, N, H], the attention in layer l, of every head in fp32,
            of one more column after the prompt: it begins as the first vector, and before every
            further layer the next is added to it. Nothing else sees it. Gradients reach the
            vectors. None where `Needs.column` did not ask for it.
    """

    places: Tensor
    text_keys: Mapping[int, Tensor] = field(default_factory=dict)
    normed: Mapping[str, Tensor] = field(default_factory=dict)
    text_normed: Mapping[str, Tensor] = field(default_factory=dict)
    tower: VisualTokens | None = None
    column: Callable[[Tensor], Tensor] | None = None

    def map(self, function: Any) -> LayerTokens:
        """Apply `function` to every tensor, and to what `column` returns."""
        mapped = super().map(function)
        assert isinstance(mapped, LayerTokens)
        read = self.column
        if read is None:
            return mapped
        return replace(mapped, column=lambda vectors: function(read(vectors)))


@dataclass(frozen=True)
class Selection:
    """Which tokens are kept.

    Args:
        keep_indices: [B, K] int64, ascending (where `valid` is given: ascending over the valid
            ones, which come first).
        valid: [B, K] bool where images keep different numbers; None when all entries count.
        merge: [B, K, 1 + N] rows of weights over CLS and tokens for merging methods: the k-th
            token that the language model reads is `merge[k] @ [cls; features]`. Weights need not
            sum to 1; column 0 is 0 without a CLS. Rows are in the order of the paper, e.g.
            VisionZip's CLS, dominant, contextual tokens; valid ones come first.
        anchors: [B, K] for merging methods: the token in whose place row k stands, i.e.
            `keep_indices` in the order of the rows; None where that is ascending too.
    """

    keep_indices: Tensor
    valid: Tensor | None = None
    merge: Tensor | None = None
    anchors: Tensor | None = None

    def in_raster_order(self) -> Selection:
        """The same with the rows of `merge` in the order of `keep_indices`.

        For hosts and settings that give every token the position of its place in the image.
        """
        if self.merge is None or self.anchors is None:
            return self
        places = self.anchors
        if self.valid is not None:  # rows that do not count stay last
            places = places + (~self.valid) * self.merge.shape[2]
        order = places.argsort(dim=1)[:, :, None].expand_as(self.merge)
        return replace(self, merge=self.merge.gather(1, order), anchors=None)

    def counts(self) -> Tensor:
        """[B] tokens kept of each image."""
        if self.valid is not None:
            return self.valid.sum(dim=1)
        rows, kept = self.keep_indices.shape
        return torch.full((rows,), kept, device=self.keep_indices.device)
