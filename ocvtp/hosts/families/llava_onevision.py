"""LLaVA-OneVision in transformers: LLaVA-NeXT's tiles, whose tokens may be resized to fewer.

Several images of one prompt are not cut into tiles: each is a base view and one newline. M rows
that the language model reads of an image, without newlines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocvtp.hosts.base import Encoded, Kept, Tiny
from ocvtp.hosts.families.llava_next import LlavaNextHost, Packed, sizes_of
from ocvtp.hosts.families.tiles import newline_of
from ocvtp.hosts.lazy_projection import Rows
from ocvtp.random_models import tiny_llava
from ocvtp.structures import Needs, Selection
from ocvtp.transformers_names import both


class LlavaOnevisionHost(LlavaNextHost):
    """LLaVA-OneVision: LLaVA-NeXT, but for calls in which the model resizes an image's tokens.

    Of large images it reads fewer tokens than the tiles have (`config.vision_aspect_ratio`): means
    of neighbours, which are no tokens of the tower. As soon as one image of a call is resized,
    pruners see of all of them the rows that the language model reads, without newlines, as
    `features` and `projected`, [I, M, D'], and nothing from inside the tower.

    Raises:
        ValueError: for other towers than CLIP, SigLIP and DINO without registers.
    """

    family: ClassVar[str] = "LLaVA-OneVision"
    tiny: ClassVar[Tiny | None] = Tiny(tiny_llava.tiny_onevision, tiny_llava.SPECIAL_TOKENS)
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    image_keys: ClassVar[tuple[str, ...]] = (
        *LlavaNextHost.image_keys,
        "vision_aspect_ratio",
        "batch_num_images",
    )

    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        """See `Host.encode`.

        Raises:
            ValueError: for settings of the call that the pruner cannot work with, and where tokens
                are resized and it reads others.
            RuntimeError: if a hook did not fire.
        """
        # The model's own forward() takes this argument but follows the config.
        images = {name: value for name, value in images.items() if name != "vision_aspect_ratio"}
        self._check_settings(images, needs)
        sides = both(self.tower.config.patch_size)
        height, width = (
            n // side for n, side in zip(images["pixel_values"].shape[-2:], sides, strict=True)
        )
        token_map = self._token_map(images, height * width)
        output, found, later = self._look_inside(images, needs, per_token=not token_map.mixed)
        rows = output.pooler_output
        grid = self._grid(images["pixel_values"], found["features"].shape[1])
        newline = newline_of(rows, token_map)
        if token_map.mixed:
            self._check_resized(needs)
            if "valid" in found:
                raise _no_tower("drops tokens before or inside the tower")
            is_token = (token_map.source >= 0).split(token_map.lengths)
            tokens = [row[real.to(row.device)] for row, real in zip(rows, is_token, strict=True)]
            embeddings: Rows = torch.cat(list(rows))
            found = {"features": nn.utils.rnn.pad_sequence(tokens, batch_first=True)}
            token_map = token_map.by_rows()
        else:
            embeddings = self._rows(rows, later, found["features"], token_map.source)
        packed = self._packed(embeddings, newline, found, token_map, grid, needs)
        return replace(packed, output=output)

    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        """See `Host.apply`.

        Raises:
            ValueError: if tokens that the model resized are to be merged.
        """
        assert isinstance(encoded, Packed)
        if selection.merge is not None and encoded.token_map.mixed:
            raise _no_tower("merges tokens before the projector")
        return super().apply(encoded, selection)

    def _check_settings(self, images: dict[str, Any], needs: Needs) -> None:
        super()._check_settings(images, needs)
        counts, num_images = images.get("batch_num_images"), len(sizes_of(images))
        if counts is not None and sum(_numbers(counts)) != num_images:
            raise ValueError(
                f"batch_num_images={_numbers(counts)} do not add up to the {num_images} images of"
                " image_sizes; pass all that the processor returned."
            )

    def _check_resized(self, needs: Needs) -> None:
        if self.tiling.budget == "per_tile":
            raise ValueError(
                "the model resized the tokens of an image, across its tiles, so there is no budget"
                " for each; pass budget='per_image'."
            )
        names = ("hidden", "attention", "keys", "cls_queries", "cls", "clip")
        if wanted := [name for name in names if getattr(needs, name)]:
            raise _no_tower(f"reads {', '.join(wanted)}")

    def _num_tiles(self, images: dict[str, Any]) -> list[int]:
        tiled, counts = super()._num_tiles(images), images.get("batch_num_images")
        if counts is None:
            return tiled
        alone = [count == 1 for count in _numbers(counts) for _ in range(count)]
        return [tiles if one else 1 for tiles, one in zip(tiled, alone, strict=True)]

    def _pack(
        self, images: dict[str, Any], tiles: Sequence[Tensor], newline: Tensor
    ) -> list[Tensor]:
        packed, _ = self.model.model.pack_image_features(
            tiles,
            sizes_of(images),
            image_newline=newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return list(packed)


def _numbers(values: Any) -> list[int]:
    numbers: list[int] = torch.as_tensor(values).flatten().tolist()
    return numbers


def _no_tower(what: str) -> ValueError:
    return ValueError(
        f"the pruner {what}, but the model resized the tokens of an image (vision_aspect_ratio),"
        " so that it reads means of those of the tower; use a pruner that reads nothing but"
        " projected tokens and text (see `ocvtp list`), or smaller images."
    )
