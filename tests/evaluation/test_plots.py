from functools import cache

import matplotlib as mpl
import numpy as np
import pytest
from made_up_report import report, row, share, usual
from matplotlib import _pylab_helpers
from matplotlib.colors import same_color
from matplotlib.text import Text

from ocvtp.evaluation.plots import accuracy, differences, order, spread
from ocvtp.evaluation.report import results
from ocvtp.reporting.plot_style import marks


@cache
def many(pruners=25, budgets=(0.5, 0.25, 0.1, 0.05)):
    """Pruner p0 is the best."""
    rows = [row("unpruned", 1.0, 390, 400)]
    for budget in budgets:
        rows += [row(f"p{i}", budget, 380 - 10 * i, 400) for i in range(pruners)]
        rows += [row("random", budget, 250, 400), row("oracle", budget, 385, 400)]
    return results(report(*rows))


def lines(axis, points):
    """Lines of so many points."""
    return [line for line in axis.lines if len(line.get_xdata()) == points]


def row_names(axis):
    return [tick.get_text() for tick in axis.get_yticklabels()]


def annotated(axis):
    return [text.get_text() for text in axis.texts]


def test_the_best_and_the_controls_are_named_and_the_others_faint():
    (axis,) = accuracy(many()).axes
    drawn = lines(axis, 4)
    assert len(drawn) == 27
    names = annotated(axis)
    assert {f"p{i}" for i in range(8)} | {"random", "oracle"} <= set(names)
    assert not {f"p{i}" for i in range(8, 25)} & set(names)
    assert "dashed: controls; faint: 17 more pruners" in names
    assert "unpruned 97.5" in names
    dashed = [line for line in drawn if line.get_linestyle() == "--"]
    assert sorted(line.get_ydata()[0] for line in dashed) == [62.5, 96.25]
    assert len({line.get_color() for line in drawn}) == 8 + 2
    bands = [area for area in axis.collections if len(area.get_paths())]
    assert len(bands) == 8


def test_lines_hold_the_figures():
    (axis,) = accuracy(results(usual())).axes
    found = {tuple(line.get_ydata()): list(line.get_xdata()) for line in lines(axis, 2)}
    expected = [(60.0, 50.0), (75.0, 65.0), (80.0, 70.0), (90.0, 80.0)]
    assert all(found[line] == [0.5, 0.25] for line in expected)
    assert axis.get_xscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["50%", "25%"]
    assert axis.get_xlim()[0] > axis.get_xlim()[1]
    (level,) = [line for line in axis.lines if line.get_transform() != axis.transData]
    assert set(level.get_ydata()) == {90.0}


def test_names_at_the_ends_do_not_overlap():
    rows = [row(f"p{i}", b, 300 + i, 400) for i in range(8) for b in (0.5, 0.25)]
    drawing = accuracy(results(report(*rows, row("random", 0.25, 200, 400))))
    renderer = drawing.canvas.get_renderer()
    drawing.draw(renderer)
    (axis,) = drawing.axes
    names = [text for text in axis.texts if text.get_text().startswith("p")]
    extents = [Text.get_window_extent(name, renderer) for name in names]  # without its line
    boxes = sorted((extent.y0, extent.y1) for extent in extents)
    assert len(boxes) == 8
    assert all(below[1] <= above[0] + 1 for below, above in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("seed", range(5))
def test_spread_keeps_the_gap_the_order_and_what_fits(seed):
    values = np.sort(np.random.default_rng(seed).random(9))
    places = np.array(spread(list(values), 0.08))
    assert (np.diff(places) >= 0.08 - 1e-9).all()
    apart = np.arange(9) * 0.3
    assert spread(list(apart), 0.08) == pytest.approx(list(apart))
    assert spread([0.5, 0.5, 0.5], 0.2) == pytest.approx([0.3, 0.5, 0.7])
    assert places.mean() == pytest.approx(values.mean())


def test_differences_are_those_to_random_at_the_smallest_budget_but_one():
    found = many()
    (axis,) = differences(found).axes
    here = {r["label"]: r["figures"]["easy/all"] for r in found["rows"] if r["budget"] == 0.1}
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert labels == ["oracle", *(f"p{i}" for i in range(25))]
    inside = [line for line in axis.lines if line.get_transform() == axis.transData]
    dots, bars = ([line for line in inside if len(line.get_xdata()) == n] for n in (1, 2))
    for place, (label, dot, bar) in enumerate(zip(labels, dots, bars, strict=True)):
        minus = here[label]["minus_random"]
        assert set(dot.get_ydata()) == set(bar.get_ydata()) == {place}
        assert dot.get_xdata() == pytest.approx([100 * minus["value"]])
        assert bar.get_xdata() == pytest.approx([100 * minus["low"], 100 * minus["high"]])
        hollow = same_color(dot.get_markerfacecolor(), "white")
        assert hollow == (minus["low"] <= 0 <= minus["high"])
    assert "10% of the tokens" in axis.get_title(loc="left")
    assert axis.get_ylim()[0] > axis.get_ylim()[1]


def test_a_panel_a_metric():
    figures = {"a": share(9), "b": share(4)}
    rows = [row(label, 0.5, 0, figures=figures) for label in ("fopru", "random")]
    found = results(report(*rows, metrics=["a", "b"]))
    for drawing in (accuracy(found), differences(found)):
        assert len(drawing.axes) == 2


def test_a_pruner_has_one_colour_in_all_panels_and_the_best_of_each_are_named():
    rows = []
    for budget in (0.5, 0.25):
        figures = {"a": share(5, 400), "b": share(5, 400)}
        rows.append(row("random", budget, 0, 400, figures=figures))
        for i in range(12):  # p0 is the best of a, p11 of b
            figures = {"a": share(380 - 10 * i, 400), "b": share(200 + 10 * i, 400)}
            rows.append(row(f"p{i}", budget, 0, 400, figures=figures))
    left, right = accuracy(results(report(*rows, metrics=["a", "b"]))).axes
    names = [
        {text.get_text(): text.get_color() for text in axis.texts if text.get_text()[0] == "p"}
        for axis in (left, right)
    ]
    assert set(names[0]) == {"p0", "p1", "p2", "p3", "p8", "p9", "p10", "p11"}
    assert names[0] == names[1]
    assert len(set(names[0].values())) == 8


@pytest.mark.parametrize("pruners", [3, 12])
def test_a_label_has_one_colour_and_marker_in_all_plots(pruners):
    """In the order of the rows, whichever is the best; of more than 8 the best come first."""
    rows = [row("random", b, 250, 400) for b in (0.5, 0.25)]
    rows += [row(f"p{i}", b, 100 + 20 * i, 400) for i in range(pruners) for b in (0.5, 0.25)]
    facts = results(report(*rows))
    methods, controls = order(facts)
    assert controls == ["random"]
    assert methods[:3] == (["p0", "p1", "p2"] if pruners == 3 else ["p11", "p10", "p9"])
    known = marks(methods, controls)
    (axis,) = accuracy(facts).axes
    named = {text.get_text(): text.get_color() for text in axis.texts}
    seen = {(line.get_color(), line.get_marker()) for line in lines(axis, 2)}
    for label in (*methods[:8], *controls):
        assert named[label] == known[label].colour
        assert (known[label].colour, known[label].marker) in seen
    (axis,) = differences(facts).axes
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    dots = [line for line in lines(axis, 1) if line.get_transform() == axis.transData]
    for label, dot in zip(labels, dots, strict=True):
        assert (dot.get_color(), dot.get_marker()) == (known[label].colour, known[label].marker)


def test_nothing_to_draw_is_no_drawing():
    unpruned = results(report(row("unpruned", 1.0, 9)))
    assert accuracy(unpruned) is None
    assert differences(unpruned) is None
    assert differences(results(report(row("fopru", 0.5, 9)))) is None


def test_conditions_that_could_not_run_leave_the_rest():
    refused = row("tome", 0.25, None, note="needs blocks.")
    other = row("fopru", 0.5, 9)
    (axis,) = accuracy(results(report(row("fopru", 0.25, 9), refused))).axes
    assert row_names(axis) == ["fopru"]
    (axis,) = accuracy(results(report(row("fopru", 0.25, 9), refused, other))).axes
    assert annotated(axis) == ["fopru"]  # and of no control that is not there


def test_matplotlib_is_left_alone():
    before = dict(mpl.rcParams)
    accuracy(many())
    differences(many())
    assert dict(mpl.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


def equal(right, budgets=(0.5, 0.25), **given):
    """Everything is as good as everything."""
    rows = [row("unpruned", 1.0, right, 400)]
    for budget in budgets:
        rows += [row(name, budget, right, 400) for name in ("fopru", "scope", "random")]
    return results(report(*rows, **given))


@pytest.mark.parametrize(("right", "expected"), [(0, (-1, 11)), (400, (89, 101)), (200, (40, 60))])
def test_equal_figures_are_on_an_axis_that_says_so(right, expected):
    (axis,) = accuracy(equal(right)).axes
    low, high = axis.get_ylim()
    assert high - low >= 9
    assert expected[0] <= low < high <= expected[1]
    assert low < right / 4 < high
    (axis,) = differences(equal(right)).axes
    low, high = axis.get_xlim()
    assert low <= -4
    assert high >= 4


def test_shares_that_are_no_percent_have_their_own_axis():
    (axis,) = accuracy(equal(200, percent=False)).axes
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(0.11)
    assert axis.get_ylabel() == "share"


def test_pruners_at_one_budget_have_a_row_each_on_an_axis_of_the_figure():
    rows = [row(f"p{i}", 0.25, 380 - 10 * i, 400) for i in range(12)]
    found = results(report(row("unpruned", 1.0, 390, 400), *rows, row("random", 0.25, 250, 400)))
    (axis,) = accuracy(found).axes
    labels = row_names(axis)
    assert labels == ["unpruned", *(f"p{i}" for i in range(12)), "random"]
    known = {one["label"]: one["figures"]["easy/all"] for one in found["rows"]}
    inside = [line for line in axis.lines if line.get_transform() == axis.transData]
    dots, bars = ([line for line in inside if len(line.get_xdata()) == n] for n in (1, 2))
    for place, (name, dot, bar) in enumerate(zip(labels, dots, bars, strict=True)):
        assert set(dot.get_ydata()) == set(bar.get_ydata()) == {place}
        assert dot.get_xdata() == pytest.approx([100 * known[name]["value"]])
        ends = [100 * known[name][end] for end in ("low", "high")]
        assert bar.get_xdata() == pytest.approx(ends)
    assert (axis.get_xscale(), axis.get_ylim()) == ("linear", (13.5, -0.5))
    assert axis.get_title(loc="left") == "easy/all, 25% of the tokens"
    assert axis.get_xlabel() == "percent, 95% interval; grey: controls"
    (level,) = [line for line in axis.lines if line not in inside]
    assert set(level.get_xdata()) == {97.5}


def test_lower_is_better_is_said():
    found = equal(200, lower_is_better=["easy/all"])
    assert accuracy(found).axes[0].get_ylabel() == "percent (lower is better)"
    assert "points (lower is better)" in differences(found).axes[0].get_xlabel()
    assert "lower" not in accuracy(equal(200)).axes[0].get_ylabel()


def test_a_method_of_yours_has_a_colour_though_it_is_not_among_the_best():
    rows = [row("random", b, 100, 400) for b in (0.5, 0.25)]
    rows += [row(f"p{i}", b, 390 - i, 400) for i in range(12) for b in (0.5, 0.25)]
    rows += [row("mine", b, 120, 400, yours=True) for b in (0.5, 0.25)]
    found = results(report(*rows))
    (axis,) = accuracy(found).axes
    (mine,) = [text for text in axis.texts if text.get_text() == "mine"]
    assert mine.get_fontweight() == "bold"
    (line,) = [line for line in lines(axis, 2) if line.get_ydata()[0] == 30]
    assert line.get_linewidth() > 2
    assert line.get_linestyle() == "-"
    assert same_color(line.get_color(), mine.get_color())
    (axis,) = differences(found).axes
    bold = [t.get_text() for t in axis.get_yticklabels() if t.get_fontweight() == "bold"]
    assert bold == ["mine"]


@pytest.mark.slow
def test_panels_are_a_column_wide_and_names_stay_beside_them():
    rows = [row(f"p{i}", b, 399, 400) for i in range(30) for b in (0.5, 0.25)]
    rows += [row(f"c{i}", b, 398, 400, control=True) for i in range(20) for b in (0.5, 0.25)]
    checkpoint = "ocvtp:checkpoint=outputs/train/scenes/artifacts/epoch5/0"
    rows += [row(checkpoint, b, 400, 400) for b in (0.5, 0.25)]
    drawing = accuracy(results(report(*rows)))
    renderer = drawing.canvas.get_renderer()
    drawing.draw(renderer)
    assert drawing.get_figwidth() < 8
    (axis,) = drawing.axes
    panel = axis.get_window_extent()
    assert panel.width > drawing.bbox.width / 3
    beside = [text for text in axis.texts if text.get_text()[0] in "pco"]
    assert len(beside) == 8 + 20
    for text in beside:
        box = Text.get_window_extent(text, renderer)
        assert panel.y0 - 12 < box.y0 < box.y1 < panel.y1 + 12
        assert box.x1 < drawing.bbox.x1
    (short,) = [text.get_text() for text in beside if text.get_text().startswith("o")]
    assert short.startswith("ocvtp:checkpoint=")
    assert short.endswith("epoch5/0")
    assert len(short) == 36
