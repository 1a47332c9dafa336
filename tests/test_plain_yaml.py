"""YAML that stands for far more than it says is refused before anything is made of it."""

from __future__ import annotations

import time

import pytest
import yaml

from ocvtp.cli import main
from ocvtp.plain_yaml import read_value, refuse_bomb
from ocvtp.pruners.specs import build_spec

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": (LAUGHS, "more than 100000 values"),
    "mappings": ("a: &a {b: [x, x]}\n" + LAUGHS.partition("\n")[2], "more than 100000 values"),
    "itself": ("a: &a [*a]", "more than 100000 values"),
    "brackets": ("[" * 3000, "deeper than 64"),
    "many brackets": ("[" * 10**6, "deeper than 64"),
    "braces": ("{a: " * 100, "deeper than 64"),
    "dashes": ("- " * 100 + "a", "deeper than 64"),
    "lines": ("".join(f"{' ' * n}a:\n" for n in range(100)), "deeper than 64"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name):
    text, message = BOMBS[name]
    started = time.process_time()
    with pytest.raises(ValueError, match=message):
        refuse_bomb(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: *a}",
        "[[2, 64], [5, 32]]",
        "a" * 10_000,
        "a: {b: [c, {d: e}]}",
        "",
        "'" + "[" * 50 + "'",
    ],
)
def test_what_is_none_is_read(text):
    refuse_bomb(text)
    assert read_value(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["*a", "\0", "!!python/object:x.y", "2020-13-45", "1" * 5000])
def test_what_is_no_value_is_one_error(text):
    refuse_bomb(text)
    with pytest.raises(ValueError, match="is no value") as refused:
        read_value(text)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("divprune:num_keep=[1]", r"num_keep=\[1\]; pass a whole number"),
        (
            "divprune:num_keep=&a [*a]",
            "stands for more than 100000 values.*; write numbers",
        ),
        ("fastv:stages=" + "[" * 3000, "nests deeper than 64; take brackets out; write numbers"),
        ("fastv:stages={a: 1}", r"stages=\{'a': 1\}; pass \(layer, K\) pairs"),
        ("divprune:num_keep=.nan", "num_keep=nan; pass a whole number"),
        ("divprune:num_keep=" + "9" * 5000, "is no value; write numbers"),
        ("fastv:block='a'", "pruner 'fastv' has no setting 'block'"),
        ("a" * 5000, r"unknown pruner 'a+\.\.\.a+'; see"),
        ("divprune:" + "a" * 5000 + "=1", r"has no setting 'a+\.\.\.a+'"),
        ("random:seed=" + "a" * 5000, r"got seed='a+\.\.\.a+'; pass a whole number"),
        ("ocvtp:checkpoint=[1]", r"got checkpoint=\[1\]; pass a text or None"),
        ("ocvtp:checkpoint=5", "got checkpoint=5; pass a text or None"),
        ("\x1b[31mred", r"unknown pruner '\\x1b\[31mred'"),
    ],
)
def test_odd_specs_are_one_short_error(spec, message):
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as refused:
        build_spec(spec, num_keep=8)
    assert len(str(refused.value)) < 800
    assert "\n" not in str(refused.value)
    assert time.process_time() - started < 3


def test_files_and_flags_of_a_run_are_held_to_it(tmp_path, capsys):
    (tmp_path / "bomb.yaml").write_text(LAUGHS)
    words = ["train", "--output", str(tmp_path / "out"), "--config"]
    assert main([*words, str(tmp_path / "bomb.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ocvtp: error: --config '")
    assert "bomb.yaml' is refused: it stands" in said
    assert said.count("\n") == 1
    assert main([*words, "scenes", "--data.root", "[" * 5000]) == 2
    assert "--data.root '[[[" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
