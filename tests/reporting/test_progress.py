"""Progress on a terminal of any width, and a line now and then where stderr is none."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from io import StringIO
from itertools import count

import pytest
from rich.console import Console

from ocvtp.reporting import progress


def _ten_steps(monkeypatch, seconds: float) -> None:
    clock = count(0, seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.progress_bar("{task.fields[loss]}") as bar:
        task = bar.add_task("", total=10, loss="")
        for number in range(10):
            bar.update(task, advance=1, description=f"row {number} [x]", loss=f"{number / 10}")


def test_a_file_gets_a_line_now_and_then(capsys, monkeypatch):
    _ten_steps(monkeypatch, seconds=20)
    written = capsys.readouterr()
    lines = written.err.splitlines()
    assert written.out == ""
    assert 2 < len(lines) < 10
    assert lines[0].startswith("2/10")
    assert "left" in lines[0]
    assert lines[-1] == "10/10  row 9 [x]  0.9"


def test_what_is_quick_says_one_line(capsys, monkeypatch):
    _ten_steps(monkeypatch, seconds=0.1)
    assert capsys.readouterr().err.splitlines() == ["10/10  row 9 [x]  0.9"]


def test_the_time_left_of_steps_of_minutes(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with progress.progress_bar() as bar:
        bar.get_time = partial(next, count(0, 120.0))
        task = bar.add_task("", total=10)
        for _ in range(5):
            bar.advance(task)
    assert "5/10, 10 min left" in capsys.readouterr().err


@pytest.mark.slow
def test_many_items_are_told_of_and_few_are_not(capsys):
    assert list(progress.tracked(range(200), "few", 200)) == list(range(200))
    assert capsys.readouterr().err == ""
    assert list(progress.tracked(range(1234567), "many", 1234567)) == list(range(1234567))
    assert capsys.readouterr().err.splitlines() == ["1234567/1234567  many"]


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_terminal_shows_steps_time_and_every_figure(monkeypatch, width):
    screen = StringIO()
    narrow = Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: narrow)
    figures = "train/loss 0.3539, run/images_per_s 56.63, run/data_wait 0.2893, val/loss 0.2831"
    with progress.progress_bar("{task.fields[figures]}") as bar:
        bar.add_task("epoch 12, validation batch 3", total=1116, completed=215, figures=figures)
    last = " ".join(screen.getvalue().rpartition("━")[2].split())
    assert "215/1116 -:--:--" in last
    assert figures in last


def test_a_message_is_written_above_a_bar_that_stands_in_for_stderr():
    program = (
        "import io, logging, sys; from ocvtp.cli import main; main(['compare', 'a', 'b']);"
        "sys.stderr = bar = io.StringIO(); logging.warning('said'); print(bar.getvalue())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "WARNING said\n\n"
