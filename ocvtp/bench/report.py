"""The report of a benchmark in Markdown, from what results.json holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ocvtp.bench.samples import STAGES
from ocvtp.bench.statistics import RESAMPLES
from ocvtp.reporting import markdown_table
from ocvtp.reporting.files import replacing
from ocvtp.reporting.plain_text import markdown as markdown_of
from ocvtp.reporting.plain_text import one_line
from ocvtp.reporting.results_files import RESULTS

Facts = Mapping[str, Any]
_MIB = 2**20

_LEGEND = f"""\
- **TTFT**: from tensors on the device to the first token. It holds the tower, the pruner, the
  projector, and the language model's pass over the prompt. **TPOT**: each token after the first;
  answers have a fixed length, their end is not looked for. **Request**: tensors on the device to
  the last token. Throughput is of one batch after the other, without preprocessing.
- All rows run once in every round, in random order; ratios are medians of those within rounds.
  In brackets: 95% intervals, from {RESAMPLES} resamples of blocks of neighbouring rounds. What
  changes from one process to the next is in no interval.
- **Operations left**: multiplications and additions before the first token (matrix products,
  convolutions, attention), counted while the row ran, over those of the unpruned model.
  **Saved / possible**: the share of TTFT that was saved over the share of operations.
  **Speed-up / possible**: how much faster the prefill is over how many fewer operations it has in
  the language model. Beside them: the operations left before the first token as `ocvtp flops`
  counts them.
- Stages: `preprocess` makes tensors of images, once a round for all rows; `select` is the pruner's
  choice wherever it is made, also inside the tower or the language model, and not part of these;
  `project` is the projector (or the tower's merger); `prefill` is everything else until the first
  token, of which `around` is spent outside of the language model and its head: generate()'s own
  work, rewriting the prompt, and what a host computes for a pruner to read (a row of attention, the
  prompt as CLIP reads it). `decode` is the rest of the answer. `other` is what the stages leave of
  the whole, which has a clock of its own.
- Memory: `weights` of model and pruner; `KV` after the prompt and after the answer; `activations`
  the most that was allocated beside these. On a CPU kernels' own buffers are not seen."""


def write(results: Facts, folder: Path, accuracy: Facts | None = None) -> list[Path]:
    """Write results.json, report.md and plots, each whole or not at all.

    Args:
        results: of `ocvtp.bench.run.bench`.
        folder: made where absent.
        accuracy: results.json of `ocvtp evaluate`, to be drawn against TTFT.

    Returns:
        what was written.
    """
    from ocvtp.bench import plots  # and matplotlib, which tables do without
    from ocvtp.reporting.figure_files import save_figure

    paths = [folder / RESULTS, folder / "report.md"]
    for path, text in zip(paths, (_lines(results), markdown(results)), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    drawings = {"ttft.png": plots.ttft(results, accuracy), "stages.png": plots.stages(results)}
    return paths + [save_figure(made, folder / name, dpi=120) for name, made in drawings.items()]


def markdown(results: Facts) -> str:
    """The whole report."""
    parts = [f"# Time and memory of {markdown_of(results['model'])}", _summary(results)]
    parts += [f"> Note. {markdown_of(remark)}" for remark in results.get("remarks", ())]
    for cell in results["cells"]:
        parts += [f"## {cell_name(cell)}", times_table(cell), "Stages, milliseconds (medians):"]
        parts += [_stages_table(cell), "The pruner's own time, and what it saves of the prefill:"]
        parts += [_prefill_table(cell), "Memory, MiB:", _memory_table(cell), *_notes(cell)]
    parts += ["## How to read this", _LEGEND, "## Settings and environment", *_origin(results)]
    return "\n\n".join(parts) + "\n"


def short(results: Facts) -> str:
    """The times of every cell."""
    parts = [f"{cell_name(cell)}\n{times_table(cell)}" for cell in results["cells"]]
    return "\n\n".join([*results.get("remarks", ()), *parts]) + "\n"


def cell_name(cell: Facts) -> str:
    """Its sizes in words."""
    images = f"{cell['image_tokens']} image tokens"
    if cell["images_per_prompt"] > 1:
        images += f" of {cell['images_per_prompt']} images"
    return f"Batch {cell['batch_size']}, {images}, {cell['text_tokens']} text tokens"


def times_table(cell: Facts) -> str:
    """A row a variant: TTFT, TPOT and throughput."""
    head = ["pruner", "kept", "TTFT, ms", "p10 to p90", "/ unpruned", "operations left"]
    head += ["saved / possible", "TPOT, ms", "/ unpruned", "images/s"]
    return table(head, [_times(row) for row in cell["rows"]])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain texts."""
    head, *rows = ([markdown_of(text) for text in row] for row in (head, *rows))
    return markdown_table.table(head, rows, figures=False)


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_interval(figure: Facts, name: str = "median") -> str:
    """`12.3 (12.1 to 12.6)`."""
    value = number(figure[name])
    if "low" not in figure:
        return value
    return f"{value} ({number(figure['low'])} to {number(figure['high'])})"


def ratio_text(ratio: Facts | None) -> str:
    """`0.512 (0.508 to 0.517)`, to as many places as the interval is wide."""
    if ratio is None:
        return "-"
    value, low, high = (f"{ratio[key]:.3f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _times(row: Facts) -> list[str]:
    ttft, tpot = row["figures"]["ttft"], row["figures"]["tpot"]
    is_bare = row["kept"] is None
    saved = row["saved_of_possible"]["ttft"]
    return [
        row["key"],
        _kept(row),
        with_interval(ttft),
        f"{number(ttft['p10'])} to {number(ttft['p90'])}",
        "" if is_bare else ratio_text(ttft.get("ratio")),
        f"{row['operations_left']['ttft']:.3f}",
        "" if saved is None else f"{saved:.2f}",
        number(tpot["median"]),
        "" if is_bare else ratio_text(tpot.get("ratio")),
        number(row["throughput"]["images_per_second"]),
    ]


def _kept(row: Facts) -> str:
    """Visual tokens of an image that the language model reads, and from which layer on fewer."""
    kept = row["kept"]
    if kept is None:
        return "all"
    texts = [f"{fmean(kept['visual_tokens_kept']):.4g}"]
    texts += [
        f"{fmean(at['visual_tokens_kept']):.4g} from layer {at['layer']}" for at in kept["layers"]
    ]
    if kept["layers"] and (average := kept.get("visual_tokens_average")):
        texts.append(f"{fmean(average):.4g} on average")
    return ", ".join(texts)


def _stages_table(cell: Facts) -> str:
    names = [*STAGES[:-1], "around", *STAGES[-1:], "other"]
    head = ["pruner", *("of which around" if n == "around" else n for n in names), "sum / whole"]
    rows = [
        [row["key"], *(number(row["stages"][name]) for name in names), f"{row['accounted']:.3f}"]
        for row in cell["rows"]
    ]
    return table(head, rows)


def _prefill_table(cell: Facts) -> str:
    head = ["pruner", "select / TTFT", "prefill / unpruned", "its operations left"]
    rows = []
    for row in cell["rows"][1:]:
        ratio, left = row["figures"]["prefill"]["ratio"], row["operations_left"]["prefill"]
        faster = f"{left / ratio['value']:.2f}"
        share = f"{100 * row['select_share_of_ttft']:.1f}%"
        flops, bare = row["flops"], cell["rows"][0]["flops"]
        formula = "-" if flops is None or bare is None else f"{flops['total'] / bare['total']:.3f}"
        rows.append([row["key"], share, ratio_text(ratio), f"{left:.3f}", faster, formula])
    return table([*head, "speed-up / possible", "TTFT's by `ocvtp flops`"], rows)


def _memory_table(cell: Facts) -> str:
    kinds = {
        "weights": "weights",
        "pruner_weights": "of the pruner",
        "kv_cache_prompt": "KV, prompt",
        "kv_cache": "KV, end",
        "activations": "activations",
        "peak": "peak allocated",
        "reserved": "reserved",
    }
    kinds = {kind: title for kind, title in kinds.items() if kind in cell["rows"][0]["memory"]}
    peaks = ("tower", "select", "project", "model", "decode")
    head = ["pruner", *kinds.values(), *(f"peak: {name}" for name in peaks)]
    rows = []
    for row in cell["rows"]:
        memory = row["memory"]
        sizes = [memory[kind] for kind in kinds] + [memory["peak_of_stage"].get(n) for n in peaks]
        rows.append([row["key"], *("" if s is None else number(s / _MIB) for s in sizes)])
    return table(head, rows)


def _notes(cell: Facts) -> Iterator[str]:
    lines = [f"- {key} could not be run: {why}" for key, why in cell["unfit"].items()]
    untrained = sorted({row["label"] for row in cell["rows"] if row["random_weights"]})
    lines += [f"- {label}: a network of random weights; times are true." for label in untrained]
    for row in cell["rows"]:
        if beside := row.get("beside"):
            there = number(beside["ttft"])
            lines.append(
                f"- {row['key']}: of a later run, beside an unpruned TTFT of {there} ms; plots show"
                " it at the share of the unpruned time that it took there."
            )
    if yours := sorted({row["label"] for row in cell["rows"] if row.get("yours")}):
        lines.append(f"- Yours: {', '.join(yours)}.")
    for stage, where in (
        ("pixels", "before the vision tower"),
        ("encoder", "inside the vision tower"),
        ("llm_layers", "inside the language model"),
    ):
        labels = sorted({row["label"] for row in cell["rows"] if stage in row["stages"]})
        if labels:
            lines.append(f"- Choosing {where}: {', '.join(labels)}.")
    if lines:
        yield "\n".join(f"- {markdown_of(line[2:])}" for line in lines)


def _summary(results: Facts) -> str:
    settings, where = results["settings"], results["environment"]
    attention = settings["attention"]
    kernels: dict[str, set[str]] = {}
    for cell in results["cells"]:
        for row in cell["rows"]:
            for stage, names in row["kernels"].items():
                kernels.setdefault(stage, set()).update(names)
    seen = "; ".join(f"{stage}: {', '.join(sorted(kernels[stage]))}" for stage in kernels)
    timer = 1e6 * where["timer_seconds"]
    return (
        f"{where['device']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']},"
        f" transformers {where['transformers']}. {settings['repetitions']} rounds after"
        f" {settings['warmup']} to warm up; answers of {settings['new_tokens']} tokens. Attention:"
        f" {attention['tower']} in the tower, {attention['language_model']} in the language model"
        f" (kernels called: {seen or 'none of PyTorch'}). A mark of the timer costs"
        f" {timer:.2g} µs, and a request has about 20."
    )


def _origin(results: Facts) -> Iterator[str]:
    """The commands as code, then what else the figures depend on."""
    commands = [results["command"], *results.get("earlier_commands", ())]
    yield "\n".join(f"    {one_line(command)}" for command in commands)
    known = {**results["settings"], **results["environment"]}
    yield "\n".join(f"- {key}: {markdown_of(json.dumps(value))}" for key, value in known.items())


def _lines(results: Facts) -> str:
    """JSON, a line a row."""
    cells = []
    for cell in results["cells"]:
        rows = ",\n".join(json.dumps(row) for row in cell["rows"])
        rest = json.dumps({key: value for key, value in cell.items() if key != "rows"})
        cells.append(f'{rest[:-1]}, "rows": [\n{rows}\n]}}')
    rest = json.dumps({k: v for k, v in results.items() if k != "cells"}, indent=1)
    return f'{rest[:-2]},\n "cells": [\n' + ",\n".join(cells) + "\n]\n}\n"
