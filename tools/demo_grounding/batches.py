"""What is read in each step: drawn scenes, and conversations about them.

B scenes of N patches, Q conversations about each. Step i of a training always reads the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ocvtp.choices import Split
from ocvtp.data.grounding import PROMPT, corners, seek
from ocvtp.data.questions import ask
from ocvtp.data.scenes import Scene, draw_scene, split_seed
from ocvtp.evaluation.oracle import on_cells
from tools.demo_grounding.conversations import STEP, ConversationEncoder, Read, Turn, box_answer
from tools.demo_vlm.batches import IGNORE, LEAST_COVER, patch_labels, to_pixels

Kind = Literal["alone", "turns"]
SCENES = {"tower": 32, "alone": 16, "turns": 14}
"""Of a step: of the tower's own stage, with questions alone, and with some in turn."""
_CONVERSATIONS = {"alone": (9, 1), "turns": (4, 3)}
"""About each scene, and turns of each."""
_BOX_SHARE = 0.5  # of the turns
_NUM_OBJECTS = (3, 7)
_STREAM = 4  # of random numbers, beside those of drawing
_FIRST_SCENE = 50 * 10**8  # beyond those that the demo VLM has read
_FIRST_TOWER_SCENE = 60 * 10**8


@dataclass
class PatchLabels:
    """Shape, colour and size [B, N] of what patches show, as in the demo VLM's `Batch`."""

    shape: Tensor
    colour: Tensor
    size: Tensor

    def at(self, places: Tensor) -> PatchLabels:
        """Those of some patches, [B, K]."""
        return PatchLabels(*(value.gather(1, places) for value in vars(self).values()))


@dataclass
class Batch:
    """What a step reads.

    Args:
        pixel_values: [B, 3, H, W] in -1..1.
        owner: [B, N] number of the object that each patch shows, `IGNORE` where it shows none.
        edges: [B, N, 4] the coordinates of its box, in `STEP` pixels.
        labels: of [B, N], what the demo VLM's `align_loss` asks for.
        read: of [B, Q, L], see `Read`.
    """

    pixel_values: Tensor
    owner: Tensor
    edges: Tensor
    labels: PatchLabels
    read: Read


def draw_batch(
    encoder: ConversationEncoder,
    step: int,
    seed: int,
    size: int,
    patch: int,
    kind: Kind,
    split: Split = "train",
) -> Batch:
    """The batch of a step."""
    stream, count = split_seed(split, seed), SCENES[kind]
    first = _FIRST_SCENE + step * max(SCENES.values())
    scenes = [draw_scene(stream, first + n, size, _NUM_OBJECTS) for n in range(count)]
    reads = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([stream, first + number, _STREAM])
        reads.append(encoder(_conversations(scene, rng, kind)))
    boxes, owner = zip(*(_patches(scene, patch) for scene in scenes), strict=True)
    edges = (torch.stack(boxes) * (size / STEP)).round().long()
    found = [patch_labels(scene, patch) for scene in scenes]
    labels = PatchLabels(
        *(torch.stack([one[name] for one in found]) for name in ("shape", "colour", "size"))
    )
    return Batch(_pixels(scenes), torch.stack(owner), edges, labels, _joined(reads))


@dataclass
class TowerBatch:
    """What a step of the tower's own stage reads.

    Args:
        pixel_values: [B, 3, H, W] in -1..1.
        boxes: [B, N, 4] of the object that covers most of each patch, in parts of the image.
        shown: [B, N] bool, whether any covers enough of it.
    """

    pixel_values: Tensor
    boxes: Tensor
    shown: Tensor


def draw_tower_batch(
    step: int, seed: int, size: int, patch: int, split: Split = "train"
) -> TowerBatch:
    """The batch of a step of the tower's own stage."""
    stream, count = split_seed(split, seed), SCENES["tower"]
    first = _FIRST_TOWER_SCENE + step * count
    scenes = [draw_scene(stream, first + n, size, _NUM_OBJECTS) for n in range(count)]
    boxes, owner = zip(*(_patches(scene, patch) for scene in scenes), strict=True)
    return TowerBatch(_pixels(scenes), torch.stack(boxes), torch.stack(owner) != IGNORE)


def _pixels(scenes: Sequence[Scene]) -> Tensor:
    return torch.stack([to_pixels(scene.image) for scene in scenes])


def _patches(scene: Scene, patch: int) -> tuple[Tensor, Tensor]:
    """[N, 4] and [N]: `boxes` of a `TowerBatch`, and `owner` of a `Batch`."""
    edge = len(scene.image)
    cells = on_cells(np.stack([item.mask for item in scene.objects]), (edge // patch,) * 2)
    boxes = torch.tensor([corners(item.box) for item in scene.objects]) / edge
    cover, owner = torch.from_numpy(cells).max(0)
    return boxes[owner], torch.where(cover >= LEAST_COVER, owner, IGNORE)


def _conversations(scene: Scene, rng: np.random.Generator, kind: Kind) -> list[list[Turn]]:
    """Boxes and the demo VLM's own questions, mixed; as many of every scene."""
    num, turns = _CONVERSATIONS[kind]
    boxes = _boxes(scene, rng)
    asked = ask(scene.objects, num * turns, rng)
    mixed = [Turn(one.text, one.answer) for one in asked]
    for count, place in enumerate((rng.random(len(mixed)) < _BOX_SHARE).nonzero()[0].tolist()):
        if boxes:  # objects may all be alike
            mixed[place] = boxes[count % len(boxes)]
    return [mixed[first : first + turns] for first in range(0, len(mixed), turns)]


def _boxes(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """One of every object that can be asked for."""
    numbers = {corners(item.box): number for number, item in enumerate(scene.objects)}
    return [
        Turn(PROMPT.format(object=one.name), box_answer(one.box), numbers[one.box])
        for one in seek(scene.objects, len(scene.objects), rng)
    ]


def _joined(reads: Sequence[Read]) -> Read:
    """[B, Q, L] of the scenes' own [Q, L]."""
    length = max(read.words.shape[1] for read in reads)

    def stacked(name: str, fill: int) -> Tensor:
        parts = [getattr(read, name) for read in reads]
        return torch.stack([F.pad(p, (0, length - p.shape[1]), value=fill) for p in parts])

    return Read(
        stacked("words", 0),
        stacked("targets", IGNORE),
        stacked("about", IGNORE),
        stacked("names", IGNORE),
    )
