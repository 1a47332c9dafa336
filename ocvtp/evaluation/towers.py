"""A vision tower that pruners are judged on without a language model.

What a pruner sees of it is what a VLM with this tower shows it, as far as the tower alone can tell.
Projected tokens are the tower's own, as if the projector changed nothing.
B images of a batch, each one grid of N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ocvtp.choices import Positions
from ocvtp.encoders.base import DType, FrozenEncoder
from ocvtp.encoders.loading import build_encoder, source_of
from ocvtp.evaluation.conditions import content_hash
from ocvtp.evaluation.judged import Judged
from ocvtp.evaluation.tasks.base import Item, PlaceTask, Record, Task
from ocvtp.evaluation.tasks.kept_tokens import kept_of_tower
from ocvtp.evaluation.tasks.object_cells import Sight, sight_of_encoder
from ocvtp.hosts.loading import check_place
from ocvtp.hosts.prompt.checks import beyond, check_selection
from ocvtp.pruners import Compose, Pruner
from ocvtp.pruners.base import naming
from ocvtp.structures import Needs, VisualTokens
from ocvtp.towers.joined_needs import covers, joined, only

PROJECTED = "the tower's own, as there is no projector"
"""What a pruner on a tower alone is given as projected tokens."""


class TowerSubject(Judged):
    """A vision tower whose tokens pruners choose from.

    Args:
        name: see `ocvtp.encoders.loading.build_encoder`.
        img_size: pixels along the side of its picture; None for the tower's own.
        feature_layer: number of `hidden_states` that would go to the language model; see there.
        dtype: `auto` (float32), `float32`, `bfloat16` or `float16`.
        device: where it runs.

    Raises:
        ValueError: if there is no such tower, layer, size, dtype or device.
    """

    def __init__(
        self,
        name: str,
        img_size: int | None = None,
        feature_layer: int | None = None,
        dtype: DType | str = "auto",
        device: str = "cpu",
    ) -> None:
        check_place(dtype, device)
        self.name = name
        precision: Any = "float32" if dtype == "auto" else dtype
        self.encoder = build_encoder(name, feature_layer, img_size, precision)
        self._device = torch.device(device)
        self._loaded: dict[Needs, FrozenEncoder] = {}

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def num_tower_blocks(self) -> int:
        return self.encoder.depth

    @cached_property
    def sight(self) -> Sight:
        """How it sees images."""
        return sight_of_encoder(self.encoder)

    def settings(self) -> dict[str, Any]:
        return {
            "tower": self.name,
            "tower_weights": content_hash(source_of(self.name)),
            "grid": list(self.encoder.grid_hw),
            "feature_layer": self.encoder.layer,
            "projected_tokens": PROJECTED,
            "dtype": str(self.dtype),
        }

    def check(self, task: Task) -> None:
        refuse_questions(type(task))

    def fits(self, pruner: Pruner | Compose) -> None:
        """Refuse a pruner that a tower alone does not show what it would keep.

        Raises:
            ValueError: that says why, and what to do.
        """
        for part in pruner.parts:
            if part.stage != "llm_input":
                raise ValueError(
                    f"pruner {pruner.name!r} acts at stage {part.stage!r}; on a tower alone those"
                    " of stage 'llm_input' are judged: pass a VLM (--model) for it."
                )
        needs = pruner.tower_needs
        if needs.text or needs.clip:
            raise ValueError(
                f"pruner {pruner.name!r} reads the prompt, which a tower alone has not; pass a VLM"
                " (--model) for it, or an option of the pruner that does not read this."
            )
        with naming(pruner.name):
            self.encoder.check(needs)
        if why := beyond(self.encoder.grid_hw[0] * self.encoder.grid_hw[1], pruner):
            raise ValueError(why)

    def note(self, pruner: Pruner | Compose) -> str:
        return f"projected tokens: {PROJECTED}" if pruner.tower_needs.projected else ""

    def shape(self, task: Task) -> tuple[int, tuple[int, int]]:
        del task
        height, width = self.encoder.grid_hw
        return height * width, (height, width)

    def width(self, task: Task, layer: int) -> int:
        del task, layer
        return self.encoder.feature_dim

    def seen(self, task: Task, owner: int) -> NDArray[np.bool_]:
        masks = task.masks(owner)
        assert masks is not None
        return self.sight.seen(masks, task.image(owner).size)

    def inputs(self, task: Task, items: Sequence[Item], owners: Sequence[int]) -> Tensor:
        """[B, 3, H, W] the pictures of `owners`; what is asked about them is not read."""
        del items
        return self.pictures([task.image(owner) for owner in owners])

    def pictures(self, images: Sequence[Any]) -> Tensor:
        """[B, 3, H, W] RGB images as the tower's own transform makes them.

        Raises:
            ValueError: if a picture is not of the tower's one size, or is cut into tiles.
        """
        made = [self.encoder.transform(image) for image in images]
        patch, grid = self.encoder.patch_size, self.encoder.grid_hw
        for picture in made:
            shape = tuple(picture.shape)
            if len(shape) != 3 or (shape[1] // patch, shape[2] // patch) != grid:
                raise ValueError(
                    f"the image processor of {self.name!r} makes a picture of shape {shape}, which"
                    f" is not one grid of {grid[0]} x {grid[1]} patches of {patch} pixels; pass a"
                    " tower whose processor cuts every image to its one size."
                )
        return torch.stack(made).to(self.device)

    def sharing(self, pruners: Sequence[Pruner | Compose]) -> TowerEncodings:
        """See `Judged`; pruners that do not fit are left out."""
        needs = []
        for pruner in pruners:
            try:
                self.fits(pruner)
            except ValueError:
                continue
            needs.append(pruner.tower_needs)
        return TowerEncodings(self, joined(needs))

    def loaded(self, needs: Needs) -> FrozenEncoder:
        """The tower with what is needed, and the layer of the features first; read once.

        Projected tokens are left out: they are nothing that it makes.
        """
        needs = replace(needs, projected=False)
        known = next((own for own in self._loaded if covers(own, needs)), None)
        if known is not None:
            needs = known
        else:
            layers = tuple(dict.fromkeys((self.encoder.layer, *needs.hidden)))
            encoder = deepcopy(self.encoder).load(replace(needs, hidden=layers))
            self._loaded[needs] = encoder.to(self.device)
        return self._loaded[needs]

    @torch.no_grad()
    def attempt(self, pruner: Pruner | Compose, inputs: Tensor, shared: TowerEncodings) -> None:
        self.fits(pruner)
        with naming(pruner.name):
            pruner.parts[0].select(shared.tokens(inputs, pruner.tower_needs))

    @torch.no_grad()
    def observe(
        self,
        task: Task,
        items: Sequence[Item],
        pruner: Pruner | Compose,
        inputs: Tensor,
        shared: TowerEncodings,
        positions: Positions | None = None,
    ) -> list[Record]:
        del positions  # no language model reads the tokens
        assert isinstance(task, PlaceTask)
        (part,) = pruner.parts
        tokens = shared.tokens(inputs, pruner.tower_needs)
        selection = part.select(tokens)
        check_selection(part, tokens, selection)
        kept = kept_of_tower(tokens, selection, tuple(inputs.shape[-2:]), self.sight)
        counts = selection.counts().tolist()
        found = task.judge(kept, items)
        return [
            {**record, "given": tokens.num_tokens, "kept": float(count)}
            for record, count in zip(found, counts, strict=True)
        ]


class TowerEncodings:
    """What a tower made of the last pictures, for all pruners that may read it.

    It runs once for all of them; once more for those that mean another thing by `received`
    attention.

    Args:
        subject: the tower.
        unions: what to look for at once.
    """

    def __init__(self, subject: TowerSubject, unions: Sequence[Needs]) -> None:
        self._subject, self._unions = subject, tuple(unions)
        self.num_encoded = 0
        """How often pictures were encoded."""
        self._last: Tensor | None = None
        self._made: dict[Needs, VisualTokens] = {}

    def tokens(self, pictures: Tensor, needs: Needs) -> VisualTokens:
        """The tokens of pictures with just what is needed.

        Args:
            pictures: [B, 3, H, W]; the same tensor is not encoded again.
            needs: of one of the pruners that this was made for.
        """
        union = next(union for union in self._unions if covers(union, needs))
        if pictures is not self._last:
            self._last, self._made = pictures, {}
        if union not in self._made:
            made = self._subject.loaded(union)(pictures)
            self._made[union] = replace(made, projected=made.features) if union.projected else made
            self.num_encoded += 1
        return only(self._made[union], needs)


def refuse_questions(task: type[Task]) -> None:
    """Refuse tasks that a vision tower alone cannot be judged by.

    Raises:
        ValueError: if the task is none of places.
    """
    if not issubclass(task, PlaceTask):
        raise ValueError(
            f"--task {task.name} asks a language model, which a tower alone has not; pass a VLM"
            " (--model), or a task that looks at the tokens that are kept: coverage."
        )
