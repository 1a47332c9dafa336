"""`ocvtp serve` and `ocvtp serve-check` without vLLM."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from ocvtp.cli import main
from ocvtp.commands import serve, serve_check
from ocvtp.serving import vllm_check
from ocvtp.serving.vllm_check import Found

DEMO = "checkpoints/demo-vlm"
NETWORK = "checkpoints/demo-pruner/0"
PRUNED = ["--pruner", "divprune", "--num-keep", "16"]


@pytest.fixture
def vllm(monkeypatch):
    """Pretend that a version of vLLM is installed, or none."""

    def pretend(version: str | None) -> None:
        if version is None:
            monkeypatch.setitem(sys.modules, "vllm", None)
            monkeypatch.setattr(serve, "find_spec", lambda name: None)
            return
        module = ModuleType("vllm")
        module.__version__, module.__spec__ = version, ModuleSpec("vllm", None)
        monkeypatch.setitem(sys.modules, "vllm", module)

    return pretend


def dry(capsys, *words: str) -> list[str]:
    """The command that would run."""
    assert main(["serve", "--dry-run", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["command"]


def refused(capsys, *words: str) -> str:
    assert main([*words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ocvtp: error: ")
    assert error.count("\n") == 1
    return error


def test_a_dry_run_prints_vllms_command(capsys):
    words = [
        DEMO,
        *PRUNED,
        "--port",
        "8010",
        "--max-model-len",
        "512",
        "-tp",
        "2",
        "--enforce-eager",
    ]
    command = dry(capsys, *words)
    assert command[:4] == ["vllm", "serve", DEMO, "--hf-overrides"]
    assert json.loads(command[4]) == {"ocvtp": {"pruner": "divprune", "num_keep": 16}}
    assert command[5:] == words[5:]
    assert main(["serve", *words, "--dry-run"]) == 0
    assert shlex.split(capsys.readouterr().out) == command


def test_settings_and_overrides_of_the_user_come_along(capsys):
    given = ["--hf-overrides", '{"tie_word_embeddings": true}', "--max-keep", "32"]
    spec = ["--pruner", "ocvtp:early=false", "--keep-ratio", "0.2", "--checkpoint", NETWORK]
    command = dry(capsys, DEMO, *spec, *given, "--separators", "none", "--", "--dtype", "float32")
    found = json.loads(command[4])
    assert found["tie_word_embeddings"] is True
    network = found["ocvtp"].pop("checkpoint")
    assert Path(network).is_absolute()
    assert Path(network).samefile(NETWORK)
    own = {"pruner": "ocvtp:early=false", "keep_ratio": 0.2, "max_keep": 32, "separators": "none"}
    assert found["ocvtp"] == own
    assert command[5:] == ["--dtype", "float32"]


def test_the_compose_file_has_a_command_that_can_be_served(capsys):
    service = yaml.safe_load(Path("examples/compose.yaml").read_text())["services"]["vllm"]
    program, command = service["entrypoint"]
    words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service["command"]]
    assert (program, words[0]) == ("ocvtp", "llava-hf/llava-1.5-7b-hf")
    made = dry(capsys, DEMO, *words[1:])
    assert command == made[1] == "serve"
    assert json.loads(made[4]) == {"ocvtp": {"pruner": "divprune", "num_keep": 64}}
    assert made[5:] == words[3:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([DEMO, "--pruner", "trim", "--num-keep", "16"], "reads the prompt.*use one of .*divprune"),
        (
            [DEMO, "--pruner", "fastv:stages=[[1,K]]", "--num-keep", "9"],
            "acts at stage 'llm_layers'",
        ),
        ([DEMO, "--pruner", "divprune", "--num-keep", "145"], "exceeds the 144 visual tokens"),
        ([DEMO, "--pruner", "divprunes", "--num-keep", "9"], "did you mean 'divprune'"),
        ([DEMO, *PRUNED, "--max-keep", "8"], "got --num-keep 16 and --max-keep 8, but --max-keep"),
        (
            [DEMO, "--pruner", "divprune:num_keep=64", "--num-keep", "32"],
            "--num-keep 32 would not count: divprune:num_keep=64 says how many tokens stay",
        ),
        ([DEMO, *PRUNED, "--hf-overrides", "[1]"], r"--hf-overrides \[1\] is no JSON object"),
        ([DEMO, *PRUNED, "--hf-overrides", "{"], "is no JSON object .Expecting property name"),
        ([DEMO, *PRUNED, "--hf-overrides", '{"ocvtp": {}}'], "sets 'ocvtp', as --pruner does"),
        ([DEMO, *PRUNED, "--hf-overrides.a", "1"], "--hf-overrides.a; pass --hf-overrides as one"),
        (["random:tiny-llava", *PRUNED], "vLLM does not know 'random:tiny-llava'"),
        (["no/such/folder", *PRUNED], "does not exist; pass a folder that does, or a hub id"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_before_vllm_starts(capsys, words, message):
    assert re.search(message, refused(capsys, "serve", *words, "--dry-run"))


@pytest.mark.parametrize("command", ["serve", "serve-check"])
def test_without_a_vllm_that_was_tested_nothing_starts(capsys, vllm, command, monkeypatch):
    vllm(None)
    assert "vLLM is not installed here" in refused(capsys, command, DEMO, *PRUNED)
    monkeypatch.undo()
    vllm("0.31.2")
    assert "vLLM 0.31.2 is installed, and ocvtp prunes in" in refused(
        capsys, command, DEMO, *PRUNED
    )
    vllm("0.33.0")
    monkeypatch.setattr(serve, "entry_points", lambda **named: ())
    assert "vLLM would not find the plug-in" in refused(capsys, command, DEMO, *PRUNED)


def test_vllm_takes_the_place_of_the_process(vllm, monkeypatch):
    vllm("0.33.0")
    monkeypatch.setattr(serve, "entry_points", lambda **named: ("ocvtp",))
    became: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        became.append([program, *words])
        raise SystemExit

    monkeypatch.setattr(serve.os, "execv", execv)
    with pytest.raises(SystemExit):
        main(["serve", DEMO, *PRUNED, "--port", "8010"])
    ((program, python, *words),) = became
    assert program == python == sys.executable
    assert words[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", DEMO]
    assert words[-2:] == ["--port", "8010"]


def test_other_commands_hand_on_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["list", "--port", "8010"])
    assert "unrecognized arguments: --port 8010" in capsys.readouterr().err


def test_a_check_gives_both_sides_one_budget(capsys, vllm, monkeypatch):
    vllm("0.33.0")
    monkeypatch.setattr(serve, "entry_points", lambda **named: ("ocvtp",))
    asked = []
    monkeypatch.setattr(
        serve_check, "check", lambda model, *given, **more: asked.append(given) or []
    )
    for budget in (["--num-keep", "16"], ["--keep-ratio", "0.5"], []):
        main(["serve-check", DEMO, "--pruner", "divprune", *budget, "--max-keep", "32"])
    assert [pruner.budget(144) for pruner, _ in asked] == [16, 32, 32]
    assert [settings["max_keep"] for _, settings in asked] == [32] * 3


def test_a_check_of_images_that_stay_whole_does_not_say_pruned():
    whole, pruned = Found("?", [9], [9], 30, [5]), Found("?", [18, 9], [16, 9], 40, [7])
    assert serve_check._text([whole], 16).startswith("equal, but nothing was pruned (visual tokens")
    assert serve_check._text([whole, pruned], 16).startswith("pruned, equal (visual tokens 9 -> 9")
    whole.differs.append("request 0")
    assert serve_check._text([whole], 16).startswith("request 0\ndiffers (")


@pytest.mark.slow
def test_a_check_says_equal_or_what_differs(capfd, vllm, monkeypatch):
    """vLLM's side is made up; transformers' is its own."""
    vllm("0.33.0")
    monkeypatch.setattr(serve, "entry_points", lambda **named: ("ocvtp",))
    own: list[Found] = []
    engines: list[dict] = []
    as_it_is = vllm_check.by_transformers
    monkeypatch.setattr(
        vllm_check, "by_transformers", lambda *given: own.extend(as_it_is(*given)) or own
    )

    def answers(engine, requests, new_tokens):
        os.write(1, b"a line of another process\n")
        engines.append(engine)
        assert [one.prompt.count("<image>") for one in requests] == [1] * 6 + [2]
        return [(one.prompt_tokens, list(one.answer)) for one in own]

    monkeypatch.setattr(vllm_check, "by_vllm", answers)
    assert main(["serve-check", *PRUNED, "--chunk", "64"]) == 0
    text, log = capfd.readouterr()
    assert log.count("a line of another process") == 2
    assert text.startswith("pruned, equal (visual tokens 144 -> 16, ")
    assert "144+144 -> 16+16" in text
    assert "prompts whole and in chunks of 64" in text
    assert [e.get("max_num_batched_tokens") for e in engines] == [None, 64]
    assert all(
        e["hf_overrides"]["ocvtp"] == {"pruner": "divprune", "num_keep": 16} for e in engines
    )
    own.clear()
    monkeypatch.setattr(vllm_check, "by_vllm", lambda *_: [(156, [1])] * 7)
    assert main(["serve-check", *PRUNED, "--json"]) == 1
    facts = json.loads(capfd.readouterr().out)
    assert facts["equal"] is False
    assert len(facts["requests"]) == 7
    assert all(len(one["differs"]) == 2 for one in facts["requests"])
