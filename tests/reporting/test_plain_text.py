"""Text of others shows itself, in a terminal, in Markdown and in tables of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from ocvtp.bench.report import table as bench_table
from ocvtp.cli import main
from ocvtp.evaluation import tables
from ocvtp.evaluation.report import Report, Row, results
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.reporting.plain_text import cell, code, duration, markdown, one_line, terminal


@pytest.mark.parametrize(
    "text", ["ocvtp:layer=3 `x` (1 seed)", "a\nb\tc", "Größe ≥ 3 ✓", "می‌خواهم"]
)
def test_plain_text_stays(text):
    assert terminal(text) == text


def test_a_terminal_is_not_commanded():
    assert terminal("\x1b[31mred\x07\r\x9b\x7f") == r"\x1b[31mred\x07\r\x9b\x7f"
    assert terminal("a\u202egnp.exe\u2028b\ud800") == r"a\u202egnp.exe\u2028b\ud800"
    assert one_line(" a\n\nb\x00 ") == r"a b\x00"


def test_markdown_makes_nothing_of_it():
    assert markdown("a_b/c.d: 3 (4 to 5) * `x<y`") == "a_b/c.d: 3 (4 to 5) * `x<y`"
    assert markdown("<script>\n# x") == "&lt;script&gt; # x"
    assert markdown("![x](http://a) [y][z]") == r"![x]\(http://a) [y]\[z]"
    assert code("a`<b>`\n|") == "`a'<b>' |`"
    assert cell("`a|b` \\| c\nd") == "`a\\|b` \\| c d"


@pytest.mark.parametrize("text", ["```<b>`", r"\`<b>`", "`<b>``", "`<b>", "a` `<b>`"])
def test_backticks_without_their_pair_hide_no_html(text):
    """Markdown pairs a run of them with one as long, and none that is escaped."""
    assert markdown(text) == text.replace("`", "'").replace("<b>", "&lt;b&gt;")


def figure(right):
    return Ratio((np.arange(20) < right).astype(float), np.ones(20), np.arange(20) % 10)


def lines_of(name):
    facts = {"pruner": "x", "budget": 0.5, "num_keep": 8, "seeds": 1, "control": False}
    facts |= {"visual_tokens": 8.0, "figures": {"all": figure(12)}, "note": name}
    report = Report(
        task="scenes",
        model=name,
        metrics=["all"],
        percent=True,
        settings={"command": name, "setting": name},
        environment={},
        rows=[Row(label=name, **facts)],
        remarks=[name],
    )
    found = results(report)
    return tables.full(found).splitlines()


def test_a_report_keeps_its_shape_whatever_things_are_called():
    plain = lines_of("plain")
    for name in ("a|b", "a\nb", "<img src=x>", "a`b", "[a](b)", "\x1b[2J", "# a\n\n# b"):
        lines = lines_of(name)
        assert len(lines) == len(plain)
        text = "\n".join(line for line in lines if not line.startswith("    "))  # code
        assert "<img" not in text.replace("`<img src=x>`", "")
        assert not any("\x1b" in line for line in lines)
        for line, other in zip(lines, plain, strict=True):
            if other.startswith("|"):
                assert line.replace(r"\|", "").count("|") == other.count("|")
            assert line.startswith("#") == other.startswith("#")


def test_tables_of_a_benchmark_too():
    assert bench_table(["pruner"], [["a|<b>\n"]]) == (
        "| pruner       |\n|--------------|\n| a\\|&lt;b&gt; |"
    )


def test_errors_and_warnings_are_plain(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    assert main(["resize", str(tmp_path / "a\x1b[31m"), str(tmp_path / "o"), "--size", "8"]) == 2
    said = capsys.readouterr().err
    assert r"a\x1b[31m does not exist" in said
    assert "\x1b" not in said
    (tmp_path / "in").mkdir()
    (tmp_path / "in/b\x1b[2J.png").write_text("no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "in/c.png")
    assert main(["resize", str(tmp_path / "in"), str(tmp_path / "o"), "--size", "8"]) == 1
    said = capsys.readouterr()
    assert r"not resized: b\x1b[2J.png" in said.err
    assert "\x1b" not in said.out + said.err


def test_a_word_of_thousands_of_letters_is_shortened(tmp_path, capsys):
    assert main(["resize", "x" * 3000, str(tmp_path), "--size", "8"]) == 2
    assert len(capsys.readouterr().err) < 400


def test_a_time_as_people_say_it():
    seconds = [0.04, 9.94, 9.96, 34, 59.6, 336, 3599.6, 3629, 13260, 360000]
    told = ["0.0 s", "9.9 s", "10 s", "34 s", "1 min", "5 min 36 s", "1 h", "1 h", "3 h 41 min"]
    assert list(map(duration, seconds)) == [*told, "100 h"]
