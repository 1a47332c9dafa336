"""Frozen vision towers for training, cut after the last layer that is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ocvtp.data.coco import ImageTransform
from ocvtp.structures import Layout, Needs, VisualTokens
from ocvtp.towers import taps
from ocvtp.towers.hooks import put

DType = Literal["float32", "bfloat16", "float16"]


class FrozenEncoder(nn.Module, ABC):
    """A vision tower that turns images into visual tokens and is never trained.

    Building one reads its settings only. `load(needs)` reads the weights of the blocks that are
    needed; those after them never exist.

    Attributes:
        tower_id: what to write into an artifact.
        layer: number of `hidden_states` that the OC-pruner reads, non-negative.
        feature_dim: width of the tokens.
        grid_hw: rows and columns of the token grid, of a view where an image is cut into several.
        layout: how images become tokens.
        num_prefix: tokens before the patches (CLS, registers).
        patch_size: pixels along the side of a token's patch.
        transform: the image processor that belongs to the tower.
    """

    tower_id: str
    layer: int
    feature_dim: int
    grid_hw: tuple[int, int]
    layout: Layout = "grid"
    num_prefix: int
    patch_size: int
    transform: ImageTransform

    def __init__(self, dtype: DType) -> None:
        super().__init__()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}; pass 'float32', 'bfloat16' or 'float16'.")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.needs: Needs | None = None

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks of the whole tower."""

    @property
    def has_cls(self) -> bool:
        """Whether the first token of the tower is a CLS."""
        return self.num_prefix > 0

    @property
    def max_tokens(self) -> int:
        """Most tokens that share slots."""
        return self.grid_hw[0] * self.grid_hw[1]

    @abstractmethod
    def _build(self, num_blocks: int) -> nn.Module:
        """The tower's first `num_blocks` blocks with their weights, on the CPU."""

    @abstractmethod
    def _view(self, tower: nn.Module) -> taps.Tower:
        """Where blocks, queries and keys are."""

    def _run(self, tower: nn.Module, pixel_values: Tensor) -> None:
        tower(pixel_values)

    def _check_sides(self, sides: tuple[int, int], name: str) -> None:
        """Refuse a picture of `sides` pixels that patches do not divide."""
        patch = self.patch_size
        if any(side < patch or side % patch for side in sides):
            less = max(1, sides[0] // patch) * patch
            raise ValueError(
                f"img_size={sides[0] if sides[0] == sides[1] else sides} is no multiple of the"
                f" {patch} pixels of a patch of {name!r}; pass one, e.g. {less} or {less + patch}."
            )

    def check(self, needs: Needs) -> None:
        """Refuse what the tower cannot supply.

        Raises:
            ValueError: that names the alternative.
        """
        if needs.reads_cls and not self.has_cls:
            raise ValueError(
                f"the pruner reads the CLS token, which the tower {self.tower_id} has not; use"
                " `received` attention where the method offers it, or a pruner without CLS."
            )
        self.resolved(needs)

    def load(self, needs: Needs) -> FrozenEncoder:
        """Read the weights of the blocks that `needs` reaches, and hook them.

        Raises:
            ValueError: if the tower has no such layer or the weights are incomplete.
        """
        # Numbers from the end would point elsewhere in a cut tower: hook the resolved ones.
        asked = self._asked = self.resolved(needs)
        blocks = [*(b for b, _ in asked.attention), *asked.keys]
        self.num_blocks = max([*asked.hidden, *(b + 1 for b in blocks), 1])
        self.tower = self._build(self.num_blocks).to(self.dtype).eval().requires_grad_(False)
        self.needs = needs
        put(taps.hooks_for(self._view(self.tower), self._asked))
        self.eval()
        return self

    def resolved(self, needs: Needs) -> Needs:
        """The same with the numbers of layers and blocks counted from the start.

        Raises:
            ValueError: if the tower has no such layer or block.
        """
        return replace(
            needs,
            hidden=tuple(taps.resolve(i, self.depth + 1, "hidden_states") for i in needs.hidden),
            attention=tuple((self._block(b), kind) for b, kind in needs.attention),
            keys=tuple(map(self._block, needs.keys)),
            cls_queries=tuple(map(self._block, needs.cls_queries)),
        )

    @property
    def origin(self) -> dict[str, Any]:
        """What the tokens depend on beside the images, JSON-able; its weights are not read."""
        is_random = self.tower_id.startswith("random")
        return {
            "id": self.tower_id,
            "seed": getattr(self, "_seed", None) if is_random else None,
            "depth": self.depth,
            "feature_dim": self.feature_dim,
            "grid_hw": list(self.grid_hw),
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "preprocessing": self.transform.describe(),
        }

    def _block(self, number: int) -> int:
        return taps.resolve(number, self.depth, "blocks")

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> VisualTokens:
        """Encode.

        Args:
            pixel_values: [B, 3, height, width] as `transform` makes them; a sequence of B where
                `layout` lets images have different sizes.
            image_sizes: height and width of the B images before `transform`, for encoders of tiles.

        Returns:
            The visual tokens with what `load` was asked for, in fp32; `features` and `cls` are
            those of the first layer that it was asked for.

        Raises:
            ValueError: for images of different sizes where the tower takes one.
        """
        del image_sizes
        if self.needs is None:
            raise RuntimeError("call load(needs) before the encoder runs.")
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4:
            shapes = sorted({tuple(image.shape) for image in pixel_values})
            raise ValueError(
                f"the image processor made images of shape {shapes[:3]}; this encoder reads one"
                " [3, height, width] for all. Pass a `processor` that makes one size, or an encoder"
                " of tiles or of variable grids."
            )
        with taps.recording() as record:
            self._run(self.tower, pixel_values.to(self.dtype))
        found = taps.gather(record, self._view(self.tower), self._asked, self.num_prefix)
        kinds = {"cls_keys": "keys", "cls_queries": "keys"}  # these come with them
        for name in found.keys() & {"hidden", "attention", "keys", *kinds}:
            kind, values = kinds.get(name, name), found[name]
            pairs = zip(getattr(self.needs, kind), getattr(self._asked, kind), strict=True)
            found[name] = {asked: values[resolved].float() for asked, resolved in pairs}
        features = next(iter(found["hidden"].values()))
        if self.needs.cls:
            found["cls"] = record.hidden[self._asked.hidden[0]][:, 0].float()
        return VisualTokens(features=features, grid_hw=self.grid_hw, **found)

    def train(self, mode: bool = True) -> FrozenEncoder:
        return super().train(False)
