"""The settings of `ocvtp demo-vlm`, read from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentError, ArgumentParser

from ocvtp.choices import Level, Split
from ocvtp.data.scenes import MIN_SIZE
from ocvtp.shipped import find_config


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of the model.

    Args:
        image_size: pixels of an edge. patch_size: of a patch; their ratio squared is the number of
            visual tokens.
        tower_dim: width of the vision tower. tower_layers: its depth; the language model reads the
            last layer but one.
        text_dim: width of the language model. text_layers: its depth.
        num_heads: of attention, in both.
    """

    image_size: int = 96
    patch_size: int = 8
    tower_dim: int = 96
    tower_layers: int = 5
    text_dim: int = 128
    text_layers: int = 3
    num_heads: int = 4

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.image_size < MIN_SIZE or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size}, patch_size={self.patch_size}: pass an image_size of"
                f" at least {MIN_SIZE} that the patch_size divides."
            )
        for name in ("tower_dim", "text_dim"):
            if getattr(self, name) % (2 * self.num_heads):
                raise ValueError(
                    f"{name}={getattr(self, name)} does not split into {self.num_heads} heads of"
                    " even width; pass a multiple of twice num_heads."
                )

    @property
    def side(self) -> int:
        """Patches along an edge."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class StageSettings:
    """One stage of the training; what has weight 0 is not trained.

    Args:
        name: of the stage.
        steps: of the optimiser.
        batch_size: images a step.
        learning_rate: of projector and language model. tower_learning_rate: of the vision tower,
            which is frozen at 0.
        warmup: steps in which the rates rise. hold: share of the steps after which they fall, on a
            cosine to 2%.
        dense: weight of the tower's own loss: shape, colour and size of every patch, and of the
            whole image from the CLS.
        align: weight of the loss that brings a patch's projection near the words for it.
        answer: weight of the loss of the answers. questions: on each image.
        prompts: `terse` ("colour small circle") or `english`.
        drop: share of the steps in which the language model reads a random part of the tokens.
        fresh_attention: begin with equal, orthogonal query and key weights, so that equal words and
            patches find each other.
        num_objects: least and greatest number in a scene of the level `easy`.
        hard: share of the scenes that are of the level `hard`.
    """

    name: str
    steps: int
    batch_size: int = 16
    learning_rate: float = 2e-3
    tower_learning_rate: float = 0.0
    warmup: int = 100
    hold: float = 0.3
    dense: float = 0.0
    align: float = 0.0
    answer: float = 0.0
    questions: int = 0
    prompts: Literal["terse", "english"] = "terse"
    drop: float = 0.0
    fresh_attention: bool = False
    num_objects: tuple[int, int] = (3, 6)
    hard: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"stage {self.name!r}: steps={self.steps}, batch_size={self.batch_size}; pass at"
                " least 1 of each."
            )
        if bool(self.answer) != bool(self.questions):
            raise ValueError(
                f"stage {self.name!r}: answer={self.answer} with questions={self.questions}; pass"
                " both, or 0 for both."
            )
        if not (self.dense or self.align or self.answer):
            raise ValueError(f"stage {self.name!r} has no loss; pass dense, align or answer.")
        for name in ("drop", "hard", "hold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"stage {self.name!r}: {name}={getattr(self, name)} is no share; pass 0 to 1."
                )


@dataclass(frozen=True)
class TextTowerSettings:
    """A CLIP text tower that is trained against the finished, frozen vision tower.

    Args:
        steps: of the optimiser.
        batch_size: scenes a step, each with one of its captions.
        learning_rate: at its highest.
        warmup: steps in which it rises. hold: share of the steps after which it falls, on a cosine.
        dim: width of the text tower. layers: its depth. num_heads: of its attention.
        shared_dim: width of the space that images and texts share.
        max_length: tokens of a text, BOS and EOS included.
        num_objects: least and greatest number in a scene of the level `easy`.
        hard: share of the scenes that are of the level `hard`.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 50
    hold: float = 0.3
    dim: int = 64
    layers: int = 2
    num_heads: int = 4
    shared_dim: int = 64
    max_length: int = 16
    num_objects: tuple[int, int] = (1, 6)
    hard: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.steps < 1 or self.batch_size < 2:
            raise ValueError(
                f"text_tower: steps={self.steps}, batch_size={self.batch_size}; pass at least 1"
                " step of 2 scenes, which are told from each other."
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"text_tower: dim={self.dim} does not split into {self.num_heads} heads; pass a"
                " multiple of num_heads."
            )

    @property
    def stage(self) -> StageSettings:
        """How its scenes are drawn and its learning rate runs."""
        return StageSettings(
            "text tower",
            self.steps,
            self.batch_size,
            warmup=self.warmup,
            hold=self.hold,
            dense=1.0,
            num_objects=self.num_objects,
            hard=self.hard,
        )


@dataclass(frozen=True)
class ReportSettings:
    """What the model card's figures are measured on.

    Args:
        split: of the scenes; `test` only for figures that are reported, never to choose by.
        num_images: scenes of each level. questions: on each, at most.
        levels: of the scenes.
    """

    split: Split = "val"
    num_images: int = 300
    questions: int = 8
    levels: tuple[Level, ...] = ("easy", "hard")


@dataclass(frozen=True)
class DemoSettings:
    """The whole recipe.

    Args:
        output: folder of the model; the state of the training is in `training/` there.
        model: sizes.
        stages: in order.
        text_tower: that is trained last, against the finished vision tower; None: there is none.
        report: of the card.
        seed: of weights, scenes and questions.
        device: e.g. `cpu`, `cuda`.
        bfloat16: compute in bfloat16; weights stay in float32 until they are saved.
        num_workers: processes that draw; 0 draws in the training process.
        checkpoint_every: steps between two checkpoints.
    """

    output: str
    stages: list[StageSettings]
    model: ModelSettings = ModelSettings()
    text_tower: TextTowerSettings | None = None
    report: ReportSettings = ReportSettings()
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = False
    num_workers: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        """Refuse a recipe without stages, or with two of one name."""
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages={names}: pass at least one, each with a name of its own.")


def load_settings(path: str | Path) -> DemoSettings:
    """Read a file of settings, or those that come with the package under a name, e.g. `cpu`.

    Raises:
        ValueError: if there is no such file, or if it does not hold such settings.
    """
    found = find_config(str(path), "demo_vlm")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DemoSettings)
    try:
        values = parser.parse_path(found).as_dict()
    except ArgumentError as error:
        raise ValueError(f"--config {path} does not parse: {error}") from error
    stages = [StageSettings(**stage) for stage in values["stages"]]
    text_tower = values["text_tower"]
    parts = {
        "model": ModelSettings(**values["model"]),
        "report": ReportSettings(**values["report"]),
        "text_tower": TextTowerSettings(**text_tower) if text_tower else None,
    }
    return DemoSettings(**{**values, "stages": stages, **parts})
