"""How well a LLaVA answers questions on drawn scenes, through its own processor and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ocvtp.data.questions import KINDS, Question, ask
from ocvtp.data.scenes import Level, draw_scene, scene_style, split_seed
from ocvtp.demo_vlm.settings import ReportSettings

EVEN = dict.fromkeys(KINDS, 0.25)

_BATCH = 64
_RESAMPLES = 2000
_QUESTIONS = 2  # a stream of random numbers beside those of drawing and training


@dataclass(frozen=True)
class Figure:
    """A share of right answers.

    Args:
        accuracy: the share. low, high: its 95% interval, by a bootstrap over images.
        num_questions: that were asked. num_images: on how many images.
    """

    accuracy: float
    low: float
    high: float
    num_questions: int
    num_images: int


def measure(
    model: Any, processor: Any, level: Level, report: ReportSettings, size: int, seed: int
) -> dict[str, Figure]:
    """Exact matches of the answers, by kind, for `all` kinds, and for `all` on `shuffled` images.

    A shuffled image is that of the scene before. Questions are of each kind alike, and no question
    is asked twice on an image.

    Args:
        model: a LLaVA. processor: its own.
        level: of the scenes.
        report: which scenes, how many, and how many questions.
        size: pixels of an edge. seed: of the scenes.
    """
    stream, style = split_seed(report.split, seed), scene_style(level)
    images, asked = [], []
    for index in range(report.num_images):
        scene = draw_scene(stream, index, size, style=style)
        rng = np.random.default_rng([stream, index, _QUESTIONS])
        images.append(Image.fromarray(scene.image))
        asked.append(ask(scene.objects, report.questions, rng, EVEN, distinct=True))
    owners = np.repeat(np.arange(len(images)), [len(questions) for questions in asked])
    flat = [question for questions in asked for question in questions]
    right = _right(model, processor, [images[i] for i in owners], flat)
    wrong_image = [images[i - 1] for i in owners]
    shuffled = _right(model, processor, wrong_image, flat)
    of_kind = {kind: np.array([q.kind == kind for q in flat]) for kind in KINDS}
    figures: dict[str, Figure] = {
        kind: _figure(right[of], owners[of]) for kind, of in of_kind.items() if of.any()
    }
    return {**figures, "all": _figure(right, owners), "shuffled": _figure(shuffled, owners)}


def _right(
    model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[Question]
) -> NDArray[np.bool_]:
    """Whether each question is answered with its answer and nothing else."""
    right = []
    for start in range(0, len(questions), _BATCH):
        some = questions[start : start + _BATCH]
        answers = answer(model, processor, images[start : start + _BATCH], [q.text for q in some])
        right += [found == q.answer for found, q in zip(answers, some, strict=True)]
    return np.array(right)


@torch.no_grad()
def answer(
    model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str]
) -> list[str]:
    """The model's answers in the chat template, greedy, one image and question each."""
    prompts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": question}],
                }
            ],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(
        images=[[image] for image in images], text=prompts, return_tensors="pt", padding=True
    ).to(model.device)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    words = processor.batch_decode(
        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in words]


def _figure(right: NDArray[np.bool_], owners: NDArray[Any]) -> Figure:
    """Accuracy with its interval; questions on one image are drawn together."""
    _, image = np.unique(owners, return_inverse=True)
    number = image.max() + 1
    hits, asked = np.bincount(image, right, number), np.bincount(image, minlength=number)
    drawn = np.random.default_rng(0).integers(number, size=(_RESAMPLES, number))
    shares = hits[drawn].sum(1) / asked[drawn].sum(1)
    low, high = np.quantile(shares, (0.025, 0.975)).tolist()
    return Figure(float(right.mean()), low, high, len(right), int(number))
