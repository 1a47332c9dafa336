"""Tasks of this package, of files and of installed packages, by name and with their flags."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from transformers import LlavaForConditionalGeneration

from ocvtp import plugins
from ocvtp.cli import main
from ocvtp.evaluation.lmms.export import shipped_tasks
from ocvtp.evaluation.tasks import registry, signatures
from ocvtp.evaluation.tasks.base import Item, Supplied, Task
from ocvtp.evaluation.tasks.registry import build_task, list_tasks, register_task, task_class
from ocvtp.evaluation.tasks.vqa import VqaTask

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "checkpoints" / "demo-vlm")
PAGE = (ROOT / "docs" / "add-a-task.md").read_text()
SQUARES = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
LOOK = '''
from typing import Literal

from PIL import Image

from ocvtp.evaluation.tasks.base import Item, Ratio, TokenTask, shares
from ocvtp.evaluation.tasks.registry import register_task


@register_task("middle")
class MiddleTask(TokenTask):
    """Whether a token of the middle is kept."""

    metrics = ("all",)
    counts = "images"

    def __init__(self, size: int, shade: Literal["grey", "white"] = "grey", twice: bool = False):
        self.settings = {"size": size, "shade": shade, "twice": twice}
        self.items = [Item(str(n), n, "Look.", ()) for n in range(4 if twice else 2)]

    def image(self, owner):
        return Image.new("RGB", (self.settings["size"],) * 2, self.settings["shade"])

    def look(self, host, prompt, items):
        kept = prompt.summary()["visual_tokens_kept"]
        return [{"few": float(count < 20)} for count in kept]

    def ratios(self, records):
        return shares(self.items, [record["few"] for record in records])

    def describe(self):
        return self.settings
'''


@pytest.fixture(autouse=True)
def _registered():
    """What a test registers is forgotten after it; its files are imported again by the next."""
    before, modules = dict(registry._REGISTRY), set(sys.modules)
    yield
    for name in registry._REGISTRY.keys() - before.keys() - {*registry.BUILT_IN}:
        del registry._REGISTRY[name]
    for name in {"squares", "middle", "package_of_tasks", "odd"} & sys.modules.keys() - modules:
        del sys.modules[name]
    plugins.load_installed.cache_clear()


@pytest.fixture
def squares(tmp_path):
    path = tmp_path / "squares.py"
    path.write_text(SQUARES)
    return str(path)


def words(file, output, *more, task="squares"):
    common = ["--import", file, "evaluate", "--model", DEMO, "--dtype", "float32", "--task", task]
    rest = ["--pruners", "divprune", "--num-keep", "16", "--seeds", "1", "--no-controls"]
    return [*common, "--output", str(output), *rest, *more]


def registered(name="toy", base=Task, **content):
    """A task that is whole, with what is given."""
    plain = {
        "image": None,
        "ratios": None,
        "describe": lambda self: {},
        "items": [Item("1", 0, "?", ("x",))],
        "metrics": ("all",),
    }
    return register_task(name)(type("Toy", (base,), {**plain, **content}))


def test_all_are_listed_and_found():
    assert set(list_tasks()) >= {"coverage", "pope", "scenes", "vqa"}
    assert list_tasks() == sorted(list_tasks())
    for name in registry.BUILT_IN:
        assert task_class(name).name == name
        assert task_class(name).__module__ == f"ocvtp.evaluation.tasks.{name}"
    assert build_task("scenes", num_images=1, questions=1, size=48).num_images == 1


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_what_a_file_says_is_what_its_class_says(name):
    """Flags are told without the class; they must be its own."""
    assert signatures.of_file(name) == signatures.of_class(task_class(name))
    assert signatures.of_file(name).summary
    assert all(setting.help for setting in signatures.of_file(name).settings)


def test_who_scores_in_lmms_eval_is_there():
    assert sorted(filter(None, (task_class(n).lmms for n in registry.BUILT_IN))) == shipped_tasks()


def test_a_name_is_there_once_and_can_name_a_folder():
    registered("toy-1")
    for name in ("toy-1", "scenes", "pope"):
        with pytest.raises(ValueError, match=f"task '{name}' is registered already; choose an"):
            registered(name)
    for name in ("", "a/b", "a b"):
        with pytest.raises(ValueError, match="pass letters, digits, - and _"):
            registered(name)


def test_a_class_that_is_no_whole_task_is_refused():
    with pytest.raises(ValueError, match="is no Task; derive it from ocvtp.evaluation.tasks.base"):
        register_task("toy")(dict)
    with pytest.raises(ValueError, match="task 'toy' lacks image, ratios; define"):
        register_task("toy")(type("Toy", (Task,), {"describe": None}))
    assert "toy" not in list_tasks()


def test_unknown_names_and_settings_are_named_with_close_ones():
    with pytest.raises(ValueError, match=r"unknown task 'scene'; did you mean 'scenes'\? Known: "):
        task_class("scene")
    with pytest.raises(ValueError, match=r"no setting 'num_image'; did you mean 'num_images'\?"):
        build_task("scenes", num_image=1)
    with pytest.raises(ValueError, match="task 'coverage' needs annotations, processor; pass"):
        build_task("coverage", images=".")


@pytest.mark.parametrize("name", ["items", "metrics"])
def test_a_task_that_asks_nothing_is_refused(name):
    registered(**{name: []})
    with pytest.raises(ValueError, match=f"task 'toy' has no {name}; set self.{name}"):
        build_task("toy")


@pytest.mark.slow
def test_the_example_of_the_page_runs_as_it_says(squares, tmp_path, capsys, monkeypatch):
    (command,) = re.findall(r"^    ocvtp (.*?[^\\])$", PAGE, re.MULTILINE | re.DOTALL)[:1]
    typed = command.replace("\\\n", " ").replace("checkpoints/demo-vlm", DEMO).split()
    monkeypatch.chdir(tmp_path)
    assert main([*typed, "--seeds", "1"]) == 0
    assert "| `divprune`" in capsys.readouterr().out
    facts = json.loads((tmp_path / "outputs/evaluate/squares/results.json").read_text())
    assert facts["settings"]["task"] == {
        "name": "squares", "colours": ["red", "green", "blue"], "num_images": 2,
    }  # fmt: skip
    (row,) = [row for row in facts["rows"] if row["label"] == "unpruned"]
    assert row["figures"]["all"]["value"] > 0.5  # the demo VLM sees colours
    assert set(row["figures"]) == {"red", "green", "blue", "all"}


@pytest.mark.slow
def test_a_run_goes_on_under_its_settings_alone(squares, tmp_path, capsys, monkeypatch):
    asked = []
    generate = LlavaForConditionalGeneration.generate

    @wraps(generate)
    def counted(*args, **kwargs):
        asked.append(1)
        return generate(*args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", counted)
    one = words(squares, tmp_path / "out", "--num-images", "1")
    assert main(one) == 0
    count = len(asked)
    assert count > 0
    assert main(one) == 0
    assert len(asked) == count
    capsys.readouterr()
    assert main(words(squares, tmp_path / "out", "--num-images", "2")) == 2
    assert "under other settings" in capsys.readouterr().err


def test_a_task_without_answers(tmp_path, capsys):
    (tmp_path / "middle.py").write_text(LOOK)
    file = str(tmp_path / "middle.py")
    more = ["--size", "96", "--shade", "white", "--twice", "--json"]
    assert main(words(file, tmp_path / "out", *more, task="middle")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"]["command"].startswith(f"ocvtp --import {file} evaluate --model ")
    assert facts["settings"]["task"] == {
        "name": "middle", "size": 96, "shade": "white", "twice": True,
    }  # fmt: skip
    figures = {row["label"]: row["figures"]["all"] for row in facts["rows"]}
    assert {label: figure["value"] for label, figure in figures.items()} == {
        "unpruned": 0, "divprune": 1,
    }  # fmt: skip
    assert figures["divprune"]["n"] == 4


def test_its_flags_are_shown(squares, tmp_path, capsys):
    for more in ((), ("--task", "squares")):
        with pytest.raises(SystemExit) as status:
            main(["--import", squares, "evaluate", *more, "--help"])
        assert status.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "--colours COLOURS [COLOURS ...]" in shown
        assert "of each colour (default: 4)" in shown
        assert ("--questions-file" in shown) == (more == ())
    assert "squares: The colour of a square, which is somewhere else in every image." in shown


@pytest.mark.parametrize(
    ("task", "more", "problem"),
    [
        ("squares", ["--num-images", "0"], "error: --num-images 0 asks nothing; pass at least 1."),
        ("squares", ["--num-images", "few"], "argument --num-images: invalid int value: 'few'"),
        ("squares", ["--num-imagse", "3"], "unrecognized arguments: --num-imagse 3"),
        ("squares", ["--suffix", "x"], "--task squares has no flag --suffix, which is one of "
         "grounding, pope, vqa; leave it out. It takes --colours, --num-images."),
        ("coverage", ["--colours", "red"], "--task coverage has no flag --colours, which is one of "
         "squares; leave it out. It takes --images, --instances, --num-images."),
        ("squars", [], "unknown task 'squars'; did you mean 'squares'? Known: "),
        ("coverage", ["--images", "."], "--task coverage needs --instances; pass COCO's"),
        ("vqa", ["--questions-file", "a", "b"], "--questions-file a b: vqa reads one file; pass"),
        ("coverage", ["--images", "a", "b", "--instances", "c"], "a, b; annotation files: c; pass"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(squares, tmp_path, capsys, task, more, problem):
    try:
        status = main(words(squares, tmp_path / "out", *more, task=task))
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert problem in capsys.readouterr().err.splitlines()[-1]


def parsed(*more, task="toy"):
    """What the flags of a task become."""
    import argparse

    from ocvtp.commands.tasks import add_task, task_settings

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int)
    given = ["--task", task, *more]
    add_task(parser, given)
    return task_settings(parser.parse_args(given))


@dataclass
class Shapes:
    place: Path | None = None
    either: str | Path = "."
    share: int | float = 0.5
    some: Annotated[list[int], "which, in % of all"] = ()
    two: tuple[int, int] = (1, 2)
    pair: tuple[str, ...] | None = None
    level: Literal[1, 2] = 1
    folders: str | Path | Sequence[str | Path] | None = None
    quiet: bool = True


def test_every_kind_of_flag():
    register_task("toy")(
        type("Toy", (Shapes, Task), dict.fromkeys(["image", "ratios", "describe"]))
    )
    assert parsed() == {}
    found = parsed(
        *"--place a --either b --share 2 --some 1 2 --two 3 4 --pair x y --level 2".split(),
        *"--folders c d --no-quiet".split(),
    )
    assert found == {
        "place": Path("a"), "either": Path("b"), "share": 2.0, "some": [1, 2], "two": (3, 4),
        "pair": ("x", "y"), "level": 2, "folders": [Path("c"), Path("d")], "quiet": False,
    }  # fmt: skip
    assert [setting.help for setting in signatures.of_class(task_class("toy")).settings][3] == (
        "which, in % of all"
    )


def no_rest(self, **rest: int):
    pass


def no_kind(self, size=3):
    pass


def no_flag(self, table: dict[str, int]):
    pass


def of_the_command(self, seeds: int = 3):
    pass


def not_imported(self, size: Sizes = 3):  # noqa: F821
    pass


def all_of_them(cls, supplied: Supplied, **settings: Any):
    pass


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"__init__": no_rest}, r"takes \*\*rest, which names no settings; name each"),
        ({"__init__": no_kind}, "size: nothing, which cannot be a flag; annotate it str"),
        ({"__init__": no_flag}, r"table: dict\[str, int\], which cannot be a flag"),
        ({"__init__": of_the_command}, "the command has the flag --seeds already; give"),
        ({"__init__": not_imported}, "name 'Sizes' is not defined.; import what they name"),
        ({"from_command": classmethod(all_of_them)}, r"takes \*\*settings, which names no"),
    ],
)
def test_what_cannot_be_a_flag_is_said_of_its_own_task_alone(content, problem):
    registered(**content)
    with pytest.raises(ValueError, match=rf"task 'toy' .*{problem}"):
        parsed()
    assert parsed("--levels", "easy", task="scenes") == {"levels": ["easy"]}


def test_what_the_command_supplies(tmp_path):
    class Sized(Task):
        items, metrics = [Item("1", 0, "?", ("x",))], ("all",)
        image = ratios = describe = None

        def __init__(self, size, folder):
            self.made = (size, folder)

        @classmethod
        def from_command(cls, supplied: Supplied, *, scale: int = 1):
            return cls(supplied.processor("a VLM") * scale, supplied.folder)

    from ocvtp.commands.tasks import make_task

    register_task("toy")(Sized)
    supplied = Supplied("toy", tmp_path, lambda: 7)
    assert make_task(supplied, parsed("--scale", "3")).made == (21, tmp_path)
    with pytest.raises(ValueError, match="--task toy needs --model; pass a VLM."):
        make_task(Supplied("toy", tmp_path), {})


def test_an_installed_package(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_tasks.py").write_text(SQUARES)
    facts = tmp_path / "package_of_tasks-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: package_of_tasks\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\nany = package_of_tasks\n")
    plugins.load_installed.cache_clear()
    with pytest.raises(SystemExit):
        main(["evaluate", "--task", "squares", "--help"])
    assert "--colours" in capsys.readouterr().out
    assert "squares" in list_tasks()
    assert len(build_task("squares", num_images=1).items) == 2

    (facts / "entry_points.txt").write_text(f"[{registry.GROUP}]\nany = broken_package\n")
    plugins.load_installed.cache_clear()
    with pytest.raises(ValueError, match="'broken_package' cannot be loaded"):
        list_tasks()
    assert parsed(task="scenes") == {}  # one of this package needs no other
    (facts / "entry_points.txt").write_text("")


def test_a_task_of_ones_own_for_lmms_eval(tmp_path, capsys):
    class Short(VqaTask):
        max_new_tokens = 2

    register_task("short")(Short)
    (tmp_path / "list.json").write_text('[{"image": "a.png", "question": "?", "answers": ["x"]}]')
    build_task("scenes", num_images=1, questions=1).image(0).save(tmp_path / "a.png")
    files = ["--questions-file", str(tmp_path / "list.json")]
    assert main(["lmms-task", "--task", "short", *files, "--output", str(tmp_path / "out")]) == 0
    config = yaml.safe_load((tmp_path / "out" / "ocvtp_short_local.yaml").read_text())
    assert Path(config["include"]).name == "ocvtp_vqa_local.yaml"
    assert config["task"] == "ocvtp_short_local"
    assert config["generation_kwargs"] == {"max_new_tokens": 2, "do_sample": False}
    capsys.readouterr()
    registered()
    for name in ("coverage", "toy"):
        assert main(["lmms-task", "--task", name, "--output", str(tmp_path)]) == 2
        said = (
            f"task '{name}' is none that lmms-eval can ask; pass one of scenes, pope, vqa, short."
        )
        assert said in capsys.readouterr().err


def test_a_file_that_registers_an_unfinished_task_is_named(tmp_path, capsys):
    lines = SQUARES.partition("    def describe")[0]
    (tmp_path / "odd.py").write_text(lines)
    assert main(["--import", str(tmp_path / "odd.py"), "list"]) == 2
    assert "fails with ValueError: task 'squares' lacks describe; define" in capsys.readouterr().err
