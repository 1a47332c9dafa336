"""What to use of all that was measured: a Pareto front, the fastest that loses little, a sentence.

Points are percentage points of a figure, minus the unpruned model's; below 0 is always worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ocvtp.evaluation.tasks.agreement import AGREEMENT
from ocvtp.evaluation.tasks.base import Task, TokenTask

Facts = Mapping[str, Any]
_ROUNDING = 1e-9
_WHOLE = 100.0
"""Percent of the time that the unpruned model takes."""


@dataclass(frozen=True)
class Span:
    """A figure and its 95% interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None
    high: float | None

    def scaled(self, by: float) -> Span:
        """Times a number, which may be negative."""
        ends = [None if end is None else by * end for end in (self.low, self.high)]
        if by < 0:
            ends.reverse()
        return Span(by * self.value, *ends)


@dataclass(frozen=True)
class Option:
    """A pruner at a budget whose accuracy and time are known.

    Args:
        label: the pruner as it was asked for.
        num_keep: tokens kept per image; None where the pruner has a budget of its own.
        points: minus the unpruned model, on the same questions.
        beyond_random: points above as many random tokens; None where these were not asked.
        ttft: time to the first token, in percent of the unpruned model's.
        control: whether it is a yardstick; one that was asked for may be chosen like any other.
    """

    label: str
    num_keep: int | None
    points: Span
    beyond_random: Span | None
    ttft: Span
    control: bool = False

    @property
    def name(self) -> str:
        """`fopru at K=96`."""
        return self.label if self.num_keep is None else f"{self.label} at K={self.num_keep}"


def options(accuracy: Facts, cell: Facts, metric: str) -> list[Option]:
    """What has a figure and a time, the unpruned model apart.

    Args:
        accuracy: results of `evaluate`. cell: of those of `bench`.
        metric: name of the figure.
    """
    sign = -1.0 if metric in accuracy["lower_is_better"] else 1.0
    times = {
        (row["label"], row["num_keep"]): row["figures"]["ttft"]["ratio"]
        for row in cell["rows"]
        if not row["changed"] and "ratio" in row["figures"]["ttft"]
    }
    found = []
    for row in accuracy["rows"]:
        figure, key = row["figures"].get(metric) or {}, (row["label"], row["num_keep"])
        if key not in times or (points := _span(figure.get("minus_unpruned"))) is None:
            continue
        random, time = _span(figure.get("minus_random")), _span(times[key])
        assert time is not None
        found.append(
            Option(
                *key,
                points.scaled(100 * sign),
                None if random is None else random.scaled(100 * sign),
                time.scaled(100),
                row["control"],
            )
        )
    return found


def metric_of(accuracy: Facts, wanted: str | None, num_items: int) -> str:
    """The figure to choose by.

    That is the one that was asked for; else the first of the task's metrics that is of all its
    questions; else `all`, where that is; else the first.

    Raises:
        ValueError: if there is no such figure.
    """
    known: dict[str, int] = {}
    for row in accuracy["rows"]:
        known |= {name: figure["n"] for name, figure in row["figures"].items()}
    if wanted is not None:
        if wanted not in known:
            raise ValueError(_unknown(wanted, known))
        return wanted
    names = [*accuracy["metrics"], *(name for name in known if name == "all")]
    whole = [name for name in names if known.get(name) == num_items]
    return str((whole or names)[0])


def refuse_unknown(wanted: str, task: Task) -> None:
    """Refuse a figure that a task of answers has not, before anything is asked.

    Raises:
        ValueError: that names those which there are.
    """
    if isinstance(task, TokenTask):  # what it looks at makes its figures
        return
    silent = [{"answer": "", "given": 1.0, "kept": 1.0} for _ in task.items]
    if wanted not in (known := task.compared(silent, silent)):
        raise ValueError(_unknown(wanted, known))


def _unknown(wanted: str, known: Iterable[str]) -> str:
    return (
        f"--metric {wanted}: the figures of this task are {', '.join(known)}; pass one of them, or"
        f" {AGREEMENT}."
    )


def front(found: Sequence[Option]) -> list[Option]:
    """Those that none beats in both time and points, fastest first.

    The unpruned model, which loses nothing in 100% of the time, beats what is no faster and no
    better.
    """
    best, kept = float("-inf"), []
    for option in sorted(found, key=_fastest_first):
        if option.ttft.value >= _WHOLE:
            best = max(best, 0.0)
        if option.points.value > best:
            best = option.points.value
            kept.append(option)
    return kept


def choose(found: Sequence[Option], max_drop: float) -> Option | None:
    """The fastest that loses at most `max_drop` points, if it is faster than the unpruned model."""
    fit = [option for option in _faster(found) if _within(option.points.value, max_drop)]
    return min(fit, key=_fastest_first, default=None)


def sentence(found: Sequence[Option], chosen: Option | None, max_drop: float, metric: str) -> str:
    """What to use, or why there is nothing."""
    if chosen is not None:
        return f"{_told(chosen, metric, max_drop)}."
    if not (faster := _faster(found)):
        fastest = min(found, key=_fastest_first)
        return (
            "Nothing is faster than the unpruned model here. The fastest is"
            f" {_told(fastest, metric, max_drop)}."
        )
    closest = max(faster, key=lambda option: option.points.value)
    return (
        f"Nothing that is faster loses at most {most_text(max_drop)}. The closest is"
        f" {_told(closest, metric, max_drop)}."
    )


def doubts(
    found: Sequence[Option], chosen: Option | None, max_drop: float, questions: str
) -> list[str]:
    """What to know before one relies on the choice.

    Args:
        found: all options. chosen: of them.
        max_drop: points.
        questions: how many there were, e.g. `300 questions on 60 images`.
    """
    if chosen is None:
        return []
    texts, points, random = [], chosen.points, chosen.beyond_random
    if points.low is None:
        texts.append(f"{questions} say nothing of others; ask about several images.")
    elif not _within(points.low, max_drop):
        loss = points_text(points.low, max_drop).lstrip("-")
        texts.append(f"A loss of up to {loss} points is not excluded by {questions}.")
    if random is not None and random.low is not None and not random.low > 0:
        texts.append(
            "It is not clearly better than as many random tokens:"
            f" {_points(random, max_drop)} points above them."
        )
    if chosen.ttft.high is not None and chosen.ttft.high >= _WHOLE:
        texts.append("That it is faster is not certain: time it again on a quiet machine.")
    if len(found) > 1:
        texts.append(
            f"It was chosen among {len(found)} rows on these questions, which flatters it: expect a"
            " little more loss on others, and confirm it on questions that were not asked here."
        )
    return texts


def facts_of(
    found: Sequence[Option], of_front: Sequence[Option], chosen: Option | None
) -> list[dict[str, Any]]:
    """The options as JSON, fastest first."""
    return [
        {**asdict(option), "on_front": option in of_front, "chosen": option is chosen}
        for option in sorted(found, key=_fastest_first)
    ]


def _faster(found: Sequence[Option]) -> list[Option]:
    return [option for option in found if _is_faster(option.ttft.value)]


def _is_faster(percent: float) -> bool:
    return percent < _WHOLE


def _within(points: float, max_drop: float) -> bool:
    return -points <= max_drop + _ROUNDING


def _fastest_first(option: Option) -> tuple[float, float]:
    return option.ttft.value, -option.points.value


def _told(option: Option, metric: str, max_drop: float) -> str:
    kind = " of agreement" if metric.endswith(AGREEMENT) else ""
    ends = "" if option.ttft.low is None else f" ({ends_text(option.ttft, percent_text)})"
    time = f"{percent_text(option.ttft.value)}% of the time{ends}"
    return f"{option.name}: {_points(option.points, max_drop, kind)}, first token after {time}"


def points_text(value: float, max_drop: float) -> str:
    """`-0.8`; never `-0.0`. More digits where these would tell which side of a limit it is on.

    Args:
        value: points. max_drop: those that may be lost.
    """
    return _digits(value, 1, "+", lambda points: _within(points, max_drop))


def percent_text(value: float) -> str:
    """`57`; more digits where these tell whether it is less than all."""
    return _digits(value, 0, "", _is_faster)


def _digits(value: float, least: int, sign: str, rule: Callable[[float], bool]) -> str:
    """A number, rounded to the fewest digits at which a rule says of it what it says of `value`."""
    for digits in range(least, 9):
        if rule(rounded := round(value, digits) + 0.0) == rule(value):
            break
    return f"{rounded:{sign}.{digits}f}"


def most_text(max_drop: float) -> str:
    """`1 point`, `0.5 points`."""
    return f"{max_drop:g} point{'' if max_drop == 1 else 's'}"


def ends_text(span: Span, text: Callable[[float], str]) -> str:
    """`-1.9 to +0.3`; `-` where there is no interval."""
    if span.low is None or span.high is None:
        return "-"
    return f"{text(span.low)} to {text(span.high)}"


def _points(span: Span, max_drop: float, kind: str | None = None) -> str:
    """`-0.8 (-1.9 to +0.3)`; with a kind, `-0.8 points (-1.9 to +0.3)`."""
    unit = "" if kind is None else f" points{kind}"
    text = partial(points_text, max_drop=max_drop)
    ends = "" if span.low is None else f" ({ends_text(span, text)})"
    return f"{text(span.value)}{unit}{ends}"


def _span(figure: Facts | None) -> Span | None:
    if figure is None or figure.get("value") is None:
        return None
    return Span(figure["value"], figure.get("low"), figure.get("high"))
