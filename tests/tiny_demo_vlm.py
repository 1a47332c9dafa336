"""The demo VLM at a size that trains in seconds, and what tests read of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from tools.demo_vlm.batches import Batch, QuestionEncoder, StageScenes, collate
from tools.demo_vlm.learner import Learner
from tools.demo_vlm.processor import word_tokenizer
from tools.demo_vlm.settings import DemoSettings, ModelSettings, StageSettings, load_settings

CONFIG = Path("configs/demo_vlm/cpu.yaml")
MODEL = ModelSettings(
    image_size=48, tower_dim=32, tower_layers=3, text_dim=32, text_layers=2, num_heads=4
)


def tiny_settings(output: str | Path, steps: int = 3, **changes: object) -> DemoSettings:
    """The stages of the CPU's recipe, a few small steps each."""
    settings = load_settings(CONFIG)
    stages = [
        replace(stage, steps=steps, batch_size=4, warmup=2, questions=min(stage.questions, 6))
        for stage in settings.stages
    ]
    shown = replace(settings.report, num_images=4, questions=4)
    text_tower = replace(settings.text_tower, steps=2, batch_size=4, dim=16, shared_dim=8)
    small = replace(settings, output=str(output), model=MODEL, stages=stages, report=shown)
    small = replace(small, text_tower=text_tower)
    return replace(small, checkpoint_every=2, **changes)


def write_config(settings: DemoSettings, path: Path) -> Path:
    """Settings as a file that `ocvtp demo-vlm` reads."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    path.write_text(yaml.safe_dump(plain(asdict(settings))))
    return path


def tiny_learner(seed: int = 0) -> Learner:
    """Of random weights."""
    return Learner(MODEL, word_tokenizer(), seed)


def tiny_scenes(stage: StageSettings, num: int = 6, model: ModelSettings = MODEL) -> StageScenes:
    """Training scenes of a stage."""
    encoder = QuestionEncoder(word_tokenizer(), stage.prompts == "english")
    return StageScenes(model, stage, 0, 0, encoder, "train", num)


def tiny_batch(stage: StageSettings, num: int = 6) -> Batch:
    """The first scenes of a stage."""
    scenes = tiny_scenes(stage, num)
    return collate([scenes[index] for index in range(num)])


def generator(seed: int = 0) -> torch.Generator:
    """Seeded."""
    return torch.Generator().manual_seed(seed)
