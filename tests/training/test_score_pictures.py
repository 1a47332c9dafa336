"""Pictures of scores: each is of its own question's image."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from ocvtp.data.question_sets import ImageQuestion, QuestionSet
from ocvtp.training.callbacks import ScorePictures


def test_what_is_unreadable_shifts_no_picture(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200)}
    for name, colour in colours.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    asked = [
        ImageQuestion(f"val/{name}", f"{name}.png", "What?", "That.")
        for name in ("broken", *colours)
    ]
    val_set = QuestionSet(tmp_path, asked, on_error="skip")
    trainer = SimpleNamespace(datamodule=SimpleNamespace(val_set=val_set))
    batch = {"keys": [item["key"] for item in val_set if "error" not in item]}
    keep = torch.tensor([[True, False, False, True]] * 2)
    outputs = {"scores": torch.rand(2, 4), "kept": [keep], "grid_hw": (2, 2)}
    picture = ScorePictures()._picture(trainer, None, outputs, batch)
    assert picture.shape[0] == 16
    for row, colour in zip((slice(0, 8), slice(8, 16)), colours.values(), strict=True):
        assert (picture[row, :8] == np.array(colour)).all()
