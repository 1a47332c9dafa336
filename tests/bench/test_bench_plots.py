"""What plots of a benchmark show: every dot, every name, and which way is better."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from ocvtp.bench import plots
from ocvtp.evaluation.plots import order
from ocvtp.reporting.plot_style import COLOURS, GREY

SHIPPED = Path(__file__).parents[2] / "docs/results/bench-llava-mid-cpu/results.json"


@pytest.fixture
def shipped():
    """Eight rows of one budget, whose times are nearly alike."""
    return json.loads(SHIPPED.read_text())


def wide(results, counts, equal=False):
    """The same pruners at several budgets."""
    found = copy.deepcopy(results)
    for cell in found["cells"]:
        bare, *rows = cell["rows"]
        cell["rows"] = [bare]
        for number, row in enumerate(rows):
            for count in counts:
                one = copy.deepcopy(row) | {"num_keep": count}
                one["kept"] = {"visual_tokens_kept": [count], "layers": []}
                time = 4000 if equal else 4000 + count + 9 * number
                one["figures"]["ttft"] |= {"median": time, "low": time, "high": time}
                cell["rows"].append(one)
        if equal:
            bare["figures"]["ttft"] |= {"median": 4000, "low": 4000, "high": 4000}
    return found


def drawn(figure):
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    return renderer


def dots(axis):
    """[P, 2] pixels of all that has a marker."""
    found = [
        axis.transData.transform(np.array(line.get_data(), float).T)
        for line in axis.lines
        if line.get_marker() not in ("None", "", "|", "_", 2, 3) and line.get_linestyle() != ":"
    ]
    return np.concatenate(found)


def named(axis, renderer):
    """Names beside the panel, without their lines, or of rows; and their boxes."""
    texts = axis.texts or axis.get_yticklabels()
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in texts}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("counts", [None, (64,), (32, 64, 128), (16, 17, 576)])
@pytest.mark.parametrize("equal", [False, True])
def test_every_dot_and_every_name_can_be_seen(shipped, counts, equal):
    results = shipped if counts is None else wide(shipped, counts, equal)
    figure = plots.ttft(results)
    renderer = drawn(figure)
    (axis,) = figure.axes
    places, in_rows = dots(axis), counts in (None, (64,))
    assert len(places) == len(results["cells"][0]["rows"]) - (not in_rows)
    if counts is None or len(counts) < 2 or 17 not in counts:
        assert min(np.abs(a - b).max() for a, b in combinations(places, 2)) > 5
    inside = axis.get_window_extent()
    assert all(inside.contains(*place) for place in places)
    names = named(axis, renderer)
    assert set(names) == {"unpruned", *(plots._label(r) for r in results["cells"][0]["rows"][1:])}
    page = figure.bbox
    for a, b in combinations(names.values(), 2):
        assert not (a.overlaps(b) and min(a.y1, b.y1) - max(a.y0, b.y0) > 1)
    for box in names.values():
        assert inside.y0 - 12 <= box.y0 <= box.y1 <= inside.y1 + 12
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
    name, (low, high) = axis.get_ylabel(), axis.get_ylim()
    if in_rows:
        name, (low, high) = axis.get_xlabel(), axis.get_xlim()
        assert axis.get_title(loc="left").endswith(", 64 visual tokens of an image")
        shown = [tick.get_text() for tick in axis.get_yticklabels()]
        times = {
            plots._label(r): r["figures"]["ttft"]["median"] for r in results["cells"][0]["rows"]
        }
        assert shown[0] == "unpruned"
        assert [times[one] for one in shown[1:]] == sorted(times[one] for one in shown[1:])
    assert name == "TTFT, ms (lower is better)"
    assert high - low >= 0.05 * 4000
    assert low >= -0.05 * high


def accuracies(value=0.8, **more):
    rows = [("unpruned", None, value), ("fopru", 64, value), ("ocvtp", 64, value)]
    made = [
        {"label": label, "num_keep": count, "figures": {"easy/all": {"value": one}}}
        for label, count, one in rows
    ]
    return {"task": "scenes", "metrics": ["easy/all"], "percent": True, "rows": made} | more


@pytest.mark.parametrize(("value", "span"), [(0.8, (0, 100)), (0.0, (-1, 7)), (1.0, (93, 101))])
def test_equal_accuracies_are_on_an_axis_that_says_so(shipped, value, span):
    (axis,) = plots.ttft(shipped, accuracies(value)).axes
    low, high = axis.get_ylim()
    assert high - low >= 5
    assert span[0] <= low < high <= span[1]
    assert axis.get_ylabel() == "easy/all of scenes, percent"
    assert axis.get_xlabel() == "TTFT, ms (lower is better)"
    assert {"unpruned", "fopru", "ocvtp"} <= {text.get_text() for text in axis.texts}


def test_an_error_says_that_lower_is_better(shipped):
    (axis,) = plots.ttft(shipped, accuracies(lower_is_better=["easy/all"])).axes
    assert axis.get_ylabel().endswith("(lower is better)")


def test_a_label_is_drawn_as_in_the_plots_of_its_accuracy(shipped):
    known = accuracies()
    known["rows"] = [r | {"budget": 0.1, "control": False} for r in known["rows"][::-1]]
    lines = wide(shipped, (32, 64))
    for figure in (plots.ttft(shipped, known), plots.ttft(lines, like=order(known))):
        named = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
        assert [named[label] for label in ("ocvtp", "fopru")] == list(COLOURS[:2])
    alone = {t.get_text(): t.get_color() for t in plots.ttft(lines).axes[0].texts}
    labels = [row["label"] for row in shipped["cells"][0]["rows"][1:] if row["label"] != "random"]
    first = list(dict.fromkeys(labels))[:2]
    assert [alone[label] for label in first] == list(COLOURS[:2])  # as they were asked for
    assert alone.get("random", GREY) == GREY


def test_a_method_of_yours_is_set_off(shipped):
    for row in shipped["cells"][0]["rows"]:
        row["yours"] = row["label"] == "fopru"
    (axis,) = plots.ttft(shipped).axes
    weights = {tick.get_text(): tick.get_fontweight() for tick in axis.get_yticklabels()}
    assert weights["fopru"] == "bold"
    assert weights["ocvtp"] == weights["unpruned"] == "normal"


@pytest.mark.slow
def test_stages_are_a_panel_a_cell_below_each_other(shipped):
    shipped["cells"] *= 3
    for figure in (plots.stages(shipped), plots.ttft(shipped)):
        drawn(figure)
        boxes = [axis.get_position() for axis in figure.axes]
        assert len(boxes) == 3
        assert all(above.y0 > below.y1 for above, below in zip(boxes, boxes[1:], strict=False))
        assert figure.get_figwidth() < 8
    assert "(lower is better)" in plots.stages(shipped).axes[0].get_xlabel()


def test_rows_of_a_later_run_are_drawn_on_the_clock_of_the_first(shipped):
    expected = dots(plots.ttft(shipped).axes[0])
    late = copy.deepcopy(shipped)
    for cell in late["cells"]:  # the same run on a machine that was half as fast
        bare, *rows = cell["rows"]
        for row in rows:
            row["figures"]["ttft"] |= {
                key: 2 * row["figures"]["ttft"][key] for key in ("median", "low", "high")
            }
            row["stages"] = {name: 2 * time for name, time in row["stages"].items()}
            row["beside"] = {"ttft": 2 * bare["figures"]["ttft"]["median"]}
    assert np.allclose(dots(plots.ttft(late).axes[0]), expected)

    def bars(results):
        return [bar.get_width() for bar in plots.stages(results).axes[0].patches]

    assert np.allclose(bars(late), bars(shipped))
