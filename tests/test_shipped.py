"""What comes with the package, from a checkout and from a wheel."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from fresh_process import RUN, outputs
from packaging.requirements import Requirement

import ocvtp
from ocvtp import shipped
from ocvtp.cli import main
from ocvtp.pruners.trainable import readers
from ocvtp.structures import VisualTokens

CONFIGS = Path("configs").resolve()
TRAIN = sorted(
    path.relative_to(CONFIGS / "train").with_suffix("").as_posix()
    for path in (CONFIGS / "train").rglob("*.yaml")
)


def test_names_are_the_files():
    assert shipped.config_names("train") == TRAIN
    assert {"scenes", "demo_kept", "clip_l14_336"} <= set(TRAIN)
    assert shipped.config_names("demo_vlm") == ["cpu", "gpu"]


@pytest.mark.parametrize("name", TRAIN)
def test_a_configuration_is_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = CONFIGS / "train" / f"{name}.yaml"
    for form in (
        name,
        f"{name}.yaml",
        f"configs/train/{name}.yaml",
        f"./configs/train/{name}.yaml",
    ):
        assert Path(shipped.find_config(form, "train")) == expected


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").write_text("seed_everything: 1\n")
    assert shipped.find_config("scenes", "train") == "scenes"
    (tmp_path / "scenes").unlink()
    (tmp_path / "scenes").mkdir()  # a folder is no configuration
    assert shipped.find_config("scenes", "train") != "scenes"


@pytest.mark.parametrize(
    ("name", "kind", "hint"),
    [
        ("scene", "train", "did you mean 'scenes'?"),
        ("cpu", "train", "come with ocvtp; pass the path"),
        ("nowhere/scenes.yaml", "train", "no settings of that name"),
        ("other/configs/train/scenes.yaml", "train", "no settings of that name"),
        ("scenes", "demo_vlm", "or one of cpu, gpu."),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_there_are(name, kind, hint):
    with pytest.raises(ValueError, match=f"--config {name} is no file") as error:
        shipped.find_config(name, kind)
    assert hint in str(error.value)
    assert str(error.value).endswith(f"or one of {', '.join(shipped.config_names(kind))}.")


def test_every_form_of_the_flag():
    path = str(CONFIGS / "train" / "scenes.yaml")
    words = ["--config", "scenes", "--config=scenes", "-c", "scenes", "--trainer.max_epochs=1"]
    assert shipped.with_configs(words, "train") == [
        *("--config", path, f"--config={path}", "-c", path, "--trainer.max_epochs=1")
    ]
    same = [
        "--config",
        "trainer: {max_epochs: 1}",
        "--seed_everything",
        "3",
        "--data.root",
        "scenes",
    ]
    assert shipped.with_configs(same, "train") == same
    assert shipped.with_configs(["--config"], "train") == ["--config"]


def test_commands_refuse_an_unknown_name_in_one_line(capsys):
    for words in (["train", "--config", "scene"], ["demo-vlm", "--config", "gp"]):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        errors = [line for line in captured.err.splitlines() if "ocvtp: error: " in line]
        assert len(errors) == 1
        assert "or one of" in errors[0]


def test_the_demo_model_is_found_from_any_folder(tmp_path, monkeypatch):
    from ocvtp.encoders.clip import CLIPEncoder
    from ocvtp.hosts.loading import load_model
    from ocvtp.hosts.prompt.clip_text import load_clip_text

    monkeypatch.chdir(tmp_path)
    model, processor = load_model("checkpoints/demo-vlm", "float32")
    assert CLIPEncoder("checkpoints/demo-vlm", layer=3).tower_id == "checkpoints/demo-vlm"
    assert load_clip_text(model.model.vision_tower, "checkpoints/demo-vlm/clip") is not None
    with pytest.raises(ValueError, match=r"pass text_tower='\S+/checkpoints/demo-vlm/clip', which"):
        ocvtp.attach(model, ocvtp.build_pruner("trim", num_keep=4), processor=processor)
    pruner = ocvtp.build_pruner("ocvtp", num_keep=4, checkpoint="checkpoints/demo-pruner/0")
    assert pruner.network.config.tower == "checkpoints/demo-vlm"


def test_a_folder_that_exists_wins_and_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "openai/clip",
        "checkpoints",
        "checkpoints/none",
        "/checkpoints/demo-vlm",
        "demo-vlm",
    ):
        found = shipped.find_folder(name)
        assert found == name or Path(found) == shipped.ROOT / name
    assert shipped.find_folder("checkpoints/none") == "checkpoints/none"
    assert (
        Path(shipped.find_folder("checkpoints/demo-vlm")) == shipped.ROOT / "checkpoints/demo-vlm"
    )
    (tmp_path / "checkpoints/demo-vlm").mkdir(parents=True)
    assert shipped.find_folder("checkpoints/demo-vlm") == "checkpoints/demo-vlm"


def test_version(capsys):
    with pytest.raises(SystemExit) as status:
        main(["--version"])
    assert status.value.code == 0
    assert capsys.readouterr().out == f"ocvtp {ocvtp.__version__}\n"


PRUNERS = sorted(
    path.parent.as_posix() for path in Path("checkpoints").glob("*-pruner/*/config.json")
)


RECIPES = {"demo-pruner": "demo_kept", "photo-pruner": "photos_surprise"}
LARGEST = {"demo-pruner": 2e6, "photo-pruner": 4e6}
"""Bytes of the weights."""


@pytest.mark.parametrize("folder", PRUNERS)
def test_shipped_pruners_are_of_the_recipe_beside_them(folder):
    config = json.loads((Path(folder) / "config.json").read_text())
    recipe = CONFIGS / "train" / f"{RECIPES[Path(folder).parent.name]}.yaml"
    model = yaml.safe_load(recipe.read_text())["model"]
    sizes = model["network"].get("init_args")
    held = config if sizes is None else config["sizes"]
    asked = model["network"] if sizes is None else sizes
    assert {name: held[name] for name in asked} == asked
    assert config["layer"] == model["encoder"]["init_args"]["layer"]
    assert config["num_slots"] == model["num_slots"]
    objective = model.get("objective", {"init_args": {}})["init_args"]
    assert config.get("target_layer") == objective.get("target_layer")
    assert config["training"]["lr"] == model["lr"]


@pytest.mark.parametrize("folder", PRUNERS)
def test_shipped_pruners_choose_and_hold_no_weights_but_their_own(folder):
    (reader,) = readers(folder)
    pruner = ocvtp.build_pruner(reader, num_keep=16, checkpoint=folder)
    config = pruner.network.config
    run, kind = config.training, Path(folder).parent.name
    assert run["seed"] == int(Path(folder).name)
    assert config.objective == RECIPES[kind].partition("_")[2]
    assert run["steps"] > 100
    names = sorted(path.name for path in Path(folder).iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert (Path(folder) / "model.safetensors").stat().st_size < LARGEST[kind]
    count = config.grid_hw[0] * config.grid_hw[1]
    wide = torch.randn(1, count, config.feature_dim)
    tokens = VisualTokens(
        features=wide,
        grid_hw=config.grid_hw,
        hidden=dict.fromkeys(pruner.needs.hidden, wide),
        attention=dict.fromkeys(pruner.needs.attention, torch.rand(1, count)),
    )
    assert pruner.select(tokens).keep_indices.shape == (1, 16)


# -------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run(
        [sys.executable, *words, "--wheel-dir", str(folder)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shipped_scorers_are_of_the_recipe_beside_them(seed):
    folder = f"checkpoints/demo-learned/{seed}"
    recipe = yaml.safe_load((CONFIGS / "train/selector/kl.yaml").read_text())["model"]["init_args"]
    pruner = ocvtp.build_pruner("learned", num_keep=16, checkpoint=folder)
    config = pruner.network.config
    assert (config.scorer, config.objective) == ("prompted", recipe["recipe"])
    assert config.sizes.items() >= recipe["scorer"]["init_args"].items()
    assert config.choice == recipe["choice"]
    assert list(config.num_slots) == recipe["budgets"]
    assert config.losses.keys() == recipe["losses"].keys()
    assert config.training["seed"] == seed
    assert config.training["lr"] == recipe["lr"]
    assert {path.name for path in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
    assert (Path(folder) / "model.safetensors").stat().st_size < 1e6


@pytest.mark.slow
def test_the_wheel_holds_what_is_needed_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = Parser().parsestr(archive.read(metadata).decode())
    shipped_folders = ("demo-vlm", "demo-pruner", "demo-learned")
    parts = ("ocvtp", "configs", *(f"checkpoints/{name}" for name in shipped_folders))
    files = {path for part in parts for path in Path(part).rglob("*") if path.is_file()}
    here = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    expected = {name if name.startswith("ocvtp/") else f"ocvtp/{name}" for name in here}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert wheel.stat().st_size < 10e6
    assert facts["Version"] == ocvtp.__version__
    needs = [need.replace(" ", "") for need in facts.get_all("Requires-Dist")]
    assert "transformers<6,>=5.17" in needs


@pytest.mark.slow
def test_the_source_distribution_makes_the_same_wheel(wheel, tmp_path):
    code = f"from hatchling.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "tests/commands/test_cli.py",
        "configs/train",
    ):
        assert (source / name).exists()
    words = ["-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, *words, "--wheel-dir", str(tmp_path)], check=True, capture_output=True
    )
    (again,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())


# ------------------------------------------------------------------------ a bare environment


def distributions_of(needs: Iterable[str]) -> dict[str, Distribution]:
    """What these name, and all that it declares to need."""
    found: dict[str, Distribution] = {}
    left, seen = [(Requirement(need), "") for need in needs], set()
    while left:
        need, asked_as = left.pop()
        if need.marker is not None and not need.marker.evaluate({"extra": asked_as}):
            continue
        for extra in {"", *need.extras} - {e for name, e in seen if name == need.name}:
            seen.add((need.name, extra))
            found[need.name] = distribution(need.name)
            left += [(Requirement(more), extra) for more in found[need.name].requires or ()]
    return found


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment that has the wheel and what it declares to need.

    The needed packages are links to those of this environment, which has more.
    """
    folder = tmp_path_factory.mktemp("bare")
    words = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(words, check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        needs = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    for found in distributions_of(needs).values():
        for top in {path.parts[0] for path in found.files or () if path.parts[0] != ".."}:
            place = site / top
            if top != "__pycache__" and not place.exists():
                place.symlink_to(found.locate_file(top))
    words = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    run = subprocess.run(
        [*words, "--quiet", "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return folder / "bin"


IN_THE_WHEEL = "import ocvtp, sys; assert ocvtp.__file__.startswith(sys.prefix), ocvtp.__file__\n"
NO_RECIPE = """
from ocvtp.cli import main
sys.stderr = sys.stdout
assert main(["demo-vlm", "--config", "cpu"]) == 2
"""


@pytest.mark.slow
def test_the_wheel_works_and_needs_no_more_than_it_declares(bare, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    absent = subprocess.run([str(bare / "python"), "-c", "import pytest"], capture_output=True)
    assert absent.returncode != 0
    version = subprocess.run(
        [str(bare / "ocvtp"), "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert version.stdout == f"ocvtp {ocvtp.__version__}\n"
    train = ["train", "--config", "scenes", "--trainer.max_epochs", "1"]
    train += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    train += ["--data.num_train", "16", "--data.num_val", "4", "--output", "run"]
    export = ["export", "--checkpoint", "run/checkpoints/last.ckpt", "--output", "mine"]
    demo = ["--model", "checkpoints/demo-vlm"]
    evaluate = ["evaluate", *demo, "--task", "scenes", "--num-images", "1", "--levels", "easy"]
    evaluate += ["--pruners", "divprune", "--num-keep", "16", "--dtype", "float32"]
    evaluate += ["--output", "judged"]
    flops = ["flops", *demo, "--num-keep", "8", "--pruners", "ocvtp"]
    flops += ["--checkpoint", "checkpoints/demo-pruner/0"]
    commands = [["list", "--json"], train, export, evaluate, flops]
    codes = [*(RUN.format(words=words) for words in commands), NO_RECIPE]
    listed, _, _, _, counted, told = outputs(
        [IN_THE_WHEEL + code for code in codes],
        first="import torch, transformers, pytorch_lightning",
        folders=[tmp_path] * len(codes),
        python=str(bare / "python"),
    )
    assert [row["name"] for row in json.loads(listed)["pruners"]] == ocvtp.list_pruners()
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "mine").iterdir()}
    assert (tmp_path / "judged/accuracy.png").is_file()
    assert "| ocvtp" in counted
    assert "is in the repository, not in the installed package; clone it" in told


def test_the_citation_is_of_this_version():
    facts = yaml.safe_load(Path("CITATION.cff").read_text())
    assert facts["version"] == ocvtp.__version__
    changes = Path("CHANGELOG.md").read_text()
    assert f"## {ocvtp.__version__} - {facts['date-released']}" in changes
    assert {"cff-version", "title", "message", "authors", "license"} <= facts.keys()


@pytest.mark.parametrize(
    "name", ["outputs/a/b", "./llava", "/no/such/folder", "checkpoints/demo", "docs/none"]
)
def test_what_can_only_be_a_folder_is_not_looked_for_in_a_hub(name):
    with pytest.raises(ValueError, match="does not exist; pass a folder that does, or a hub id"):
        shipped.find_weights(name)


@pytest.mark.parametrize("name", ["llava-hf/llava-1.5-7b-hf", "gpt2", "checkpoints/demo-vlm"])
def test_hub_ids_and_folders_pass(name):
    assert shipped.find_weights(name) in (name, str(shipped.ROOT / name))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("proxies", [{}, {"https": "http://here"}])
def test_a_hub_whose_name_is_not_known_is_not_asked(monkeypatch, known, proxies):
    """Unless a proxy is to ask it. It is asked again where the network comes back."""

    def look_up(*_):
        if not known:
            raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(shipped, "getproxies", lambda: proxies)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shipped, "_is_to_be_offline", lambda: False)
    shipped.find_weights("nobody/nothing")
    assert huggingface_hub.is_offline_mode() == (not known and not proxies)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    shipped.find_weights("nobody/nothing")
    assert not huggingface_hub.is_offline_mode()
