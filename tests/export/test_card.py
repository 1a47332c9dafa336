"""The model card of an artifact, and `ocvtp push`, which sends both to a hub that is not there."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ocvtp.cli import main
from ocvtp.export.checkpoint import save
from ocvtp.learning.card import About, model_card
from ocvtp.training.summary import Curve, data_of

RESULTS = Path(__file__).parents[2] / "docs/results/demo-vlm/results.json"
TRAINING = {
    "steps": 300,
    "images": 3000,
    "batch_size": 32,
    "data": {"class": "FolderDataModule", "root": "data/photos"},
    "curve": [{"step": 100 * n, "loss": 1 / n, "loss_random": 2.0} for n in range(1, 31)],
    "validation": {"num_slots": 16, "loss": 0.25, "loss_untrained": 0.75, "fg_ari": 0.5},
    "versions": {"ocvtp": "0.1.0", "torch": "2.9"},
}


@pytest.fixture
def artifact(small_network, tmp_path):
    config = replace(small_network.config, training=TRAINING, num_slots=(8, 16, 24), tower="a/clip")
    small_network.config = config
    save(small_network, tmp_path / "artifact", with_decoder=False)
    return tmp_path / "artifact"


def run(capsys, *words):
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def section(card, title):
    return card.split(f"## {title}\n\n", 1)[1].split("\n## ", 1)[0]


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_an_export_writes_what_its_config_says(artifact):
    card = (artifact / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "ocvtp"
    assert {"visual-token-pruning", "slot-attention"} <= set(header["tags"])
    assert "# OC-VTP\n" in card
    assert 'build_pruner("ocvtp", num_keep=16, ' in card
    assert "- vision tower: a/clip" in section(card, "What it reads")
    training = section(card, "Training")
    assert '- data: {"class": "FolderDataModule", "root": "data/photos"}' in training
    assert "- steps: 300" in training
    curve = rows(training)
    assert curve[0] == ["step", "loss"]
    assert curve[2] == ["100", "1"]
    assert curve[-1] == ["3000", "0.03333"]
    assert len(curve) <= 2 + 13
    head, _, *good = rows(section(card, "How good it is"))
    assert head == ["figure", "trained", "untrained"]
    assert good == [["loss", "0.25", "0.75"], ["fg_ari", "0.5", "-"]]
    weights = sha256((artifact / "model.safetensors").read_bytes()).hexdigest()
    assert weights in section(card, "Weights")
    assert "not stated" in section(card, "Licence")
    assert "https://arxiv.org/abs/2511.20439" in section(card, "How to cite")
    assert "version = {0.1.0}" in card


def test_a_card_is_that_of_the_weights_beside_it(artifact, small_network):
    first = (artifact / "README.md").read_text()
    small_network.inputs = None
    next(small_network.parameters()).data.add_(1)
    save(small_network, artifact, with_decoder=False)
    assert (artifact / "README.md").read_text() != first
    (artifact / "README.md").write_text("my own words")
    save(small_network, artifact, with_decoder=False)
    assert (artifact / "README.md").read_text() == "my own words"


def test_the_command_adds_what_it_is_told(capsys, artifact, tmp_path):
    status, plain, err = run(capsys, "card", artifact)
    assert (status, err) == (0, "")
    known = (artifact / "README.md").read_text()
    assert section(plain, "Training") == section(known, "Training")
    words = ["--data", "drawn scenes", "--license", "mit", "--results", RESULTS]
    status, out, _ = run(capsys, "card", artifact, *words, "--output", tmp_path / "card.md")
    assert (status, out) == (0, f"wrote {tmp_path / 'card.md'}\n")
    card = (tmp_path / "card.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "Of these weights: mit." in card
    assert "- data: drawn scenes" in card
    names = {line[0] for line in rows(section(card, "How good it is"))}
    assert {"`ocvtp`", "`untrained` (control)", "`random` (control)", "`unpruned`"} <= names
    assert not {"`fopru`", "`untrained:learned` (control)"} & names


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "damaged"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; pass a folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_a_broken_artifact_has_no_card_and_is_not_sent(capsys, artifact, hub, damage, told):
    damage(artifact)
    for words in (["card", artifact], ["push", "--artifact", artifact, "--repo", "me/net"]):
        status, out, err = run(capsys, *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert told in err
    assert hub == {}


def test_what_is_no_artifact_or_no_result_of_it_is_refused(capsys, artifact, tmp_path):
    assert "is no folder" in run(capsys, "card", tmp_path / "nothing")[2]
    found = json.loads(RESULTS.read_text())
    found["rows"] = [row for row in found["rows"] if row["label"] != "ocvtp"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    err = run(capsys, "card", artifact, "--results", tmp_path / "results.json")[2]
    assert "has no row of pruner 'ocvtp' with a checkpoint" in err


@pytest.fixture
def hub(monkeypatch):
    """What a hub that takes everything was given."""
    given = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            given["options"] = options
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path, repo_id, repo_type, commit_message):
            given["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            given["repo"] = repo_id
            assert repo_type == "model"
            assert "ocvtp" in commit_message
            return f"https://hub/{repo_id}/commit"

    monkeypatch.setattr("ocvtp.commands.push.HfApi", Hub)
    return given


def test_push_sends_the_files_and_a_card(capsys, artifact, hub):
    (artifact / "notes.txt").write_text("of nobody's business")
    words = ["push", "--artifact", artifact, "--repo", "me/net", "--private", "--license", "mit"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert "sent to https://hub/me/net/commit" in out
    assert hub["repo"] == "me/net"
    assert hub["options"] == {"private": True, "exist_ok": True}
    assert hub["files"].keys() == {"config.json", "model.safetensors", "README.md"}
    for name in ("config.json", "model.safetensors"):
        assert hub["files"][name] == (artifact / name).read_bytes()
    assert b'license: "mit"' in hub["files"]["README.md"]


def test_a_dry_run_sends_nothing(capsys, artifact, hub):
    words = ["push", "--artifact", artifact, "--repo", "me/net", "--dry-run"]
    status, out, _ = run(capsys, *words)
    assert status == 0
    size = (artifact / "model.safetensors").stat().st_size
    assert f"model.safetensors: {size:,} bytes" in out
    assert "# OC-VTP" in out
    facts = json.loads(run(capsys, *words, "--json")[1])
    assert facts["sent"] is False
    assert facts["files"]["model.safetensors"] == size
    assert hub == {}


def test_a_card_of_ones_own_is_sent_as_it_is(capsys, artifact, hub):
    (artifact / "README.md").write_text("my own words")
    words = ["push", "--artifact", artifact, "--repo", "me/net"]
    assert run(capsys, *words)[0] == 0
    assert hub["files"]["README.md"] == b"my own words"
    assert run(capsys, *words, "--data", "photographs")[0] == 0
    assert b"- data: photographs" in hub["files"]["README.md"]


def test_what_card_wrote_is_sent(capsys, artifact, hub):
    card = artifact / "README.md"
    assert run(capsys, "card", artifact, "--license", "mit", "--output", card)[0] == 0
    assert run(capsys, "push", "--artifact", artifact, "--repo", "me/net")[0] == 0
    assert b'license: "mit"' in hub["files"]["README.md"]


def test_a_hub_that_refuses_is_one_line(capsys, artifact, monkeypatch):
    class Hub:
        def create_repo(self, *_, **__):
            raise RuntimeError("no\nroute")

    monkeypatch.setattr("ocvtp.commands.push.HfApi", Hub)
    words = ["push", "--artifact", artifact, "--repo"]
    status, out, err = run(capsys, *words, "me/net")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "nothing could be sent to me/net (RuntimeError: no route)" in err
    assert "--repo me/../net" in run(capsys, *words, "me/../net")[2]


def test_a_curve_keeps_new_points_and_not_too_many():
    curve = Curve()
    for step in range(1, 500):
        curve.add(step, {"loss": 1 / step})
        curve.add(step + 1, {"loss": 1 / step})  # the same validation, at a later checkpoint
    steps = [point["step"] for point in curve.points]
    assert steps == sorted(set(steps))
    assert steps[0] == 1
    assert steps[-1] == 499
    assert 32 <= len(steps) <= 64
    curve.add(499, {"loss": 0.5})
    assert curve.points[-1] == {"step": 499, "loss": 0.5}
    assert len(curve.points) == len(steps)
    curve.add(501, {})
    assert curve.points[-1]["step"] == 499


def test_the_data_of_a_run_are_its_settings():
    settings = {
        "data": {
            "class_path": "ocvtp.data.folder.FolderDataModule",
            "init_args": {"root": "photos", "num_val": 50, "seed": None},
        }
    }
    assert data_of(settings) == {"class": "FolderDataModule", "root": "photos", "num_val": 50}
    assert data_of({"data": {"root": "photos"}}) == {"root": "photos"}
    assert data_of({}) == {}


@pytest.mark.parametrize(
    ("budgets", "words"),
    [((0.11, 0.25, 8, 64), "num_keep=64"), ((0.11, 0.25), "keep_ratio=0.25"), ((), "num_keep=64")],
)
def test_a_card_asks_for_a_budget_of_the_training(budgets, words):
    config = {"num_slots": budgets, "stage": "llm_input", "layer": None}
    assert f'build_pruner("learned", {words}, ' in model_card(config, About("learned"))
    inside = {**config, "stage": "llm_layers", "layer": 18}
    kept = words.partition("=")[2]
    words = f'build_pruner("learned_layers", stages=((18, {kept}),), '
    assert words in model_card(inside, About("learned_layers"))


def test_words_of_a_config_do_nothing_on_a_card():
    words = "[a](https://b.example) <img src=x>\n## Licence\n\nMIT"
    said = {"data": words, "versions": {"ocvtp": "1\n```\n# Mine"}}
    said["curve"] = [{"step": step, "a|b": 1.0} for step in (1, 2)]
    card = model_card({"tower": words, "training": said}, About("learned"))
    assert "- vision tower: [a]\\(https://b.example) &lt;img src=x&gt; ## Licence MIT\n" in card
    assert "| step | a\\|b |" in card
    assert card.count("\n```") == 4
    assert [line for line in card.splitlines() if line.startswith("# ")] == [
        "# The network of a visual-token pruner"
    ]
    assert card.count("\n## Licence\n") == 1


def test_a_config_that_no_card_can_be_made_of_is_one_error(artifact, capsys):
    path = artifact / "config.json"
    config = json.loads(path.read_text())
    config["training"]["curve"] = 5
    path.write_text(json.dumps(config))
    status, _, err = run(capsys, "card", artifact)
    assert (status, err.count("\n")) == (2, 1)
    assert "has no card, as its config.json" in err
