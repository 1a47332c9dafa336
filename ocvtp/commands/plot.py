"""`ocvtp plot`: the plots of `evaluate` and `bench` again, as narrow as a column of a paper."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from ocvtp.bench import plots as of_times
from ocvtp.commands import output
from ocvtp.commands.result_files import ResultsFile, narrowed, read_files
from ocvtp.evaluation import plots as of_figures
from ocvtp.reporting.chosen import Chosen
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.plot_style import look

Order = tuple[list[str], list[str]]


def run(arguments: argparse.Namespace) -> int:
    """Read, draw and write."""
    folder = output.folder(arguments.output)
    look(arguments.width)  # refuses what is too narrow before anything is drawn
    if not 30 <= arguments.dpi <= 2400:
        raise ValueError(f"--dpi {arguments.dpi}; pass 30 to 2400.")
    chosen = Chosen(arguments.only, arguments.metric)
    files = read_files(arguments.results, chosen)
    drawings = {
        name: drawing
        for name, kind, drawing in _drawings(files, chosen, arguments.width, arguments.plots)
        if arguments.plots is None or kind in arguments.plots
    }
    if not drawings:
        what = "" if arguments.plots is None else f" {' '.join(arguments.plots)}"
        raise ValueError(
            f"{', '.join(arguments.results)}: there is nothing{what} to draw of these pruners and"
            " metrics. accuracy and differences are of `ocvtp evaluate` and need a budget, ttft"
            " and stages are of `ocvtp bench`, tradeoff needs a file of each."
        )
    ending = "pdf" if arguments.pdf else "png"
    paths = [
        save_figure(drawing, folder / f"{name}.{ending}", dpi=arguments.dpi)
        for name, drawing in drawings.items()
    ]
    facts = {"files": list(map(str, paths)), "width": arguments.width}
    output.emit(facts, f"wrote {', '.join(map(str, paths))}", arguments.json)
    return 0


def _drawings(
    files: Sequence[ResultsFile], chosen: Chosen, width: float, kinds: Sequence[str] | None
) -> Iterator[tuple[str, str, Figure]]:
    """Name of the file, kind and figure of all that can be drawn."""
    timed = [file for file in files if file.is_bench]
    judged = [file for file in files if not file.is_bench]
    like = _order(judged[0], narrowed(chosen, judged[0], files)) if len(judged) == 1 else None
    for file in files:
        alone = sum(one.is_bench == file.is_bench for one in files) == 1
        before = "" if alone else f"{_name(file, files)}-"
        for kind, drawing in _of(file, narrowed(chosen, file, files), width, like):
            if drawing is not None:
                yield f"{before}{kind}", kind, drawing
    if len(timed) == len(judged) == 1:
        labels = narrowed(chosen, timed[0], files).labels(timed[0].labels)
        times = of_times.narrowed(timed[0].facts, labels)
        metrics = chosen.of(judged[0].metrics) or judged[0].metrics[:1]
        facts = {**judged[0].facts, "metrics": metrics}
        if "tradeoff" in (kinds or ()) or of_times.in_common(times, facts):
            yield "tradeoff", "tradeoff", of_times.ttft(times, facts, width, like)


def _order(judged: ResultsFile, own: Chosen) -> Order:
    """In which the lines of all plots have colours: that of the evaluation."""
    labels, metrics = own.labels([*judged.labels, "unpruned"]), judged.facts["metrics"]
    shown = own.of(judged.metrics, first=len(metrics)) or metrics
    return of_figures.order(of_figures.narrowed(judged.facts, labels, shown))


def _of(
    file: ResultsFile, own: Chosen, width: float, like: Order | None
) -> Iterator[tuple[str, Figure | None]]:
    labels = own.labels([*file.labels, "unpruned"])
    if file.is_bench:
        if not own.metrics or "ttft" in own.metrics:
            times = of_times.narrowed(file.facts, labels)
            yield "ttft", of_times.ttft(times, width=width, like=like)
            yield "stages", of_times.stages(times, width)
        return
    metrics = own.of(file.metrics, first=len(file.facts["metrics"]))
    if metrics:
        facts = of_figures.narrowed(file.facts, labels, metrics)
        yield "accuracy", of_figures.accuracy(facts, width)
        yield "differences", of_figures.differences(facts, width)


def _name(file: ResultsFile, files: Sequence[ResultsFile]) -> str:
    """Of its folder; with a number where several have the same."""
    own = file.path.resolve().parent.name
    alike = [one for one in files if one.path.resolve().parent.name == own]
    return own if len(alike) == 1 else f"{own}-{alike.index(file) + 1}"
