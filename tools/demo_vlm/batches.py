"""Batches of drawn scenes with what the stages learn from them.

N are the patches of an image, Q the questions on it, L the words of the longest. Scene i of a stage
is always the same, so that a training that was stopped continues with the batch that it had not
seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ocvtp.choices import Split
from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.questions import SIZES, Question, ask
from ocvtp.data.scenes import LEVELS, Scene, draw_scene, split_seed
from tools.demo_vlm.processor import AFTER_QUESTION
from tools.demo_vlm.settings import ModelSettings, StageSettings

IGNORE = -100
MAX_PER_SHAPE = 4  # counts above it are one class of the tower's own loss
LEAST_COVER = 0.22  # part of a patch from which on it shows an object

_STAGE_SCENES = 10**8  # more than a stage draws
_QUESTIONS = 1  # a stream of random numbers beside that of the drawing


@dataclass
class Batch:
    """What a step reads.

    Args:
        pixel_values: [B, 3, H, W] in -1..1, what the processor makes of the images.
        shape: [B, N] 0 for background, then 1 + the number in `SHAPES`. colour, size: [B, N] the
            numbers in `COLOURS` and `SIZES`, `IGNORE` for background.
        kinds: [B, shapes x colours x sizes] 1 for what the scene has. counts: [B, shapes] objects
            of each shape, at most `MAX_PER_SHAPE`.
        words: [B, Q, L] token numbers of question and answer, padded.
        answer_at: [B, Q] the position of the answer in `words`. answer: [B, Q] its token number.
    """

    pixel_values: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    kinds: Tensor
    counts: Tensor
    words: Tensor
    answer_at: Tensor
    answer: Tensor

    def to(self, device: str) -> Batch:
        """The same on a device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


class QuestionEncoder:
    """Token numbers of what follows the image: the question as it is prompted, and its answer.

    Args:
        tokenizer: of the model.
        english: the questions in English, else terse.
    """

    def __init__(self, tokenizer: Any, english: bool) -> None:
        self.tokenizer = tokenizer
        self.english = english
        self._known: dict[str, list[int]] = {}

    def __call__(self, question: Question) -> list[int]:
        """Question, then the answer's token."""
        text = f"{question.text} {AFTER_QUESTION}" if self.english else question.terse
        text = f"{text} {question.answer}"
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


class StageScenes(Dataset[dict[str, Tensor]]):
    """The scenes of a stage, with labels and questions.

    Args:
        model: sizes.
        stage: what is asked for.
        number: of the stage, which makes its scenes its own.
        seed: of the whole training.
        encoder: of the questions.
        split: of the scenes.
        num_scenes: how many there are.
    """

    def __init__(
        self,
        model: ModelSettings,
        stage: StageSettings,
        number: int,
        seed: int,
        encoder: QuestionEncoder,
        split: Split,
        num_scenes: int,
    ) -> None:
        self.model = model
        self.stage = stage
        self.first = number * _STAGE_SCENES
        self.seed = split_seed(split, seed)
        self.encoder = encoder
        self.num_scenes = num_scenes

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors of `Batch` without B; `words` as lists."""
        rng = np.random.default_rng([self.seed, self.first + index, _QUESTIONS])
        hard = rng.random() < self.stage.hard
        scene = draw_scene(
            self.seed,
            self.first + index,
            self.model.image_size,
            None if hard else self.stage.num_objects,
            LEVELS["hard" if hard else "easy"],
        )
        questions = ask(scene.objects, self.stage.questions, rng)
        item: dict[str, Any] = patch_labels(scene, self.model.patch_size)
        item |= image_labels(scene)
        item["pixel_values"] = to_pixels(scene.image)
        item["words"] = [self.encoder(question) for question in questions]
        return item


def to_pixels(image: NDArray[np.uint8]) -> Tensor:
    """[H, W, 3] grey levels -> [3, H, W] float32 in -1..1, as the processor has them."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    return (pixels / 255 - 0.5) / 0.5


def patch_labels(scene: Scene, patch: int) -> dict[str, Tensor]:
    """[N] shape, colour and size of the object that covers most of each patch."""
    side = len(scene.image) // patch
    masks = np.stack([item.mask for item in scene.objects])  # [O, H, W]
    cover = masks.reshape(-1, side, patch, side, patch).mean((2, 4)).reshape(len(masks), -1)
    owner = torch.from_numpy(cover.argmax(0))
    shown = torch.from_numpy(cover.max(0) >= LEAST_COVER)
    numbers = torch.tensor([_numbers(item) for item in scene.objects])[owner]  # [N, 3]
    shape, colour, size = numbers.unbind(1)
    return {
        "shape": torch.where(shown, shape + 1, 0),
        "colour": torch.where(shown, colour, IGNORE),
        "size": torch.where(shown, size, IGNORE),
    }


def image_labels(scene: Scene) -> dict[str, Tensor]:
    """`kinds` and `counts` of `Batch`, of one scene."""
    kinds = torch.zeros(len(SHAPES), len(COLOURS), len(SIZES))
    counts = torch.zeros(len(SHAPES), dtype=torch.long)
    for item in scene.objects:
        shape, colour, size = _numbers(item)
        kinds[shape, colour, size] = 1
        counts[shape] += 1
    return {"kinds": kinds.flatten(), "counts": counts.clamp(max=MAX_PER_SHAPE)}


def _numbers(item: Any) -> tuple[int, int, int]:
    """Of shape, colour and size."""
    return SHAPES.index(item.shape), list(COLOURS).index(item.colour), SIZES.index(item.size)


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """Stack scenes; the questions are padded with 0 to the longest."""
    asked = [words for item in items for words in item["words"]]
    num_questions = len(items[0]["words"])
    words = torch.zeros(len(asked), max(map(len, asked), default=1), dtype=torch.long)
    for row, numbers in zip(words, asked, strict=True):
        row[: len(numbers)] = torch.tensor(numbers)
    at = torch.tensor([len(numbers) - 1 for numbers in asked], dtype=torch.long)
    answer = torch.tensor([numbers[-1] for numbers in asked], dtype=torch.long)
    shape = (len(items), num_questions)
    stacked = {
        name: torch.stack([item[name] for item in items]) for name in items[0] if name != "words"
    }
    return Batch(
        **stacked,
        words=words.reshape(*shape, -1) if asked else words.new_zeros(*shape, 1),
        answer_at=at.reshape(shape),
        answer=answer.reshape(shape),
    )


def batches(
    scenes: StageScenes, batch_size: int, first: int = 0, num_workers: int = 0
) -> Iterator[Batch]:
    """The batches of a stage in order, from number `first` on."""
    indices = range(first * batch_size, len(scenes))
    loader = DataLoader(
        scenes,
        batch_size,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=collate,
        drop_last=True,
    )
    return iter(loader)
