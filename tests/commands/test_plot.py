"""`ocvtp plot`: drawings as narrow as a column, in which everything can be read."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.text import Text

from ocvtp.bench import plots as of_times
from ocvtp.cli import main
from ocvtp.evaluation import plots as of_figures
from ocvtp.reporting.plot_style import alike_long, look
from ocvtp.reporting.results_files import read_results

RESULTS = Path(__file__).parents[2] / "docs" / "results"
BENCH = RESULTS / "bench-llava-mid-cpu" / "results.json"
SMALLEST = 6  # points


def timed(*factors):
    """A benchmark at as many budgets."""
    times = json.loads(BENCH.read_text())
    for cell in times["cells"]:
        bare, *rows = cell["rows"]
        more = [one | {"num_keep": n * one["num_keep"]} for n in factors for one in rows]
        cell["rows"] = [bare, *more]
    return times


def drawings(width):
    figures = read_results(RESULTS / "photos" / "results.json")
    figures["metrics"] = figures["metrics"][:1]
    times = timed(1)
    return {
        "accuracy": lambda: of_figures.accuracy(figures, width),
        "differences": lambda: of_figures.differences(figures, width),
        "ttft": lambda: of_times.ttft(timed(1, 2), width=width),
        "rows": lambda: of_times.ttft(times, width=width),
        "stages": lambda: of_times.stages(times, width),
    }


def boxes(drawing):
    """All texts that are shown, and where."""
    renderer = drawing.canvas.get_renderer()
    drawing.draw(renderer)
    found = [text for text in drawing.findobj(Text) if text.get_visible() and text.get_text()]
    for axis in drawing.axes:
        for one in (axis.xaxis, axis.yaxis):
            low, high = sorted(one.get_view_interval())
            beyond = [t.label1 for t in one.get_major_ticks() if not low <= t.get_loc() <= high]
            found = [text for text in found if not any(text is label for label in beyond)]
    return [(text, Text.get_window_extent(text, renderer)) for text in found]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["ttft", "differences", "accuracy", "stages", "rows"])
def test_a_column_is_legible(kind):
    drawing = drawings(3.3)[kind]()
    assert drawing.get_figwidth() == 3.3
    texts = boxes(drawing)
    page = drawing.bbox
    for text, box in texts:
        assert text.get_fontsize() >= SMALLEST, text.get_text()
        assert page.x0 - 1 <= box.x0 <= box.x1 <= page.x1 + 1, text.get_text()
        assert page.y0 - 1 <= box.y0 <= box.y1 <= page.y1 + 1, text.get_text()
    for (text, a), (other, b) in combinations(texts, 2):
        shared = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(shared) <= 1.5, f"{text.get_text()} on {other.get_text()}"
    (axis,) = drawing.axes
    assert axis.get_window_extent().height > page.width / 3


@pytest.mark.parametrize("kind", ["ttft", "accuracy"])
def test_no_two_lines_of_a_legend_look_alike(kind):
    (axis,) = drawings(3.3)[kind]().axes
    lines = axis.get_legend().get_lines()
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == len(lines) == len(names) == len(set(names))
    assert any(name.startswith("unpruned") for name in names)


def test_a_method_of_yours_is_bold_in_a_legend_too():
    times = timed(1, 2)
    for one in times["cells"][0]["rows"]:
        one["yours"] = one["label"] == "fopru"
    legend = of_times.ttft(times, width=3.3).axes[0].get_legend()
    bold = [text.get_text() for text in legend.get_texts() if text.get_fontweight() == "bold"]
    assert len(bold) == 4
    assert all(name.startswith("fopru") for name in bold)


def test_names_are_cut_as_long_as_they_can_be_told_apart():
    names = ["surprise:surprise_power=0", "surprise:attention_power=0", "ridge"]
    found = alike_long(names, 12)
    assert len(set(found)) == 3
    assert found[2] == "ridge"
    assert max(map(len, found)) < 26
    assert alike_long(["x" * 40] * 2, 12) == ["xxxxx…xxxxxx"] * 2


def run(capsys, *words):
    status = main(["plot", *map(str, words)])
    return status, *capsys.readouterr()


def test_files_are_written_as_asked(capsys, tmp_path):
    words = [BENCH, "--only", "fopru,ocvtp", "--output", tmp_path, "--pdf", "--plots", "ttft"]
    before = dict(mpl.rcParams)
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert out == f"wrote {tmp_path / 'ttft.pdf'}\n"
    content = (tmp_path / "ttft.pdf").read_bytes()
    assert b"/Type3" not in content
    assert b"/MediaBox [ 0 0 237.6 " in content
    assert dict(mpl.rcParams) == before


def test_only_what_was_named_is_drawn(capsys, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "ocvtp.commands.plot.save_figure",
        lambda drawing, path, dpi: drawn.setdefault(path.name, drawing),
    )
    facts = read_results(RESULTS / "demo-vlm" / "results.json")
    timed = json.loads(BENCH.read_text())
    for one in timed["cells"][0]["rows"][1:]:
        one["num_keep"] = 36
    (tmp_path / "times.json").write_text(json.dumps(timed))
    words = [RESULTS / "demo-vlm", tmp_path / "times.json", "--only", "fopru", "ocvtp"]
    assert run(capsys, *words, "--metric", "hard/all", "ttft")[0] == 0
    assert set(drawn) == {
        f"{n}.png" for n in ("accuracy", "differences", "ttft", "stages", "tradeoff")
    }
    (axis,) = drawn["accuracy.png"].axes
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert sorted(names) == ["fopru", "ocvtp", "unpruned 56.1"]
    assert axis.get_title(loc="left") == "hard/all"
    assert drawn["tradeoff.png"].axes[0].get_ylabel() == "hard/all of scenes, percent"
    assert "easy/all" in facts["metrics"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--width", "1"], "a drawing of 1.0 inches; pass a width of 2.0 to 100."),
        (["--dpi", "7"], "--dpi 7; pass 30 to 2400."),
        (["--only", "foprue"], "did you mean 'fopru'?"),
        (["--plots", "accuracy"], "there is nothing accuracy to draw"),
        (["--metric", "tpot"], "there is nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(capsys, tmp_path, words, told):
    status, out, err = run(capsys, BENCH, *words, "--output", tmp_path / "plots")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert told in err
    assert not (tmp_path / "plots").exists()


def test_a_page_keeps_its_names_beside_the_lines():
    assert look(7.2).beside
    assert not look(3.3).beside
    facts = copy.deepcopy(read_results(RESULTS / "demo-vlm" / "results.json"))
    assert of_figures.accuracy(facts).axes[0].get_legend() is None
