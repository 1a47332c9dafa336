"""Points lost against the time to the first token, with the Pareto front and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ocvtp.reporting.plot_style import (
    COLOURS,
    FAINT,
    GREY,
    INK,
    Mark,
    canvas,
    height_for,
    label,
    limits,
    marks,
    shortened,
    spread,
)

Facts = Mapping[str, Any]

_LEAST = 4.6  # inches
_OTHERS = ("",) * 5  # what else the legend may hold
_SEEN = 8.0  # times the points that may be lost: how far down rows are drawn at least
_NARROWEST = 2.0  # points and percent of an axis
UP = r"$\uparrow$"  # the mark of what loses more than is drawn; no pruner has it
_BELOW, _BESIDE, _GAP = 0.025, 0.02, 0.036  # of the axes: where names are, and between them


def pareto(found: Facts) -> Figure:
    """A dot a row, with its intervals; nearer to the lower left is better.

    Rows that lose far more than may be lost stand as small arrows at the upper edge, so that the
    others can be told apart.

    Args:
        found: as `ocvtp.recommend.run.recommend` returns it.
    """
    rows = found["rows"]
    known = found.get("order") or {"methods": [r["label"] for r in rows if not r["control"]]}
    own = marks(known["methods"], [*known.get("controls", ()), *_controls(rows)])
    names = list(dict.fromkeys(row["label"] for row in rows))
    drawing, (panel,) = canvas([height_for([*names, *_OTHERS], least=_LEAST)])
    top = _draw_axes(panel, found)
    for row in rows:
        _draw_row(panel, row, own[row["label"]], top)
    _draw_front(panel, [row for row in rows if row["on_front"]], top)
    for row in rows:
        if row["chosen"]:
            place = (row["ttft"]["value"], min(-row["points"]["value"], top))
            panel.plot(*place, "o", mfc="none", mec=INK, mew=1.4, ms=14, zorder=5)
    panel.plot(100, 0, "*", color=INK, mec="white", ms=13, zorder=7, clip_on=False)
    beyond = any(-row["points"]["value"] > top for row in rows)
    _legend(panel, {name: own[name] for name in names}, any(row["chosen"] for row in rows), beyond)
    return drawing


def _draw_axes(panel: Any, found: Facts) -> float:
    """Axes, and what may be lost; returns the points at which rows that lose more are drawn."""
    rows, most = found["rows"], found["max_drop"]
    times = [100.0, *(end for row in rows for end in _ends(row["ttft"]))]
    panel.set_xlim(limits(times, _NARROWEST, floor=0.0))
    far = max(_SEEN * most, _NARROWEST)
    losses = [-row["points"]["value"] for row in rows]
    shown = [loss for loss in losses if loss <= far] or [min(losses)]
    ends = [0.0, most, *shown, *(-row["points"]["value"] for row in rows if row["on_front"])]
    ends = [end for end in ends if end <= far] + [
        max(-end, -far) for row in rows if -row["points"]["value"] <= far
        for end in _ends(row["points"])
    ]  # fmt: skip
    low, high = limits([min(end, 1.4 * far) for end in ends], _NARROWEST)
    beyond = any(loss > high for loss in losses)
    top = high + 0.04 * (high - low) if beyond else high
    panel.set_ylim(low, top + 0.03 * (high - low))
    panel.axhline(0, color=INK, lw=0.8)
    panel.axhspan(panel.get_ylim()[0], most, color=COLOURS[2], alpha=0.07, lw=0)
    panel.axhline(most, color=COLOURS[2], lw=1, ls="--")
    title = f"{found['task']} on {shortened(found['model'])}: {found['metric']}"
    unit = f"points lost ({found['metric']}), 95% interval (lower is better)"
    label(panel, title, "time to the first token, % of the unpruned model (lower is better)", unit,
          grid="both")  # fmt: skip
    return float(top)


def _controls(rows: Sequence[Facts]) -> list[str]:
    return [row["label"] for row in rows if row["control"]]


def _draw_row(panel: Any, row: Facts, mark: Mark, top: float) -> None:
    x, y = row["ttft"]["value"], -row["points"]["value"]
    loud = row["on_front"] or row["chosen"]
    style = {"color": mark.colour, "zorder": 3 if loud else 2, "alpha": 1.0 if loud else 0.55}
    if y > top:
        panel.plot(x, top, marker=UP, ms=6, clip_on=False, **style)
        return
    low, high = _ends(row["points"])
    left, right = _ends(row["ttft"])
    panel.errorbar(
        x, y, xerr=[[max(x - left, 0)], [max(right - x, 0)]],
        yerr=[[max(y + high, 0)], [max(-low - y, 0)]], fmt="none",
        lw=1.1 if loud else 0.6, **style,
    )  # fmt: skip
    style["zorder"] = 6.5 if loud else 2  # above the front and the names of others
    edge = {"mfc": "white", "mew": 1.0} if mark.control else {"mec": "white", "mew": 0.5}
    panel.plot(x, y, mark.marker, ms=6 if loud else 4.5, **edge, **style)


def _draw_front(panel: Any, rows: Sequence[Facts], top: float) -> None:
    """The front as steps: at every time, the least that is lost by then; each corner is named."""
    rows = [row for row in rows if -row["points"]["value"] <= top]
    x = [row["ttft"]["value"] for row in rows]
    y = [-row["points"]["value"] for row in rows]
    panel.step(x, y, where="post", color=INK, lw=1.8, alpha=0.75, zorder=3.5)
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    order = sorted(range(len(rows)), key=lambda number: y[number])
    places = spread([y[number] - _BELOW * (high - low) for number in order], _GAP * (high - low))
    for number, place in zip(order, places, strict=True):
        row = rows[number]
        count = "" if row["num_keep"] is None else f" {row['num_keep']}"
        panel.annotate(
            shortened(row["label"]) + count, (x[number], y[number]),
            xytext=(x[number] + _BESIDE * (right - left), place), fontsize=7.5, color=INK,
            va="center", weight="bold" if row["chosen"] else "normal", zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": INK, "relpos": (0, 0.5)},
        )  # fmt: skip


def _legend(panel: Any, own: Mapping[str, Mark], chosen: bool, beyond: bool) -> None:
    """Pruners by colour and marker, and what else is drawn, to the right of the panel."""

    def mark(marker: str, colour: str, text: str, **more: Any) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, label=text, ms=6, **more)

    handles = [
        mark(one.marker, one.colour, shortened(name), **({"mfc": "white"} if one.control else {}))
        for name, one in own.items()
    ]
    handles.append(mark("*", INK, "unpruned"))
    handles.append(Line2D([], [], color=INK, lw=1.8, alpha=0.75, label="Pareto front"))
    handles.append(Line2D([], [], color=COLOURS[2], lw=1, ls="--", label="may be lost"))
    if beyond:
        handles.append(mark(UP, GREY, "loses more"))
    if chosen:
        handles.append(mark("o", INK, "chosen", mfc="none", mew=1.4))
    panel.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False,
        borderaxespad=0, labelcolor=INK, edgecolor=FAINT,
    )  # fmt: skip


def _ends(span: Facts) -> tuple[float, float]:
    """Low and high; the value where there is no interval."""
    value = span["value"]
    return (value, value) if span["low"] is None else (span["low"], span["high"])
