"""Progress where stderr is no terminal: a line now and then."""

from __future__ import annotations

from functools import partial
from itertools import count

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
    assert "5/10, 0:10:00 left" in capsys.readouterr().err


def test_many_items_are_told_of_and_few_are_not(capsys):
    assert list(progress.tracked(range(200), "few", 200)) == list(range(200))
    assert capsys.readouterr().err == ""
    assert list(progress.tracked(range(1234567), "many", 1234567)) == list(range(1234567))
    assert capsys.readouterr().err.splitlines() == ["1234567/1234567  many"]
