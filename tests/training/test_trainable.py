"""A trainable pruner costs one file: that of docs/add-a-learned-pruner.md, run as the page says."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.testing import assert_close

import ocvtp
from ocvtp.cli import main
from ocvtp.data.scenes import draw_scene
from ocvtp.evaluation import conditions as made
from ocvtp.evaluation.checkpoint_groups import grouped
from ocvtp.export import export_checkpoint
from ocvtp.learning import NetworkConfig, artifact
from ocvtp.pruners import registry, trainable
from ocvtp.pruners.checks import check_pruner, random_tokens
from ocvtp.slots import OCPruner
from ocvtp.slots.config import NetworkSizes
from ocvtp.training.resume import read_checkpoint
from ocvtp.training.run import build

ROOT = Path.cwd()
PAGE = ROOT / "docs" / "add-a-learned-pruner.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
CODE, SETTINGS, COMMANDS = (text for _, text in BLOCKS)
USE = re.search(r"`(ocvtp.build_pruner\(.*?\))`", PAGE.read_text())[1]
DEMO_PRUNER = str(ROOT / "checkpoints" / "demo-pruner" / "0")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder that holds the page's files, where what they register is forgotten afterwards."""
    (tmp_path / "linear_scorer.py").write_text(CODE)
    (tmp_path / "linear.yaml").write_text(SETTINGS)
    Image.fromarray(draw_scene(0, 0).image).save(tmp_path / "picture.png")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "linear_scorer", raising=False)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield tmp_path
    sys.modules.pop("linear_scorer", None)


@pytest.fixture
def module(page):
    """The page's module, imported."""
    return importlib.import_module("linear_scorer")


def network_of(module, seed=0, **sizes):
    torch.manual_seed(seed)
    config = NetworkConfig(sizes=module.LinearSizes(**sizes), feature_dim=8, layer=3, tower="t")
    return module.LinearScorer(config).eval()


def quick(*more):
    """The words of a run of the page of three steps."""
    few = ["--trainer.max_epochs", "1", "--trainer.logger", "false", "--data.num_train", "48"]
    few += ["--data.num_val", "8", "--trainer.enable_progress_bar", "false"]
    return ["--config", "linear.yaml", "--output", "run", *few, *more]


# ---------------------------------------------------------------- the page


@pytest.mark.slow
def test_the_page_runs(page, capsys):
    for command in COMMANDS.splitlines():
        words = shlex.split(command)
        assert words[0] == "ocvtp"
        assert main(words[1:]) == 0, command
    printed = capsys.readouterr().out
    assert "wrote outputs/linear/exported: 3,329 parameters, hidden_states[3]" in printed
    found = json.loads((page / "outputs/linear/evaluated/results.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["linear"]["trained"]
    assert rows["linear"]["yours"]
    assert rows["untrained:linear"]["control"]
    assert "untrained" not in rows
    assert rows["linear"]["visual_tokens"] == rows["untrained:linear"]["visual_tokens"] == 16
    assert Image.open("outputs/linear/kept.png").size[0] > 96
    written = eval(USE, {"ocvtp": ocvtp}).network.config
    assert written.sizes.hidden_dim == 32
    assert written.num_slots == (8, 16, 24)
    assert written.objective == "received"
    assert written.training["validation"]["received_share"] > 0


@pytest.mark.slow
def test_training_learns_and_a_second_run_is_the_same(page):
    runs = []
    for output in ("a", "b"):
        words = ["--import", "linear_scorer.py", "train", *quick("--output", output)]
        assert main(words) == 0
        runs.append(read_checkpoint(f"{output}/checkpoints/last.ckpt"))
    first, second = (run["state_dict"] for run in runs)
    for name, value in first.items():
        assert_close(value, second[name], rtol=0, atol=0)
    assert runs[0]["ocvtp"]["format"] == "linear-scorer"
    module = sys.modules["linear_scorer"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = module.LinearScorer.read_config(runs[0]["ocvtp"]["config"])
        before = module.LinearScorer(config).state_dict()
    moved = [name for name, value in before.items() if not value.equal(first[f"network.{name}"])]
    assert len(moved) == len(before) == 6


@pytest.mark.slow
def test_a_run_is_continued_by_the_same_settings_alone(page, module, capsys):
    assert main(["train", *quick()]) == 0
    last = "run/checkpoints/last.ckpt"
    assert main(["train", *quick("--trainer.max_epochs", "2", "--resume", last)]) == 0
    assert read_checkpoint(last)["global_step"] == 6
    capsys.readouterr()
    assert main(["train", *quick("--model.network.hidden_dim", "8", "--resume", last)]) == 2
    assert "model.network.hidden_dim is 8, there 32" in capsys.readouterr().err
    older = torch.load(last, weights_only=True)
    del older["ocvtp"]["settings"]
    torch.save(older, "older.ckpt")
    assert main(["train", *quick("--model.network.hidden_dim", "8", "--resume", "older.ckpt")]) == 2
    assert "model.network.hidden_dim is 8, there 32" in capsys.readouterr().err


# ---------------------------------------------------------------- settings


def test_settings_of_a_network_name_it(page, module):
    model = build(quick()).model
    assert type(model.network) is module.LinearScorer
    assert model.network.config.sizes == module.LinearSizes(32)
    assert type(model.objective) is module.Received
    assert model.encoder.needs.hidden == (3,)
    assert model.encoder.needs.attention == ((-2, "received"),)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.objective", "ocvtp.slots.objectives.SlotsObjective"],
            "the objective 'slots' trains an OC-pruner, and model.network are the sizes of a"
            " LinearScorer",
        ),
        (["--model.network", "ocvtp.learning.network.Sizes"], "are the sizes of no network of a"),
        (["--model.network.hiden_dim", "1"], "did you mean --model.network.hidden_dim?"),
        (["--model.network.slot_dim", "3"], "no setting of LinearSizes (it has hidden_dim)."),
        (
            ["--model.network", "{slot_dim: 3}"],
            "model.network.slot_dim is no setting of LinearSizes, which has hidden_dim.",
        ),
        (["--config", str(ROOT / "configs/train/scenes.yaml")], "no setting of LinearSizes"),
        (["--model.network", "ocvtp.encoders.clip.CLIPEncoder"], "model.network is "),
        (["--model.network.hidden_dim", "x"], "model.network.hidden_dim is 'x'; pass a whole num"),
        (["--model.network", "linear_scorer.LinearSize"], "is no class that can be imported"),
    ],
)
def test_wrong_settings_are_one_line(page, module, words, message, capsys):
    try:
        status = main(["train", *quick(*words)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize(
    "more", [["--model.network", "linear_scorer.LinearSizes"], ["--config", "linear.yaml"]]
)
def test_plain_sizes_and_a_class_are_not_mixed(page, module, more, capsys):
    """Both have a hidden_dim, so that one would silently be taken for the other's."""
    scenes = str(ROOT / "configs" / "train" / "scenes.yaml")
    assert main(["train", "--config", scenes, *more, "--output", "run"]) == 2
    message = "model.network is LinearSizes (it has hidden_dim) and plain sizes, which are those of"
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.slow
def test_the_oc_pruner_is_the_one_where_nothing_is_said(page, tmp_path):
    config = yaml.safe_load(SETTINGS)
    del config["model"]["network"]
    config["model"]["objective"] = {
        "class_path": "ocvtp.slots.objectives.SlotsObjective",
        "init_args": {"decoder": {"num_layers": 1, "ffn_dim": 32}},
    }
    for network in (None, {}, {"slot_dim": 8}):
        config["model"]["network"] = network
        Path("linear.yaml").write_text(yaml.safe_dump(config))
        model = build(quick()).model
        assert type(model.network) is OCPruner
        assert model.network.config.slot_dim == (8 if network else 512)


# ---------------------------------------------------------------- artifacts


def test_an_artifact_finds_its_pruner(page, module, tmp_path):
    network_of(module).save_pretrained("exported")
    assert json.loads(Path("exported/config.json").read_text())["format"] == "linear-scorer"
    assert trainable.readers("exported") == ["linear"]
    assert trainable.readers(DEMO_PRUNER) == ["ocvtp"]
    assert trainable.readers(str(tmp_path)) == []
    pruner = ocvtp.build_pruner("linear", num_keep=4, checkpoint="exported")
    for name, value in network_of(module).state_dict().items():
        assert_close(pruner.network.state_dict()[name], value, rtol=0, atol=0)
    assert "visual-token-pruning" in Path("exported/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        ("linear", DEMO_PRUNER, "pruner 'linear' got .* a network of pruner 'ocvtp'; build that"),
        ("ocvtp", "exported", "pruner 'ocvtp' got .* a network of pruner 'linear'; build that"),
        ("linear", "checkpoints", "cannot read a LinearScorer from checkpoints: the folder has no"),
        ("linear", None, "checkpoint=DIR_OR_HUB_ID .* or, in Python, network=a LinearScorer"),
    ],
)
def test_another_pruners_network_is_refused(page, module, name, checkpoint, message):
    network_of(module).save_pretrained("exported")
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner(name, num_keep=4, checkpoint=checkpoint)


def test_two_networks_are_refused_and_a_replaced_budget_is_not(page, module):
    network = network_of(module)
    network.save_pretrained("exported")
    with pytest.raises(ValueError, match="needs a trained network"):
        ocvtp.build_pruner("linear", num_keep=4, checkpoint="exported", network=network)
    for pruner in (
        ocvtp.build_pruner("linear", num_keep=4, checkpoint="exported"),
        ocvtp.build_pruner("ocvtp", num_keep=4, checkpoint=DEMO_PRUNER),
    ):
        again = dataclasses.replace(pruner, num_keep=8)
        assert again.network is pruner.network
        assert again.num_keep == 8


def test_it_keeps_to_the_contract(page, module):
    pruner = ocvtp.build_pruner("linear", num_keep=4, network=network_of(module))
    check_pruner(pruner)
    tokens = random_tokens(pruner.needs, 2, (4, 4))
    scores = pruner.network(tokens)
    for kept, image in zip(pruner.select(tokens).keep_indices, scores, strict=True):
        assert set(kept.tolist()) == set(image.topk(4).indices.tolist())


def test_a_checkpoint_without_a_format_is_of_an_oc_pruner(page, tmp_path):
    """As earlier versions wrote them."""
    _, config, _ = artifact.read_any(DEMO_PRUNER)
    network = OCPruner.from_pretrained(DEMO_PRUNER)
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    kept = {"config": config, "training": config["training"], "settings": {}}
    torch.save({"ocvtp": kept, "state_dict": state}, "old.ckpt")
    export_checkpoint("old.ckpt", "old")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "old" / name).read_bytes() == Path(DEMO_PRUNER, name).read_bytes()
    kept["format"] = "linear-scorer"
    torch.save({"ocvtp": kept, "state_dict": state}, "old.ckpt")
    with pytest.raises(ValueError, match="'linear-scorer' is that of no trainable pruner"):
        export_checkpoint("old.ckpt", "other")
    assert not Path("other").exists()


# ---------------------------------------------------------------- evaluation


def test_each_checkpoint_goes_to_the_pruner_that_reads_it(page, module):
    for seed in range(2):
        network_of(module, seed).save_pretrained(f"exported{seed}")
    both = [DEMO_PRUNER, "exported0", "exported1"]
    for name, own in (("ocvtp", both[:1]), ("linear", both[1:])):
        assert made.readable(name, both) == own
        found = made.pruner_conditions(name, [made.Budget(4)], [0], both, 144)
        assert [condition.settings["checkpoint"] for condition in found] == own
    assert made.readable("linear", [DEMO_PRUNER]) == [DEMO_PRUNER]  # it says what is wrong
    assert made.readable("random", both) == both


def test_checkpoints_of_two_pruners_are_not_told_to_be_no_seeds(page, module):
    network_of(module, 0).save_pretrained("a")
    network_of(module, 0, hidden_dim=8).save_pretrained("b")
    assert grouped([DEMO_PRUNER, "a"]) == ([[DEMO_PRUNER], ["a"]], "")
    groups, why = grouped([DEMO_PRUNER, "a", "b"])
    assert groups == [[DEMO_PRUNER], ["a"], ["b"]]
    assert why.startswith("checkpoints a and b are no seeds of one training (sizes.hidden_dim: 64")


def test_untrained_controls_of_each_kind(page, module):
    like = network_of(module)
    found = made.untrained_conditions([made.Budget(4)], [0, 1], like)
    assert [condition.label for condition in found] == ["untrained:linear"] * 2
    first, second = (c.make(made.Place(0, list)).network.layers[3].weight for c in found)
    assert not first.equal(second)
    again = type(like).untrained(like.config, 1).layers[3].weight
    assert_close(again, second, rtol=0, atol=0)


def test_a_pruner_of_the_same_network_is_not_taken_for_its_owner(page):
    from ocvtp.pruners.methods.ocvtp import OCVTP

    @registry.register("a_variant")
    @dataclasses.dataclass(kw_only=True, eq=False)
    class Variant(OCVTP):
        """Like it."""

    assert trainable.of_format("ocvtp.oc-pruner") is OCVTP
    assert trainable.of_sizes(NetworkSizes()) is OCVTP
    assert trainable.readers(DEMO_PRUNER) == ["ocvtp", "a_variant"]
    assert ocvtp.build_pruner("a_variant", num_keep=4, checkpoint=DEMO_PRUNER).num_keep == 4


@pytest.mark.slow
def test_bench_times_it_without_a_checkpoint(page, module):
    words = ["bench", "--model", "checkpoints/demo-vlm", "--dtype", "float32", "--num-keep", "9"]
    words += ["--pruners", "linear", "ocvtp", "--warmup", "1", "--repetitions", "5"]
    words += ["--new-tokens", "2", "--image-size", "96", "96", "--output", "bench"]
    assert main(words) == 0
    report = Path("bench/report.md").read_text()
    for name in ("linear", "ocvtp"):
        assert f"- {name}: a network of random weights" in report
