"""The results.json files that a command was given, of `ocvtp evaluate` and of `ocvtp bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocvtp.bench import paper_columns as of_times
from ocvtp.bench.compare import load
from ocvtp.bench.samples import KIND
from ocvtp.evaluation import paper_columns as of_figures
from ocvtp.reporting.chosen import Chosen
from ocvtp.reporting.results_files import RESULTS, read_json, read_results


@dataclass(frozen=True)
class ResultsFile:
    """One of them.

    Args:
        path: of the file.
        facts: what it holds.
        is_bench: whose it is.
    """

    path: Path
    facts: dict[str, Any]
    is_bench: bool

    @property
    def metrics(self) -> list[str]:
        """All that it has."""
        if self.is_bench:
            return of_times.metrics_of(self.facts)
        return of_figures.metrics_of(self.facts)

    @property
    def labels(self) -> list[str]:
        """Of its pruners."""
        if self.is_bench:
            return of_times.labels_of(self.facts)
        return list(dict.fromkeys(row["label"] for row in self.facts["rows"]))

    @property
    def title(self) -> tuple[str, ...]:
        """What tells it from others: task, model and folder."""
        task = "bench" if self.is_bench else self.facts["task"]
        return task, Path(self.facts["model"]).name, self.path.resolve().parent.name


def read_files(paths: Sequence[str], chosen: Chosen) -> list[ResultsFile]:
    """All files; a folder stands for its results.json.

    Raises:
        ValueError: if one cannot be read, or none has what was chosen.
    """
    files = [_read(path) for path in paths]
    chosen.check_metrics(name for file in files for name in file.metrics)
    chosen.labels(label for file in files for label in file.labels)
    return files


def narrowed(chosen: Chosen, file: ResultsFile, files: Sequence[ResultsFile]) -> Chosen:
    """What is to be shown of one file: the labels that it has."""
    if not chosen.only:
        return chosen
    known = chosen.labels(label for one in files for label in one.labels)
    here = [label for label in file.labels if label in known]
    return Chosen(here or ["unpruned"], chosen.metrics, chosen.num_keep, chosen.keep_ratio)


def sources(files: Sequence[ResultsFile]) -> list[str]:
    """Of every file what is said of it above its columns: as much as tells them apart."""
    titles = [file.title for file in files]
    told = [n for n in range(2) if len({title[n] for title in titles}) > 1]
    found = [", ".join(title[n] for n in told) for title in titles]
    if len(set(found)) < len(files):
        found = [
            f"{text}, {title[2]}".removeprefix(", ")
            for text, title in zip(found, titles, strict=True)
        ]
    return [f"{text}: " if text and len(files) > 1 else "" for text in found]


def _read(given: str) -> ResultsFile:
    path = Path(given)
    path = path / RESULTS if path.is_dir() else path
    found = read_json(path, "a results.json of `ocvtp evaluate` or `ocvtp bench`")
    if isinstance(found, dict) and found.get("kind") == KIND:
        return ResultsFile(path, load(path), True)
    return ResultsFile(path, read_results(path), False)
