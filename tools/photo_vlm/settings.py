"""The settings of `python -m tools.photo_vlm`."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.demo_vlm.settings import StageSettings
from tools.photo_vlm.cutouts import CutoutRule


def default_stages() -> list[StageSettings]:
    """Words for patches, terse questions, fewer and fewer tokens, English."""
    return [
        StageSettings("words", 400, align=1.0, warmup=50),
        StageSettings(
            "terse", 500, align=0.3, answer=1.0, questions=16, drop=0.8, fresh_attention=True
        ),
        StageSettings(
            "drop", 400, learning_rate=1e-3, align=0.3, answer=1.0, questions=16, drop=0.8
        ),
        StageSettings(
            "english",
            400,
            learning_rate=1e-3,
            align=0.3,
            answer=1.0,
            questions=16,
            prompts="english",
            drop=0.7,
        ),
    ]


@dataclass(frozen=True)
class ReaderSettings:
    """Sizes of the language model.

    Args:
        text_dim: its width. text_layers: its depth. num_heads: of its attention.
    """

    text_dim: int = 128
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
        stages: of the training, see `StageSettings`; what is about drawn scenes is not used.
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
    stages: list[StageSettings] = field(default_factory=default_stages)
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to learn or to ask."""
        if min(self.num_train, self.num_test, self.questions) < 1:
            raise ValueError(
                f"num_train={self.num_train}, num_test={self.num_test},"
                f" questions={self.questions}; pass at least 1 of each."
            )
