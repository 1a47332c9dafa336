"""What is read in each step: drawn scenes, and conversations about them.

B prompts, I images in each, Q conversations about them. Step i of a training always reads the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ocvtp.data.grounding import PROMPT, corners, seek
from ocvtp.data.questions import ask
from ocvtp.data.scenes import Scene, Split, draw_scene, split_seed
from ocvtp.data.several_images import ask_of_several
from ocvtp.evaluation.oracle import on_cells
from tools.demo_grounding.conversations import ConversationEncoder, Read, Turn, box_answer
from tools.demo_vlm.batches import IGNORE, LEAST_COVER, to_pixels

Kind = Literal["boxes", "turns", "several"]
TERSE: tuple[Kind, ...] = ("boxes", "boxes", "boxes", "several")
CYCLE: tuple[Kind, ...] = ("boxes", "turns", "boxes", "several")
"""What the steps read in turn: while questions are terse, and in English."""
PROMPTS: dict[Kind, int] = {"boxes": 24, "turns": 10, "several": 12}
"""Prompts of a step."""
_ASKED: dict[Kind, int] = {"boxes": 6, "turns": 4, "several": 12}
_IMAGES: dict[Kind, int] = {"boxes": 1, "turns": 1, "several": 2}
_MOST_TURNS = 3
_BOX_SHARE = 0.3  # of the turns
_NUM_OBJECTS = (3, 7)
_STREAM = 4  # of random numbers, beside those of drawing
_FIRST_SCENE = 50 * 10**8  # beyond those that the demo VLM has read
_FIRST_TOWER_SCENE = 60 * 10**8
_TOWER_IMAGES = 32


@dataclass
class Batch:
    """What a step reads.

    Args:
        pixel_values: [B, I, 3, H, W] in -1..1.
        shown: [B, I, N] bool, which patches show an object.
        read: of [B, Q, L], see `Read`.
    """

    pixel_values: Tensor
    shown: Tensor
    read: Read


def draw_batch(
    encoder: ConversationEncoder,
    kind: Kind,
    step: int,
    seed: int,
    size: int,
    patch: int,
    terse: bool = False,
    split: Split = "train",
) -> Batch:
    """The batch of a step; `terse` are questions of a few words."""
    stream = split_seed(split, seed)
    count, images = PROMPTS[kind], _IMAGES[kind]
    pixels, shown, reads = [], [], []
    for number in range(count):
        first = _FIRST_SCENE + (step * max(PROMPTS.values()) + number) * max(_IMAGES.values())
        scenes = [draw_scene(stream, first + image, size, _NUM_OBJECTS) for image in range(images)]
        rng = np.random.default_rng([stream, first, _STREAM])
        pixels.append(torch.stack([to_pixels(scene.image) for scene in scenes]))
        shown.append(torch.stack([_patch_boxes(scene, patch)[1] for scene in scenes]))
        reads.append(encoder(_conversations(kind, scenes, rng, terse), terse))
    return Batch(torch.stack(pixels), torch.stack(shown), _joined(reads))


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
    stream, first = split_seed(split, seed), _FIRST_TOWER_SCENE + step * _TOWER_IMAGES
    scenes = [draw_scene(stream, first + n, size, _NUM_OBJECTS) for n in range(_TOWER_IMAGES)]
    boxes, shown = zip(*(_patch_boxes(scene, patch) for scene in scenes), strict=True)
    pixels = torch.stack([to_pixels(scene.image) for scene in scenes])
    return TowerBatch(pixels, torch.stack(boxes), torch.stack(shown))


def _patch_boxes(scene: Scene, patch: int) -> tuple[Tensor, Tensor]:
    """[N, 4] and [N], see `TowerBatch`."""
    edge = len(scene.image)
    cells = on_cells(np.stack([item.mask for item in scene.objects]), (edge // patch,) * 2)
    boxes = torch.tensor([corners(item.box) for item in scene.objects]) / edge
    cover = torch.from_numpy(cells)
    return boxes[cover.argmax(0)], cover.max(0).values >= LEAST_COVER


def _conversations(
    kind: Kind, scenes: Sequence[Scene], rng: np.random.Generator, terse: bool
) -> list[list[Turn]]:
    """As many of every prompt; some are asked twice where a scene has too few."""
    num = _ASKED[kind]
    if kind == "several":
        found = ask_of_several([scene.objects for scene in scenes], num, rng)
        made = [[Turn(_shortened(one.text) if terse else one.text, one.answer)] for one in found]
    elif kind == "boxes":
        made = [[turn] for turn in _boxes(scenes[0], num, rng, terse)]
    else:
        made = [_talk(scenes[0], rng) for _ in range(num)]
    made = made or [_talk(scenes[0], rng)[:1]]
    return [made[number % len(made)] for number in range(num)]


def _talk(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Questions one after the other, of all kinds."""
    boxes = _boxes(scene, _MOST_TURNS, rng)
    turns = [Turn(one.text, one.answer) for one in ask(scene.objects, _MOST_TURNS, rng)]
    for number, box in enumerate(boxes):
        if rng.random() < _BOX_SHARE:
            turns[number] = box
    return turns


def _boxes(scene: Scene, num: int, rng: np.random.Generator, terse: bool = False) -> list[Turn]:
    prompt = "where {object}" if terse else PROMPT
    sought = seek(scene.objects, num, rng)
    return [Turn(prompt.format(object=one.name), box_answer(one.box), True) for one in sought]


def _shortened(text: str) -> str:
    """`is red circle second`, of a question about one of several images."""
    words = text.removesuffix("?").lower().split()
    return " ".join([words[0], *words[3:5], words[-2]])


def _joined(reads: Sequence[Read]) -> Read:
    """[B, Q, L] of the prompts' own [Q, L]."""
    length = max(read.words.shape[1] for read in reads)

    def stacked(name: str, fill: int) -> Tensor:
        parts = [getattr(read, name) for read in reads]
        return torch.stack([F.pad(p, (0, length - p.shape[1]), value=fill) for p in parts])

    return Read(stacked("words", 0), stacked("targets", IGNORE), stacked("boxes", 0))
