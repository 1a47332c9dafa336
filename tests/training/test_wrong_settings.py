"""Settings that do not parse: one line that says what is wrong, and what was meant."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
import yaml
from pytorch_lightning.cli import LightningArgumentParser

from ocvtp.cli import main
from ocvtp.commands.train import HELP
from ocvtp.hosts.gating import GATES
from ocvtp.selectors.relaxations import RELAXATIONS
from ocvtp.selectors.scorer import SCORERS
from ocvtp.training.run import build
from ocvtp.training.wrong_settings import CLASSES, explain, parameters

CONFIG = "configs/train/scenes.yaml"


def error_of(words, capsys) -> str:
    """The one line on standard error."""
    with pytest.raises((SystemExit, ValueError)) as stop:
        build(words)
    if isinstance(stop.value, ValueError):
        return f"ocvtp: error: {stop.value}"
    assert stop.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if not text.startswith("INFO")]
    return line


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--data.rot", "x"],
            "data.rot is no setting of SceneDataModule; did you mean --data.root?",
        ),
        (["--data.init_args.rot", "x"], "did you mean --data.root?"),
        (["--data.batchsize", "3"], "did you mean --data.batch_size?"),
        (["--data.num_trian", "3"], "did you mean --data.num_train?"),
        (["--model.lrr", "1"], "model.lrr is no setting; did you mean --model.lr?"),
        (["--model.objectiv.power", "1"], "did you mean --model.objective.power?"),
        (
            ["--model.encoder.layr", "1"],
            "no setting of CLIPEncoder; did you mean --model.encoder.lay",
        ),
        (["--model.network.slotdim", "1"], "did you mean --model.network.slot_dim?"),
        (
            ["--model.objective.penalti", "1"],
            "SlotsObjective, which has cap, decoder, legacy, power",
        ),
        (
            ["--model.objective.decoder.layers", "1"],
            "did you mean --model.objective.decoder.num_la",
        ),
        (["--trainer.max_epoch", "1"], "did you mean --trainer.max_epochs?"),
        (["--checkpoint.dirpth", "1"], "did you mean --checkpoint.dirpath?"),
        (["--resum", "x"], "did you mean --resume?"),
        (["--seed-everything", "1"], "did you mean --seed_everything?"),
        (["--batch_size", "3"], "did you mean --data.batch_size?"),
        (["--lr=3"], "did you mean --model.lr?"),
        (["--epochs", "3"], "--trainer.max_epochs"),
        (["--qwertzu", "3"], "qwertzu is no setting; see `ocvtp train --help all`"),
        (["scenes.yaml"], "'scenes.yaml' follows no setting"),
        (["--model.lr", "abc"], "model.lr is 'abc'; pass a number"),
        (["--model.encoder.layer", "1.5"], "model.encoder.layer is '1.5'; pass a whole number"),
        (["--data.batch_size", "abc"], "data.batch_size is 'abc'; pass a whole number"),
        (["--data.level", "medium"], "data.level is 'medium'; pass 'easy' or 'hard' or 'both'"),
        (["--model.network.choice", "x"], "pass 'winners' or 'one_to_one' or 'restore'"),
        (["--trainer.max_epochs", "x"], "trainer.max_epochs is 'x'; pass a whole number or null"),
        (["--trainer.precision", "bf15"], "trainer.precision is 'bf15'; pass "),
        (["--seed_everything", "x"], "seed_everything is 'x'; pass "),
        (["--data", "ScenesDataModule"], "did you mean ocvtp.data.module.SceneDataModule?"),
        (
            ["--data", "ocvtp.encoders.clip.CLIPEncoder"],
            "is a class that is no LightningDataModule; pass one of",
        ),
        (["--model.encoder", "ocvtp.encoders.clip.ClipEncoder"], "encoders.clip.CLIPEncoder?"),
        (["--model.objective.class_path", "foo.Bar"], "'foo.Bar', which is no class that can be"),
        (["--trainer.logger", "CSVLoger"], "did you mean pytorch_lightning.loggers.CSVLogger?"),
        (["--trainer.callbacks", "EarlyStoping"], "pytorch_lightning.callbacks.EarlyStopping?"),
        (["--trainer.max_epochs"], "--trainer.max_epochs: expected one argument"),
        (["--trainer.max_time", "soon"], "not a valid duration"),
        (["--trainer.accelerator", "gpuu"], "gpuu"),
    ],
)
def test_words(words, message, capsys):
    error = error_of(["--config", CONFIG, *words], capsys)
    assert error.startswith("ocvtp: error: ")
    assert message in error
    assert "\n" not in error
    assert "Union" not in error
    assert len(error) < 400


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.relaxation.tau=0"], "tau=0.0; pass a number above 0"),
        (["--model.gate.floor=2"], "floor=2.0; pass a share"),
        (["--model.lrr=1"], "did you mean --model.lr?"),
        (["--model.host.modle=x"], "model.host.modle is no setting of FrozenModel; did you mean "),
        (["--model.host={modle: x}"], "did you mean --model.host.model?"),
        (["--model.hots.model=x"], "model.hots is no setting of SelectorModule; did you mean --m"),
        (["--model.host=x"], "model.host is 'x'; pass a mapping"),
        (["--model.host.layer=x"], "model.host.layer is 'x'; pass a whole number or null"),
        (["--model.scorer=prompted"], "did you mean ocvtp.selectors.scorers.prompted.Prompted?"),
        (["--model.scorer=foo"], "pass one of ocvtp.selectors.scorers.pointwise.Pointwise, "),
        (["--model.relaxation=hard_st"], "did you mean ocvtp.selectors.relaxations.HardST?"),
        (["--model.gate=key_bias"], "did you mean ocvtp.hosts.gating.KeyBias?"),
        (["--model=Selector"], "did you mean ocvtp.training.selector.SelectorModule?"),
    ],
)
def test_words_of_a_scorer(words, message, capsys):
    error = error_of(["--config", "configs/train/selector/kl.yaml", *words], capsys)
    assert message in error
    assert "\n" not in error
    assert "Union" not in error


@pytest.mark.parametrize(
    ("key", "parts"),
    [("model.scorer", SCORERS), ("model.relaxation", RELAXATIONS), ("model.gate", GATES)],
)
def test_every_part_can_be_named(key, parts):
    found = {f"{part.__module__}.{part.__name__}" for part in map(parts.find, parts.names())}
    own = {path for path in found if path.startswith("ocvtp.")} - {"ocvtp.hosts.gating.NoGate"}
    assert own == set(CLASSES[key])


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("data", "init_args", "rot"), 1, "did you mean --data.root?"),
        (("model", "lrr"), 1, "did you mean --model.lr?"),
        (("trainer", "max_epoch"), 1, "did you mean --trainer.max_epochs?"),
        (("checkpoint", "dirpth"), 1, "did you mean --checkpoint.dirpath?"),
        (("modl",), {"lr": 1}, "modl.lr is no setting; did you mean --model.lr?"),
        (("model", "num_slots"), ["a"], "model.num_slots is 'a'; pass a whole number"),
        (("model", "objective", "init_args", "decoder", "kind"), "x", "decoder.kind is 'x'; pass "),
        (("data", "class_path"), None, "data names no class"),
        (("model", "encoder"), None, "--model.encoder must be set"),
        (("data", "class_path"), "ScenDataModule", "ocvtp.data.module.SceneDataModule?"),
        (
            ("trainer", "logger"),
            [{"class_path": "CSVLogger", "init_args": {"save_dirr": "x"}}],
            "did you mean --trainer.logger.save_dir?",
        ),
        (
            ("trainer", "logger"),
            [{"class_path": "CSVLogger", "init_args": {"name": "x"}}],
            "--trainer.logger.save_dir must be set",
        ),
        (("model", "network", "hidden_dim"), -3, "hidden_dim=-3; pass a whole number, at least 1"),
    ],
)
def test_files(tmp_path, place, value, message, capsys):
    settings = yaml.safe_load(open(CONFIG))
    inner = settings
    for name in place[:-1]:
        inner = inner[name]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    error = error_of(["--config", str(path)], capsys)
    assert error.startswith("ocvtp: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; pass the path of a YAML file"),
        (b"a: [1\nb: {", "is no file of settings"),
        (b"- 1\n- 2\n", "is no file of settings"),
        (b"\x80\x81\x00", "is no text"),
        (b"[" * 5000, "it nests deeper than 64; take brackets out"),
    ],
)
def test_files_that_are_none(tmp_path, content, message, capsys):
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    error = error_of(["--config", str(path)], capsys)
    assert error.startswith("ocvtp: error: ")
    assert message in error
    assert "\n" not in error


def test_a_file_that_is_nearly_there(capsys):
    error = error_of(["--config", "configs/train/scens.yaml"], capsys)
    assert re.search(
        r"--config \S*/scens.yaml does not exist; did you mean \S*/scenes.yaml\?", error
    )
    assert "is no file of settings" in error_of(["--config", "configs/train"], capsys)


def test_nothing_at_all(capsys):
    assert "--model.encoder, --data must be set, here or in a file: --config" in error_of(
        [], capsys
    )
    assert "data names no class" in error_of(["--data.root", "x"], capsys)


def test_messages_of_other_versions_are_told_in_one_line():
    parser = LightningArgumentParser()
    assert explain(parser, 'No idea\n  what "x"\n is') == 'No idea what "x" is'
    assert len(explain(parser, "x" * 9999)) == 400


def test_the_classes_that_are_proposed_exist():
    for paths in CLASSES.values():
        for path in paths:
            module, name = path.rsplit(".", 1)
            assert hasattr(importlib.import_module(module), name)


@pytest.mark.slow
def test_the_short_help_names_settings_that_exist():
    """And is printed without a parser, which takes seconds to import."""
    clis = [build(["--config", name]) for name in (CONFIG, "configs/train/selector/mask.yaml")]
    known = clis[0].parser._option_string_actions.keys() | {"--config", "--help"}
    settings = "".join(cli.parser.dump(cli.config) for cli in clis)
    for flag in set(re.findall(r"--[a-z_.]+", HELP)) - {"--print", "--check"} - known:
        assert flag.startswith(("--data.", "--model.")), flag
        name = flag.rstrip(".").rsplit(".", 1)[1]
        own = ("help", *parameters("ocvtp.training.selector.SelectorModule"))
        assert name in own or f"{name}:" in settings, flag


def test_the_short_help_imports_no_trainer():
    code = (
        "import sys; from ocvtp.cli import main; status = main(['train', '--help']);"
        "heavy = {'pytorch_lightning', 'torchmetrics', 'jsonargparse', 'torch'};"
        "heavy &= sys.modules.keys();"
        "sys.exit(', '.join(heavy) or status)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == HELP
    assert len(HELP.splitlines()) < 60
    assert max(map(len, HELP.splitlines())) <= 100


def test_the_whole_help_is_there_when_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help", "all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ocvtp train --config FILE|NAME [--output DIR] [--resume CKPT]")
    assert "--trainer.accumulate_grad_batches" in text
    assert "Raises:" not in text


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.questions", "0"], "questions=0"),
        (["--model.losses.mask.weigth", "3"], "did you mean 'weight'"),
        (["--model.scorer.heads", "5"], "dim=64"),
        (["--model.host.layer", "1"], "stage"),
        (["--model.choice", "best"], "'best'"),
    ],
)
def test_what_a_class_says_of_its_arguments_is_one_line(words, told, capsys):
    error = error_of(["--config", "configs/train/selector/mask.yaml", *words], capsys)
    assert told in error
    assert "Namespace" not in error
