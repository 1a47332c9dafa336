"""The README and the documentation say what is true, and lead where they say."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from ocvtp.evaluation.tasks import registry as task_registry
from ocvtp.pruners import registry as pruner_registry

DOCS = Path("docs")
README = Path("README.md")
PAGES = sorted(DOCS.rglob("*.md"))
READ = [README, Path("CONTRIBUTING.md"), Path("examples/README.md"), *PAGES]
# needs vLLM, which has an environment of its own; test_readme.py runs it as a module
NOT_RUN = {"vllm.md", "CONTRIBUTING.md"}


def site() -> dict[str, object]:
    return yaml.safe_load(Path("mkdocs.yml").read_text())


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


@cache
def whole(path: Path) -> str:
    """The text of a page, with what it takes from other files."""

    def taken(match: re.Match[str]) -> str:
        file, _, section = match[1].partition(":")
        text = Path(file).read_text()
        mark = "<!-- --8<-- [{}:" + section + "] -->\n"
        start, end = mark.format("start"), mark.format("end")
        assert text.count(start) == text.count(end.rstrip("\n")) == 1, f"{path}: {match[1]}"
        return text.partition(start)[2].partition(end.rstrip("\n"))[0]

    return re.sub(r'^--8<-- "(.+?)"$', taken, path.read_text(), flags=re.MULTILINE)


@cache
def anchors(path: Path) -> set[str]:
    """What a heading is called in links."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", whole(path), flags=re.S), re.M):
        title, _, given = title.partition(" { #")
        words = re.sub(r"[^\w\s-]", "", title).strip().lower()
        found.add(given.rstrip(" }") or re.sub(r"[\s-]+", "-", words))
    return found


@pytest.mark.parametrize("path", READ, ids=str)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(whole(path))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = path if not file else path.parent / file
        assert there.exists(), f"{path}: {target}"
        assert path.parts[0] != "docs" or DOCS.resolve() in there.resolve().parents, target
        assert not anchor or anchor in anchors(there), f"{path}: {target}"


@pytest.mark.parametrize("page", [Path("examples/README.md"), DOCS / "quick-start.md"], ids=str)
def test_tables_of_examples_have_all(page):
    there = {path.name for path in Path("examples").iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"^\| \W*(\w+\.(?:py|ipynb))", page.read_text(), re.M)) == there


def test_links_look_at_anchors():
    assert "what-select-costs" in anchors(DOCS / "results.md")
    assert "did-it-work" in anchors(DOCS / "train.md")
    assert "other-stages" in anchors(DOCS / "add-a-pruner.md")  # of the part that it takes


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) < 200
    assert [line for line in lines if len(line) > 130] == []


def test_a_clone_stays_editable_whatever_is_installed_of_it():
    """Without `-e`, an extra would put a copy in place of what `make install` has made."""
    code = [path for folder in ("ocvtp", "examples") for path in Path(folder).rglob("*.py")]
    for path in [*READ, *code]:
        assert not re.search(r"pip install (['\"]?\.(\[|\s|$))", path.read_text(), re.M), path


def test_the_readme_has_what_a_new_user_looks_for():
    text = README.read_text()
    for what in ("make demo", "make test", "pip install", "](docs/images/kept.png)"):
        assert what in text
    assert text.index("## Limits") < text.index("## Prune a model")
    assert [len(re.findall(rf"^    ocvtp {c} ", text, re.M)) for c in ("train", "evaluate")] == [
        1,
        1,
    ]
    size = sum(file.stat().st_size for file in (DOCS / "images").iterdir())
    assert size < 300_000


def test_the_choice_of_pruners_is_five_rows_that_were_measured():
    from benchmarks.accuracy import CHOSEN, choosing_table
    from ocvtp.pruners import list_pruners

    rows = re.findall(r"^\| .+ \| `(\w+)` \|", choosing_table(), re.MULTILINE)
    assert rows == list(CHOSEN)
    assert len(rows) == 5
    assert set(rows) <= set(list_pruners())
    table = re.search(r"(^\|.*\n)+", README.read_text(), re.MULTILINE)[0]
    assert table in choosing_table()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "path", [p for p in READ if "```python" in p.read_text() and p.name not in NOT_RUN], ids=str
)
def test_its_python_runs_when_it_is_pasted(path, monkeypatch):
    """Block after block, as a reader would; what it registers is forgotten."""
    for registry in (pruner_registry, task_registry):
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    if path == README:
        assert names["output"].shape[0] == 1
        end = names["processor"].decode(names["output"][0], skip_special_tokens=True)
        assert end.endswith("1"), "the picture's caption says that the answer is right"


def commands(text: str) -> list[tuple[str, str]]:
    """(command, its words) of every `ocvtp COMMAND ...` that a page writes."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"(?:^    |`)ocvtp ([a-z]+(?:-[a-z]+)*)([^`\n#]*)", joined, re.MULTILINE)


@pytest.mark.parametrize("path", READ, ids=str)
def test_its_commands_exist_with_their_flags(path, capsys):
    from ocvtp.cli import main

    for command, words in commands(whole(path)):
        flags = re.findall(r"(?<=\s)--[a-z][\w.-]*", words)
        if command == "train":
            assert not [flag for flag in flags if not known_to_train(flag)], words
            continue
        if command == "extract":  # its other settings are those of train
            flags = [flag for flag in flags if not known_to_train(flag)]
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        text = capsys.readouterr().out
        for flag in flags:
            assert re.search(rf"{flag}\b", text), f"{path}: ocvtp {command} has no {flag}"


def known_to_train(flag: str) -> bool:
    """Whether `ocvtp train` takes a flag, by its parser."""
    return flag.removeprefix("--") in train_settings()


@cache
def train_settings() -> set[str]:
    from ocvtp.training.run import build

    cli = build(["--config", "configs/train/scenes.yaml", "--data.root", "outputs/none"])
    keys = {key.replace(".init_args", "") for key in cli.config.keys(branches=True)}
    return keys | {"config", "help", "print_config", "resume", "output", "data.on_error"}


@pytest.mark.slow
def test_every_command_is_on_the_page_of_commands(capsys):
    from ocvtp.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    there = re.findall(r"^    ([a-z]+(?:-[a-z]+)?) ", capsys.readouterr().out, re.MULTILINE)
    page = (DOCS / "commands.md").read_text()
    rows = re.findall(r"^\| `ocvtp ([a-z]+(?:-[a-z]+)?)", page, re.MULTILINE)
    assert len(rows) > 10
    assert sorted(rows) == sorted(there)


def test_models_with_random_weights_are_on_the_page_of_commands():
    from ocvtp.hosts.loading import FULL_SIZE_MODELS, RANDOM_MODELS

    page = (DOCS / "commands.md").read_text()
    named = set(re.findall(r"random:[\w.-]+", page)) - {"random:tiny"}
    assert named | {"random:demo"} == {*RANDOM_MODELS, *FULL_SIZE_MODELS}


def test_its_make_targets_and_files_exist():
    makefile = Path("Makefile").read_text()
    for path in READ:
        text = path.read_text()
        for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path}: make {target}"
        for file in re.findall(
            r"`((?:configs|examples|benchmarks|checkpoints|tests)/[\w/.-]+)`", text
        ):
            made = file.startswith(
                (
                    "checkpoints/mine",
                    "checkpoints/NAME",
                    "checkpoints/official",
                    "checkpoints/demo-pruner/S",
                    "checkpoints/photo-pruner",
                )
            )
            assert made or Path(file).exists(), f"{path}: {file}"


def test_the_site_lists_every_page():
    def pages(part):
        if isinstance(part, str):
            yield part
        for one in (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        ):
            yield from pages(one)

    listed = list(pages(site()["nav"]))
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in PAGES)


def test_the_site_asks_no_other_server():
    settings = site()
    assert settings["theme"]["font"] is False
    assert settings["strict"] is True
    fences = [p for p in PAGES if "```mermaid" in p.read_text()]  # drawn by a script from elsewhere
    assert fences == []
    for file in [*DOCS.glob("*.css"), *DOCS.rglob("*.svg")]:
        assert not re.search(r"url\((?!#)|@import|<script", file.read_text()), file
    assert not [k for k in ("extra_javascript", "site_url") if k in settings]


def test_generated_parts_are_what_make_readme_writes():
    from benchmarks.readme import sections

    for name, contents in sections().items():
        text = Path(name).read_text()
        for section, content in contents.items():
            found = re.search(rf"<!-- {section}: .*?-->\n(.*?)<!-- /{section} -->", text, re.DOTALL)
            assert found, f"{name} lacks the section {section}"
            assert found[1] == content, f"{name}: {section}; run `make readme`"


def said_by_the_code() -> str:
    """All texts of the package, one a line; what a message puts in is a gap."""
    texts = []
    for path in Path("ocvtp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


@pytest.mark.slow
def test_messages_that_are_explained_are_the_codes_own():
    page, said = (DOCS / "troubleshooting.md").read_text(), said_by_the_code()
    terms = re.findall(r"^(`.+)\n:   ", page, re.MULTILINE)
    assert len(terms) > 30
    for message in re.findall(r"`([^`]+)`", "\n".join(terms)):
        if message.startswith(("ModuleNotFoundError", "output_attentions", "num_keep")):
            continue  # another project's, or a name
        gaps = [re.escape(piece.strip()) for piece in message.split("...")]
        pattern = r"[^\n]*?".join(gaps)
        assert re.search(pattern, said), message


def test_the_glossary_has_one_row_a_word():
    rows = re.findall(r"^\| \*\*(\w+)\*\*", whole(DOCS / "glossary.md"), re.MULTILINE)
    assert len(rows) >= 20
    assert len(set(rows)) == len(rows)


def test_the_pictures_of_training_are_of_the_run_beside_them():
    from benchmarks import curves

    points = curves.points("val/loss")
    first, last = f"{points[0][1]:.3f}", f"{points[-1][1]:.3f}"
    assert f"| {first} to {last} |" in (DOCS / "train.md").read_text()
    assert [epoch for epoch, _ in points] == list(range(1, 13))
