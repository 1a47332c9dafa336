"""The settings of `python -m tools.photo_vlm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tools.demo_vlm.settings import StageSettings
from tools.photo_vlm.cutouts import CutoutRule

_STEPS = {"words": 600, "terse": 2400, "drop": 1000, "english": 1200}
_WARMUP = 200


@dataclass(frozen=True)
class PhotoStage(StageSettings):
    """One stage, whose tower is frozen; what is about drawn scenes is not used.

    Args:
        spotlight: tokens of each picture that are read in the steps that `drop` leaves: those on
            objects first, others at random. 0: all.
    """

    spotlight: int = 0


def default_stages(scale: float = 1.0) -> list[PhotoStage]:
    """Words for patches, terse questions, fewer and fewer tokens, English.

    Args:
        scale: of the numbers of steps, above 0; in those of 1 every composite of a training of
            usual size is read some eight times.

    Raises:
        ValueError: if it is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale} trains nothing; pass a number above 0.")
    asked: dict[str, Any] = {"batch_size": 8, "align": 0.3, "answer": 1.0, "questions": 16}
    steps = {name: max(1, round(scale * n)) for name, n in _STEPS.items()}
    warmup = max(1, round(scale * _WARMUP))
    return [
        PhotoStage("words", steps["words"], align=1.0, warmup=warmup),
        PhotoStage(
            "terse", steps["terse"], warmup=warmup, spotlight=160, fresh_attention=True, **asked
        ),
        PhotoStage("drop", steps["drop"], warmup=warmup, learning_rate=1e-3, drop=0.85, **asked),
        PhotoStage(
            "english",
            steps["english"],
            warmup=warmup,
            learning_rate=1e-3,
            prompts="english",
            drop=0.85,
            **asked,
        ),
    ]


@dataclass(frozen=True)
class ReaderSettings:
    """Sizes of the language model.

    Args:
        text_dim: its width. text_layers: its depth. num_heads: of its attention.
    """

    text_dim: int = 160
    text_layers: int = 3
    num_heads: int = 4


@dataclass(frozen=True)
class PhotoSettings:
    """The whole recipe.

    Args:
        coco: folder in COCO's layout. photos: folder of backgrounds. tower: folder of a DINOv2 that
            timm wrote.
        output: folder of everything that is written.
        num_train: composites. num_test: the same, for figures. questions: on each of these.
        size: pixels of an edge, a multiple of the tower's patch.
        rule: which objects are cut out.
        reader: sizes.
        stages: of the training.
        seed: of composites, questions and weights.
        checkpoint_every: steps between two checkpoints.
    """

    coco: str
    photos: str
    tower: str
    output: str
    num_train: int = 6000
    num_test: int = 300
    questions: int = 4
    size: int = 336
    rule: CutoutRule = CutoutRule()
    reader: ReaderSettings = ReaderSettings()
    stages: list[PhotoStage] = field(default_factory=default_stages)
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to learn or to ask."""
        if min(self.num_train, self.num_test, self.questions) < 1:
            raise ValueError(
                f"num_train={self.num_train}, num_test={self.num_test},"
                f" questions={self.questions}; pass at least 1 of each."
            )
