"""`ocvtp runs`: what is read of the folders of training runs, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ocvtp.cli import main
from ocvtp.reporting.training_plots import plot_runs
from ocvtp.reporting.training_runs import differing, find_runs, is_higher_better

SETTINGS = {
    "seed_everything": 0,
    "model": {"lr": 0.001, "encoder": {"class_path": "a.Encoder", "init_args": {"layer": 3}}},
    "data": {"class_path": "a.Data", "init_args": {"root": "x"}},
    "trainer": {"max_epochs": 2, "default_root_dir": "y", "logger": [{"class_path": "b"}]},
}


def write(folder: Path, losses: dict[int, float], version: int = 0, **more) -> Path:
    """A run whose validation had these losses after so many steps."""
    place = folder / f"csv/version_{version}"
    place.mkdir(parents=True)
    settings = {**SETTINGS, "output": str(folder), **more}
    (place / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = ["epoch,step,train/loss,val/loss,val/mbo_i"]
    for steps, loss in losses.items():
        lines += [f"0,{steps - 1},{loss + 1},,", f"0,{steps - 1},,{loss},{loss / 10}"]
    (place / "metrics.csv").write_text("\n".join(lines) + "\n")
    kept = folder / "checkpoints"
    kept.mkdir(exist_ok=True)
    (kept / "last.ckpt").write_bytes(b"")
    return place


@pytest.fixture
def runs(tmp_path):
    top = tmp_path / "runs"
    write(top / "a", {10: 2.0, 20: 1.0, 30: 1.5})
    write(top / "b", {10: 3.0, 20: 0.5}, model={**SETTINGS["model"], "lr": 0.1})
    return top


def test_settings_figures_and_curves(runs):
    found, notes = find_runs([str(runs)])
    assert [(run.name, run.steps, run.checkpoints) for run in found] == [
        ("a", 30, ["last.ckpt"]),
        ("b", 20, ["last.ckpt"]),
    ]
    assert notes == []
    assert differing(found) == {"model.lr": [0.001, 0.1]}  # folders do not count
    assert found[0].best("val/loss") == (1.0, 19)
    assert found[0].best("val/mbo_i") == (0.2, 9)  # the highest
    assert found[0].best("val/none") is None
    assert found[0].curves["train/loss"] == [(9, 3.0), (19, 2.0), (29, 2.5)]
    assert found[0].settings["model.encoder.layer"] == 3
    (alone,) = find_runs([str(runs / "a")])[0]
    assert alone.name == "a"


@pytest.mark.parametrize("more", [{"resume": "last"}, {}])  # {}: SLURM ran the command again
def test_a_run_that_was_continued_is_one(tmp_path, more):
    write(tmp_path, {10: 2.0, 20: 1.0, 30: 1.5})
    write(tmp_path, {30: 0.9, 40: 0.8}, version=1, **more)
    (run,) = find_runs([str(tmp_path)])[0]
    assert run.curves["val/loss"] == [(9, 2.0), (19, 1.0), (29, 0.9), (39, 0.8)]


def test_a_run_that_started_over_is_another(tmp_path):
    write(tmp_path, {10: 2.0, 20: 1.0})
    write(tmp_path, {10: 0.9, 20: 0.8}, version=1)
    write(tmp_path, {30: 0.7}, version=10, resume="last")
    first, second = find_runs([str(tmp_path)])[0]
    assert second.name == f"{first.name}:version_1"
    assert second.curves["val/loss"] == [(9, 0.9), (19, 0.8), (29, 0.7)]


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ({"config.yaml": "a: 1\n"}, "config.yaml is not of `ocvtp train`"),
        ({"config.yaml": "a: [\n"}, "config.yaml cannot be read: "),
        ({"config.yaml": BOMB}, "config.yaml cannot be read: it stands for more"),
        ({"config.yaml": "x" * 2_000_000}, "config.yaml cannot be read: it is too large"),
        ({"metrics.csv": "\0\1\2"}, "metrics.csv is no log of a run"),
        ({"metrics.csv": ""}, "metrics.csv is no log of a run"),
        ({"notes.txt": ""}, "there is no run of `ocvtp train` in it"),
    ],
)
def test_other_folders_have_a_line_each(runs, tmp_path, files, note):
    other = tmp_path / "other"
    other.mkdir()
    for name, text in files.items():
        (other / name).write_text(text)
    found, notes = find_runs([str(runs), str(other)])
    assert len(found) == 2
    (said,) = notes
    assert said.startswith(f"{other}: {note}")
    with pytest.raises(ValueError, match="pass|Pass the --output folders of runs"):
        find_runs([str(other)])


@pytest.mark.parametrize(
    ("spoil", "notes", "steps"),
    [
        (lambda place: (place / "metrics.csv").unlink(), ["nothing was logged yet"], 0),
        (
            lambda place: (place / "metrics.csv").write_text("step,val/loss\n"),
            ["nothing was lo"],
            0,
        ),
        (lambda place: (place / "config.yaml").write_text("{"), ["config.yaml cannot be read"], 30),
        (lambda place: (place / "config.yaml").unlink(), [], 30),
    ],
)
def test_half_written_runs_are_shown_as_far_as_they_go(runs, spoil, notes, steps):
    spoil(runs / "a/csv/version_0")
    run, other = find_runs([str(runs)])[0]
    assert (run.name, run.steps, other.steps) == ("a", steps, 20)
    assert len(run.notes) == len(notes)
    assert all(found.startswith(note) for found, note in zip(run.notes, notes, strict=True))


def test_lines_that_were_cut_are_left_out(runs):
    log = runs / "a/csv/version_0/metrics.csv"
    log.write_text(log.read_text() + "0,39,0.5,,\n0,x,1,,\n0,49,abc,,\n0,59,nan,inf,\n0,6")
    run, _ = find_runs([str(runs)])[0]
    assert run.curves["train/loss"][-1] == (39, 0.5)
    assert run.steps == 40
    assert run.notes == ["2 lines of metrics.csv cannot be read"]


def test_the_command(runs, tmp_path, capsys):
    plot = tmp_path / "runs.png"
    assert main(["runs", str(runs), "/no/such", "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert "0.5 @ 20" in said
    assert "model.lr=0.1" in said
    assert "/no/such is no folder" in said
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert main(["runs", str(runs), "--json", "--figures", "mbo_i"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"][1]["best"]["val/loss"] == {"value": 0.5, "step": 20}
    assert facts["runs"][0]["settings_that_differ"] == {"model.lr": 0.001}
    assert main(["runs", str(runs), "--figures", "kl"]) == 2
    assert "no run has the figure 'val/kl'; there are: val/loss" in capsys.readouterr().err
    assert main(["runs", "/no/such"]) == 2


def test_a_panel_for_each_figure_that_there_is(runs):
    found, _ = find_runs([str(runs)])
    drawing = plot_runs(found, ["val/loss", "val/none"])
    titles = [axis.get_title(loc="left") for axis in drawing.axes]
    assert titles == ["train/loss, smoothed (lower is better)", "val/loss (lower is better)"]
    assert [len(axis.lines) for axis in drawing.axes] == [2, 2]
    assert is_higher_better("val/accuracy_16_random")
    assert not is_higher_better("val/kl_16")
    assert len(plot_runs([], []).axes) == 1


@pytest.mark.slow
def test_a_name_that_looks_like_a_formula_is_drawn(runs, tmp_path):
    (runs / "a").rename(runs / r"a$\foo$b")
    assert main(["runs", str(runs), "--plot", str(tmp_path / "runs.png")]) == 0
    assert (tmp_path / "runs.png").stat().st_size > 1000


def test_no_terminal_obeys_what_a_run_says(runs, capsys):
    config = runs / "a/csv/version_0/config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["model"]["lr"] = "\x1b]0;mine\x07[red]"
    config.write_text(yaml.safe_dump(settings))
    assert main(["runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert r"model.lr=\x1b]0;mine\x07[red]" in out
    assert "\x1b" not in out
