"""Where there is no room: one error that names the file, and nothing that is not whole."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.kills import _settings
from ocvtp.cli import main
from ocvtp.data.scenes import write_scenes
from ocvtp.images import encoded
from ocvtp.reporting.files import refuse_cut, write_whole


@contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(words, name, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    told = [line for line in said if line.startswith("ocvtp: error: ")]
    assert len(told) == 1
    assert f"{name}: File too large; pass a file or folder" in told[0]
    assert not any("Traceback" in line for line in said)


def test_resize_leaves_no_picture_that_is_not_whole(tmp_path, capsys):
    source, output = tmp_path / "source", tmp_path / "output"
    source.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (200, 200, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number}.png")
    Image.new("RGB", (200, 200)).save(source / "plain.png")
    words = ["resize", str(source), str(output), "--size", "150", "--num-workers", "1"]
    with room_for(10_000):
        refused(words, f"{output}/0.jpg", capsys)
    assert names(output) == ["resize.json"]
    assert main(words) == 0
    for path in output.glob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert image.size == (150, 150)


def test_export_leaves_nothing(small_network, tmp_path, capsys):
    own = {"format": small_network.format, "config": asdict(small_network.config), "training": {}}
    state = {f"network.{name}": tensor for name, tensor in small_network.state_dict().items()}
    torch.save({"ocvtp": own, "state_dict": state}, tmp_path / "last.ckpt")
    output = tmp_path / "output"
    words = ["export", "--checkpoint", str(tmp_path / "last.ckpt"), "--output", str(output)]
    with room_for(1000):
        refused(words, "model.safetensors", capsys)
    assert names(output) == []
    assert main(words) == 0


@pytest.mark.slow
def test_evaluate_goes_on_with_what_there_was_room_for(tmp_path, capsys):
    words = ["evaluate", "--model", "random:tiny-llava", "--task", "scenes", "--split", "test"]
    words += ["--num-images", "1", "--questions", "3", "--pruners", "uniform", "--num-keep", "8"]
    words += ["--no-controls", "--batch-size", "1"]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    output = tmp_path / "output"
    with room_for(700):
        refused([*words, "--output", str(output)], "", capsys)
    assert not [name for name in names(output) if name.endswith((".tmp", ".lock"))]
    assert main([*words, "--output", str(output)]) == 0
    assert names(output) == names(tmp_path / "whole")
    for name in ("results.json", "report.md"):
        got = (output / name).read_text().replace(str(output), str(tmp_path / "whole"))
        assert got == (tmp_path / "whole" / name).read_text()


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, capsys):
    write_scenes(tmp_path / "scenes", num_train=8, num_val=2, size=96, seed=0)
    (tmp_path / "train.json").write_text(json.dumps(_settings(tmp_path / "scenes")))
    output = tmp_path / "output"
    words = ["train", "--config", str(tmp_path / "train.json"), "--output", str(output)]
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    there, last = names(output), output / "checkpoints/last.ckpt"
    before = last.read_bytes()
    with room_for(len(before) // 2):
        refused([*words, "--resume", "last"], f"{output}/checkpoints/best.ckpt", capsys)
    assert last.read_bytes() == before
    assert names(output) == there
    assert main([*words, "--resume", "last"]) == 0


def test_a_library_that_does_not_look_is_looked_after(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (9, 9)), "PNG")[:-5])
    with pytest.raises(OSError, match="not all of it was written"):
        refuse_cut(tmp_path / "a.png", b"IEND\xaeB`\x82")
    with room_for(10), pytest.raises(OSError, match="File too large: .*b.bin"):
        write_whole(tmp_path / "b.bin", b"x" * 11)
    assert names(tmp_path) == ["a.png"]
