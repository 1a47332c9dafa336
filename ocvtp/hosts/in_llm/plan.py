"""Where the images of a prompt are, and how many of their tokens stay before which layer.

L' columns of the short prompt; I images of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.pruners.layer_pruner import LayerPruner, LayerStage
from ocvtp.structures import VisualTokens


@dataclass(frozen=True)
class Group:
    """Images with equally many tokens, which are chosen together.

    Args:
        pruner: the one that chooses.
        schedule: what stays where.
        images: [I] their numbers in the call.
        rows: [I] the row of the batch that each is in. row_numbers: the same, to count with.
        columns: [I, N] of their tokens.
        places: [I, N] numbers of the tokens among those of their image in the tower, -1 for rows
            that are none (separators).
        text: [I, M] columns of the text after each image; of all text, if there is none after it.
        text_valid: [I, M] bool.
        raters: [I, M] bool, see `LayerPruner.raters`.
    """

    pruner: LayerPruner
    schedule: tuple[LayerStage, ...]
    images: Tensor
    rows: Tensor
    row_numbers: tuple[int, ...]
    columns: Tensor
    places: Tensor
    text: Tensor
    text_valid: Tensor
    raters: Tensor | None = None

    def num_keep(self, layer: int) -> int:
        """K before a layer."""
        return next(stage.num_keep for stage in self.schedule if stage.layer == layer)

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                moved[f.name] = value.to(device)
        return replace(self, **moved)

    def repeat(self, times: int) -> Group:
        """Every row of the batch so many times, one after the other, as beams are."""
        if times == 1:
            return self
        more = {
            name: getattr(self, name).repeat_interleave(times, dim=0)
            for name in ("images", "columns", "places", "text", "text_valid")
        }
        numbers = tuple(row * times + i for row in self.row_numbers for i in range(times))
        rows = torch.tensor(numbers, device=self.rows.device)
        return replace(self, rows=rows, row_numbers=numbers, **more)


@dataclass(frozen=True)
class Stayed:
    """What stayed of a group before a layer.

    Args:
        layer: its number. images: [I] see `Group`.
        places: [I, K] see `Group`; where tokens were merged, those of their anchors.
        valid: [I, K] bool; None where all count.
    """

    layer: int
    images: Tensor
    places: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class LayerPlan:
    """What will be dropped of one prompt inside the language model.

    Args:
        pruner: the one that chooses; its groups have it with the budgets of their rows.
        groups: its images.
        layers: before which tokens are dropped, ascending.
        mask: [B, L'] bool, False on padding.
        last: [B] the column of each row's last token.
        lengths: real columns of each row.
        pads_right: on which side padding is.
        renumber: whether what stays is numbered again, see `LayerPruner.positions`.
        tower: what the vision tower gave of all images, where the pruner reads it.
        kept: what stayed, stage after stage, once the language model has read the prompt.
    """

    pruner: LayerPruner
    groups: tuple[Group, ...]
    layers: tuple[int, ...]
    mask: Tensor
    last: Tensor
    lengths: tuple[int, ...]
    pads_right: bool
    renumber: bool
    tower: VisualTokens | None
    kept: list[Stayed] = field(default_factory=list)

    def repeat(self, rows: int) -> LayerPlan:
        """The plan for a batch that holds every row several times, as beams do."""
        times, rest = divmod(rows, len(self.mask))
        assert not rest, (rows, len(self.mask))
        if times == 1:
            return self
        return replace(
            self,
            groups=tuple(group.repeat(times) for group in self.groups),
            mask=self.mask.repeat_interleave(times, dim=0),
            last=self.last.repeat_interleave(times),
            lengths=tuple(length for length in self.lengths for _ in range(times)),
        )

    def summary(self) -> list[dict[str, Any]]:
        """What stays before each layer, image by image (this waits for the device).

        Before the language model has read the prompt, that is what the schedule says.
        """
        kept: dict[int, dict[int, int]] = {layer: {} for layer in self.layers}
        for group in self.groups:
            for stage in group.schedule:
                kept[stage.layer] |= dict.fromkeys(group.images.tolist(), stage.num_keep)
        for stayed in self.kept:
            counts = [stayed.places.shape[1]] * len(stayed.images)
            if stayed.valid is not None:
                counts = stayed.valid.sum(dim=1).tolist()
            kept[stayed.layer] |= dict(zip(stayed.images.tolist(), counts, strict=True))
        return [
            {"layer": layer, "visual_tokens_kept": [count for _, count in sorted(counts.items())]}
            for layer, counts in kept.items()
        ]


def plan_layers(
    pruner: LayerPruner,
    num_layers: int,
    image: Tensor,
    places: Tensor,
    mask: Tensor,
    renumber: bool,
    tower: VisualTokens | None = None,
    of_rows: Sequence[LayerPruner] | None = None,
) -> LayerPlan:
    """Group the images of a prompt and look up their schedules.

    Args:
        pruner: of stage `llm_layers`.
        num_layers: of the language model.
        image: [B, L'] the number of the image that each column is of, -1 for text and padding;
            numbers ascend along the rows, one after the other.
        places: [B, L'] which of the image's tokens it is.
        mask: [B, L'] bool, False on padding.
        tower: what the vision tower gave of all images, where the pruner reads it.
        renumber: whether what stays is numbered again.
        of_rows: [B] the pruner with the budget of each row; None for `pruner` in all.

    Raises:
        ValueError: if the language model has no such layers, or the budget cannot be met.
    """
    numbers, real = image.cpu(), mask.cpu()
    _check_images(pruner, tower, int(numbers.max()) + 1)
    pruners = [pruner] * len(real) if of_rows is None else of_rows
    groups = _groups(pruners, num_layers, numbers, places, real)
    layers = {tuple(stage.layer for stage in group.schedule) for group in groups}
    assert len(layers) <= 1, layers
    width = torch.arange(real.shape[1])
    return LayerPlan(
        pruner=pruner,
        groups=groups,
        layers=layers.pop() if layers else (),
        mask=mask,
        last=(width * real).argmax(dim=1).to(image.device),
        lengths=tuple(real.sum(dim=1).tolist()),
        pads_right=bool((real[:, 0] & ~real[:, -1]).any()),
        renumber=renumber,
        tower=tower,
    )


def _groups(
    pruners: Sequence[LayerPruner], num_layers: int, numbers: Tensor, places: Tensor, real: Tensor
) -> tuple[Group, ...]:
    """The images by their number of tokens and by the pruner of their row.

    `places` may be on a device, the rest is not.
    """
    device, groups = places.device, []
    slots = (numbers >= 0).nonzero()  # [T, 2], image after image
    names, counts = numbers[numbers >= 0].unique_consecutive(return_counts=True)
    first = counts.cumsum(dim=0) - counts
    own = [pruners[row] for row in slots[first, 0].tolist()]
    kinds = list(dict.fromkeys(own))
    kind_of = torch.tensor([kinds.index(pruner) for pruner in own])
    found = torch.stack([counts, kind_of], dim=1).unique(dim=0).tolist() if own else []
    for size, kind in found:
        mine = (counts == size) & (kind_of == kind)
        tokens = slots[mine.repeat_interleave(counts)].view(-1, size, 2)
        rows, columns = tokens[:, 0, 0], tokens[:, :, 1]
        text, text_valid = text_after(numbers[rows], real[rows], columns[:, -1:])
        groups.append(
            Group(
                pruner=kinds[kind],
                schedule=kinds[kind].schedule(num_layers, size),
                images=names[mine].to(device),
                rows=rows.to(device),
                row_numbers=tuple(rows.tolist()),
                columns=columns.to(device),
                places=places[rows[:, None].to(device), columns.to(device)],
                text=text.to(device),
                text_valid=text_valid.to(device),
            )
        )
    return tuple(groups)


def text_after(numbers: Tensor, real: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The text after an image; all text, where none is after it.

    Args:
        numbers: [I, L'] below 0 on text. real: [I, L'] bool, False on padding.
        last: [I, 1] the image's last column.

    Returns:
        [I, M] columns, and [I, M] bool which of them count.
    """
    width = torch.arange(numbers.shape[1], device=numbers.device)
    text = real & (numbers < 0)
    after = text & (width > last)
    text = torch.where(after.any(dim=1, keepdim=True), after, text)
    most = int(text.sum(dim=1).max())
    order = text.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, text.gather(1, order)


def _check_images(pruner: LayerPruner, tower: VisualTokens | None, num_images: int) -> None:
    """Refuse tiles where images are looked up.

    Raises:
        ValueError: that names the setting.
    """
    if tower is not None and tower.batch_size != num_images:
        raise ValueError(
            f"{pruner.name} looks up inside the language model, image by image, what the vision"
            f" tower said, but is shown {tower.batch_size} tiles one by one; pass"
            " budget='per_image'."
        )
