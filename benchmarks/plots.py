"""Draw the plots of docs/results again, from the results beside them: `make plots`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import curves
from ocvtp.bench import plots as of_times
from ocvtp.evaluation import plots as of_figures
from ocvtp.reporting.figure_files import save_figure
from ocvtp.reporting.results_files import read_results

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def main() -> None:
    """Each folder's, by what its results are of."""
    for path in sorted(RESULTS.rglob("results.json")):
        found = json.loads(path.read_text())
        if "kind" in found:
            drawings = {"ttft": of_times.ttft(found), "stages": of_times.stages(found)}
        else:
            facts = read_results(path)
            made = (of_figures.accuracy(facts), of_figures.differences(facts))
            drawings = {
                name: one
                for name, one in zip(("accuracy", "differences"), made, strict=True)
                if one is not None
            }
        for name, drawing in drawings.items():
            save_figure(drawing, path.with_name(f"{name}.png"), dpi=120)
    save_figure(curves.curves(), curves.FOLDER / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
