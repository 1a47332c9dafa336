"""Visual tokens as they are stored: images of a batch to rows of a shard, and back.

Layers and blocks are stored under numbers from the start, and read under those that a network asks
for, which may count from the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocvtp.data.feature_files import OF_IMAGES, OF_TOKENS, tensor_name
from ocvtp.structures import Needs, VisualTokens

_ALSO = {"cls_keys": "keys", "cls_queries": "keys"}  # these come with them


def count_images(batch: Mapping[str, Any]) -> int:
    """Readable images of a batch of pixels or features."""
    return len(batch["image_ids"] if "tokens" in batch else batch["pixel_values"])


def _pairs(kind: str, needs: Needs, stored: Needs) -> Iterator[tuple[Any, Any]]:
    """Each name that is asked for, and that in the files."""
    if kind == "cls":  # of the layer whose features come first
        yield from zip(needs.hidden[:1], stored.hidden[:1], strict=True)
        return
    name = _ALSO.get(kind, kind)
    yield from zip(getattr(needs, name), getattr(stored, name), strict=True)


def stored_tokens(values: Mapping[str, Any], needs: Needs, stored: Needs) -> VisualTokens:
    """What an encoder gives, of what was stored of it.

    Args:
        values: `tokens` of a batch, see `ocvtp.data.features.put_together`.
        needs: what is asked for.
        stored: `FrozenEncoder.resolved` of it.

    Returns:
        in fp32.
    """
    found: dict[str, Any] = dict(values)
    for kind in (*OF_TOKENS, *OF_IMAGES):
        there = values[kind]
        pairs = _pairs(kind, needs, stored)
        found[kind] = {asked: there[name].float() for asked, name in pairs if name in there}
    features = next(iter(found["hidden"].values()))
    found["cls"] = next(iter(found["cls"].values())) if needs.cls else None
    return VisualTokens(features=features, **found)


def stored_rows(
    views: Sequence[VisualTokens], needs: Needs, stored: Needs, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch of images, image after image, and every view of one after the other.

    Args:
        views: of the same B images.
        needs: what their encoder was asked for.
        stored: `FrozenEncoder.resolved` of it.
        dtype: of hidden states, keys and queries; attention stays fp32.

    Returns:
        name in a shard, and the values of all tokens or images.

    Raises:
        ValueError: for values that are not finite, in this dtype or at all.
    """
    grids = [_grids(view) for view in views]
    yield "grids", torch.stack(grids, dim=1).flatten(0, 1)
    counts = grids[0].prod(dim=2).sum(dim=1).tolist()
    for kind in (*OF_TOKENS, *OF_IMAGES):
        for name, asked in {name: asked for asked, name in _pairs(kind, needs, stored)}.items():
            found = [_named(view, kind, asked) for view in views]
            if found[0] is None:
                continue
            values = torch.stack([value for value in found if value is not None], dim=1)
            kept = values.float() if kind == "attention" else values.to(dtype)
            _check_finite(tensor_name(kind, name), values, kept)
            if kind in OF_TOKENS:
                rows = [row[:, :count] for row, count in zip(kept, counts, strict=True)]
                yield tensor_name(kind, name), torch.cat([row.flatten(0, 1) for row in rows])
            else:
                yield tensor_name(kind, name), kept.flatten(0, 1)


def _named(tokens: VisualTokens, kind: str, name: Any) -> Tensor | None:
    """What a tower gave under a name; None where it has none, as without a CLS."""
    found: Tensor | None = tokens.cls if kind == "cls" else getattr(tokens, kind).get(name)
    return found


def _grids(tokens: VisualTokens) -> Tensor:
    """[B, V, 2] int32."""
    if tokens.grids is not None:
        return tokens.grids.int().cpu()
    return torch.tensor(tokens.grid_hw, dtype=torch.int32).expand(tokens.batch_size, 1, 2)


def _check_finite(name: str, values: Tensor, kept: Tensor) -> None:
    if bool(kept.isfinite().all()):
        return
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"the tower gives {name} that is not finite; its weights are damaged, or its dtype"
            " (model.encoder.dtype) is too narrow."
        )
    most, kind = float(values.abs().max()), str(kept.dtype).removeprefix("torch.")
    raise ValueError(
        f"{name} reaches {most:.4g}, which {kind} cannot hold; pass --dtype bfloat16 or float32."
    )
