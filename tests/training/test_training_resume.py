"""What `--resume` continues, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_training import scenes, settings_file

from ocvtp.cli import main
from ocvtp.export import export_checkpoint
from ocvtp.training.run import train

pytestmark = pytest.mark.slow

__all__ = ["scenes"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, scenes):
    """Words of a run, and its checkpoint after one epoch of six steps."""
    folder = tmp_path_factory.mktemp("run")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    words = ["--config", str(settings_file(folder, scenes, limit_val_batches=1, **quiet))]
    return words, train(words).last


@pytest.fixture
def again(run, tmp_path, capsys):
    """Resume, with changes; what is said at the end."""

    def go(resume, *more):
        words = [*run[0], "--output", str(tmp_path / "out"), "--resume", str(resume), *more]
        status = main(["train", *words, "--trainer.max_epochs", "2"])
        captured = capsys.readouterr()
        return status, (captured.out if status == 0 else captured.err.splitlines()[-1])

    return go


def test_the_checkpoints_of_another_run_are_not_overwritten(run, again, tmp_path):
    folder = tmp_path / "out/checkpoints"
    folder.mkdir(parents=True)
    (folder / "best.ckpt").write_text("of another run")
    assert again(run[1])[0] == 0
    assert (tmp_path / "out/checkpoints.1/best.ckpt").read_text() == "of another run"


def changed(checkpoint, path, change):
    """A copy of a checkpoint with another content."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_the_same_settings_continue(run, again, tmp_path):
    status, said = again(run[1])
    assert status == 0, said
    last = torch.load(tmp_path / "out/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 12
    training = last["ocvtp"]["training"]
    assert training["epochs"] == 2
    assert [point["step"] for point in training["curve"]] == [
        6,
        12,
    ]  # of the first run, and of this
    known = {
        name: training["curve"][-1][name] for name in training["validation"] if name != "num_slots"
    }
    assert known == {k: v for k, v in training["validation"].items() if k != "num_slots"}
    assert training["data"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.encoder.layer", "2"], "model.encoder.layer is 2, there 3"),
        (["--model.network.slot_dim", "32"], "model.network.slot_dim is 32, there 16"),
        (["--model.network.dropout", "0.5"], "model.network.dropout is 0.5, there 0.01"),
        (["--model.encoder.dtype", "bfloat16"], "dtype is 'bfloat16', there 'float32'"),
        (["--model.encoder.seed", "3"], "model.encoder.seed is 3, there 0"),
        (["--model.num_slots", "[4,8]"], "model.num_slots is [4, 8], there [8, 16, 36]"),
        (["--model.val_num_slots", "8"], "model.val_num_slots is 8, there 16"),
        (["--model.lr", "0.5"], "model.lr is 0.5, there 0.001"),
        (["--model.objective.power", "1"], "model.objective.power is 1.0, there 0.5"),
        (["--seed_everything", "1"], "seed_everything is 1, there 0"),
        (["--data.limit_train", "12"], "data.limit_train is 12, there None"),
        (["--data.train_annotations", "null"], "data.train_annotations is None, there"),
        (
            ["--data", "ocvtp.data.module.SceneDataModule"],
            "data is 'ocvtp.data.module.SceneDataModule', there 'ocvtp.data.module.CocoDataModule'",
        ),
        (
            ["--model.encoder.tower", "{hidden_size: 64, num_attention_heads: 4}"],
            "model.encoder.tower is {",
        ),
        (
            ["--model.encoder.layer", "2", "--model.lr", "0.5"],
            "model.encoder.layer is 2, there 3; model.lr is 0.5, there 0.001",
        ),
    ],
)
def test_another_run_is_refused_with_both_values(again, run, tmp_path, words, message):
    status, error = again(run[1], *words)
    assert status == 2
    assert error.startswith(f"ocvtp: error: --resume {run[1]} is of a run with other settings: ")
    assert message in error
    assert "start a new one without --resume" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.encoder.layer", "2"], "model.encoder.layer is 2, there 3"),
        (["--model.network.slot_dim", "32"], "model.network.slot_dim is 32, there 16"),
        (["--model.network.num_iterations", "2"], "model.network.num_iterations is 2, there 3"),
        (
            ["--model.objective.decoder.num_layers", "1"],
            "model.objective.decoder.num_layers is 1, there 2",
        ),
        (["--model.lr", "0.5"], "model.lr is 0.5, there 0.001"),
        (["--seed_everything", "1"], "seed_everything is 1, there 0"),
    ],
)
def test_checkpoints_without_settings_are_compared_by_what_they_tell(
    again, run, tmp_path, words, message
):
    """Those of earlier versions."""
    old = changed(run[1], tmp_path / "old.ckpt", lambda c: c["ocvtp"].pop("settings"))
    status, error = again(old, *words)
    assert status == 2
    assert message in error
    assert again(old)[0] == 0
    assert export_checkpoint(old, tmp_path / "artifact").config.layer == 3


def test_what_may_change_is_told(again, run, scenes, tmp_path, caplog):
    (tmp_path / "moved").symlink_to(scenes)
    words = ["--data.root", str(tmp_path / "moved"), "--data.batch_size", "6"]
    words += ["--trainer.gradient_clip_val", "0.5", "--data.num_workers", "1"]
    words += ["--data.prefetch_factor", "3", "--data.persistent_workers", "false"]
    words += ["--model.statistics_images", "3", "--trainer.limit_val_batches", "0"]
    assert again(run[1], *words)[0] == 0
    (told,) = [m for m in caplog.messages if "continues with other settings" in m]
    assert f"data.root: {str(scenes)!r} -> {str(tmp_path / 'moved')!r}" in told
    assert "data.batch_size: 4 -> 6" in told
    assert "trainer.gradient_clip_val: 1.0 -> 0.5" in told
    for name in ("num_workers", "prefetch_factor", "persistent_workers"):
        assert name not in told
    assert "statistics" not in told


def _of_another_shape(content):
    name = "network.attention.gru.weight_hh"
    content["state_dict"][name] = content["state_dict"][name][:3]


def _odd_optimizer(content):
    content["optimizer_states"] = [{"state": {}, "param_groups": []}]


def _not_finite(content):
    content["state_dict"]["network.encode.1.bias"][0] = float("nan")


def _odd_loader(content):
    content["CocoDataModule"] = {"epoch": 0, "batch": 3} | dict.fromkeys(
        ("num_images", "batch_size", "num_processes", "seed"), 9
    )


DAMAGE = {
    "state of another program": (dict.clear, "lacks ocvtp, state_dict"),
    "weights alone": (lambda c: c.pop("optimizer_states"), "lacks optimizer_states"),
    "no loops": (lambda c: c.pop("loops"), "lacks loops"),
    "odd loops": (lambda c: c.update(loops={"fit_loop": 3}), "cannot be continued"),
    "odd config": (lambda c: c["ocvtp"].update(config={"colour": 1}), "unknown settings"),
    "odd entry": (lambda c: c.update(ocvtp=3), "cannot be continued"),
    "odd settings": (lambda c: c["ocvtp"].update(settings=[1]), "cannot be continued"),
    "another shape": (_of_another_shape, "does not hold the weights of this network"),
    "a weight less": (
        lambda c: c["state_dict"].pop("network.attention.gru.weight_hh"),
        "does not hold the weights of this network",
    ),
    "odd optimizer": (_odd_optimizer, "cannot be continued"),
    "not finite": (_not_finite, "'network.encode.1.bias' has numbers that are not finite"),
    "a config of another type": (
        lambda c: c["ocvtp"]["config"].update(layer="3"),
        "layer='3'; pass a whole number",
    ),
    "odd loader": (_odd_loader, "written inside an epoch"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_give_one_clear_error(again, run, tmp_path, case):
    change, message = DAMAGE[case]
    status, error = again(changed(run[1], tmp_path / "x.ckpt", change))
    assert status == 2
    assert error.startswith("ocvtp: error: --resume ")
    assert "x.ckpt" in error
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "is a folder; pass a file of it, e.g. "),
        ("empty folder", "is a folder; and there is no checkpoint in it"),
        ("missing", "does not exist; pass last.ckpt or best.ckpt"),
        ("empty", "is damaged"),
        ("truncated", "is damaged"),
        ("random", "is damaged"),
        ("text", "is damaged"),
        ("safetensors", "cannot be continued"),
        ("list", "holds a list"),
    ],
)
def test_what_is_no_checkpoint_gives_one_clear_error(again, run, tmp_path, kind, message):
    path = tmp_path / "x.ckpt"
    whole = Path(run[1]).read_bytes()
    contents = {"empty": b"", "truncated": whole[: len(whole) // 2], "random": whole[99:999]}
    contents["text"] = b"seed_everything: 0\n"
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path = Path(run[1]).parent.parent
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "safetensors":
        save_file({"x": torch.zeros(2)}, path)
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    status, error = again(path)
    assert status == 2
    assert error.startswith(f"ocvtp: error: --resume {path}")
    assert message in error
    assert "weights_only" not in error
    if kind == "folder":
        assert f"e.g. {run[1]}" in error


def test_last_and_best_are_those_of_the_runs_folder(run, tmp_path, capsys):
    assert main(["train", *run[0], "--resume", "last"]) == 0
    assert f"nothing was left to train: {run[1]}" in capsys.readouterr().out
    assert main(["train", *run[0], "--resume", "best", "--output", str(tmp_path)]) == 2
    assert f"--resume {tmp_path}/checkpoints/best.ckpt does not" in capsys.readouterr().err


def test_auto_is_the_last_one_where_there_is_any(run, tmp_path, capsys):
    words = [*run[0], "--output", str(tmp_path), "--trainer.max_steps", "2", "--resume", "auto"]
    for said in ("", f"nothing was left to train: {tmp_path}/checkpoints/last.ckpt"):
        assert main(["train", *words]) == 0
        assert said in capsys.readouterr().out
        assert torch.load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2
    assert not (tmp_path / "checkpoints.1").exists()


def test_the_settings_are_plain(run):
    settings = torch.load(run[1], weights_only=True)["ocvtp"]["settings"]
    assert settings["model"]["encoder"]["init_args"]["layer"] == 3
    assert settings["data"]["init_args"]["batch_size"] == 4
    assert "transform" not in settings["data"]["init_args"]
    assert copy.deepcopy(settings) == settings
