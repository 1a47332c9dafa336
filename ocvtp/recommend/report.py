"""A recommendation as files: recommendation.json, recommendation.md and pareto.png."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ocvtp.recommend.choice import Span, ends_text, most_text, percent_text, points_text
from ocvtp.recommend.plot import pareto
from ocvtp.recommend.run import ACCURACY, SPEED
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.files import replacing
from ocvtp.reporting.markdown_table import table
from ocvtp.reporting.plain_text import code, one_line
from ocvtp.reporting.plain_text import markdown as markdown_of

Facts = Mapping[str, Any]
_NAME = "recommendation"


def write(found: Facts, folder: Path) -> list[Path]:
    """Write what `recommend` found, each file whole or not at all.

    Args:
        found: as `ocvtp.recommend.run.recommend` returns it.
        folder: files of these names there are replaced.
    """
    texts = {".json": json.dumps(found, indent=1, allow_nan=False) + "\n", ".md": markdown(found)}
    paths = [folder / f"{_NAME}{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*paths, save_figure(pareto(found), folder / "pareto.png", dpi=120)]


def markdown(found: Facts) -> str:
    """The sentence, what to doubt about it, how to apply it, all rows, and where they are from."""
    parts = [
        f"# {markdown_of(found['task'])} on {markdown_of(found['model'])}: which pruner, which K",
        f"**{markdown_of(found['sentence'])}**",
        *(f"> {markdown_of(text)}" for text in found["doubts"]),
    ]
    if found["python"]:
        parts += ["## To use it", "\n".join(f"    {line}" for line in found["python"])]
        parts.append("`model` and `processor` are yours, as transformers loads them.")
    parts += ["## All that was measured", "![accuracy lost against time](pareto.png)"]
    parts += [rows_table(found), *_left_out(found), "## How to read this", _legend(found)]
    parts += [f"> Note. {markdown_of(text)}" for text in found["remarks"]]
    parts += ["## Where this is from", *_origin(found)]
    return "\n\n".join(parts) + "\n"


def short(found: Facts) -> str:
    """For a terminal: the sentence, what to doubt about it, the rows, and the lines of Python."""
    parts = [rows_table(found), found["sentence"], *found["doubts"]]
    if found["python"]:
        parts.append("\n".join(f"    {line}" for line in found["python"]))
    return "\n\n".join(parts)


def rows_table(found: Facts) -> str:
    """A row an option, the fastest on top."""
    head = ["pruner", "K", "points", "95% interval", "first token, %", "95% interval", "front"]
    cells, in_points = [], partial(points_text, max_drop=found["max_drop"])
    for row in found["rows"]:
        name = code(row["label"]) + (" (control)" if row["control"] else "")
        count = "own" if row["num_keep"] is None else str(row["num_keep"])
        mark = "**chosen**" if row["chosen"] else "yes" if row["on_front"] else ""
        points, time = Span(**row["points"]), Span(**row["ttft"])
        cells.append(
            [name, count]
            + [in_points(points.value), ends_text(points, in_points)]
            + [percent_text(time.value), ends_text(time, percent_text), mark]
        )
    return table(head, cells)


def _left_out(found: Facts) -> Iterator[str]:
    if found["left_out"]:
        yield "Left out:"
        yield "\n".join(
            f"- {markdown_of(name)}: {markdown_of(why)}" for name, why in found["left_out"].items()
        )


def _legend(found: Facts) -> str:
    metric, value = markdown_of(found["metric"]), found["unpruned"]["value"]
    whole = "nothing" if value is None else f"{100 * value:.1f}%"
    return f"""\
- points: {metric} in percent, minus that of the unpruned model ({whole}) on the same
  {found["n"]} items of {found["images"]} images. Intervals are from resamples of the images.
- first token: time from tensors on the device to the first token, with the tower and the pruner, in
  percent of the unpruned model's in the same round; on this machine, for this request.
- front: no other row is both faster and better. Chosen is the fastest that loses at most
  {most_text(found["max_drop"])}. Each interval is of one row alone: the best of many looks better
  than it is."""


def _origin(found: Facts) -> Iterator[str]:
    request = found["request"]
    width, height = request["image_size"]
    if found["command"]:
        yield f"    {one_line(found['command'])}"
    yield "\n".join(
        [
            f"- accuracy, with controls: [{ACCURACY}/report.md]({ACCURACY}/report.md)",
            f"- time, by stage: [{SPEED}/report.md]({SPEED}/report.md)",
            f"- request that was timed, the task's typical one: batch {request['batch_size']}, an"
            f" image of {width} x {height} pixels ({request['tokens']} tokens),"
            f" {request['text_length']} text tokens",
            f"- device: {found['environment']['device']}, threads:"
            f" {found['environment']['threads']}, dtype: {found['environment']['dtype']}",
        ]
    )
