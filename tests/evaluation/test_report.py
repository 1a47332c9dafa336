import json

import numpy as np
import pytest
from made_up_report import report, row, share, usual
from matplotlib.figure import Figure

from ocvtp import list_pruners
from ocvtp.evaluation import tables
from ocvtp.evaluation.intervals import difference, estimate
from ocvtp.evaluation.labels import CONTROLS, MEANINGS
from ocvtp.evaluation.report import results, short_table, to_markdown, write
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.pruners import pruner_class


def by_label(found, label, budget=0.25):
    (one,) = [r for r in found["rows"] if r["label"] == label and r["budget"] == budget]
    return one


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_rows(text, heading):
    """The cells of the table below a heading, its head first."""
    lines = text.split(heading + "\n\n", 1)[1].splitlines()
    table = lines[: lines.index("")] if "" in lines else lines
    return [cells(line) for line in table if not line.startswith("|-")]


def warned(*rows, **given):
    return [(w["level"], w["text"]) for w in results(report(*rows, **given))["warnings"]]


def test_results_are_the_estimates_and_paired_differences():
    given = usual()
    figure = by_label(results(given), "fopru:strategy=row")["figures"]["easy/all"]
    ratios = {r.label: r.figures["easy/all"] for r in given.rows if r.budget != 0.5 and r.figures}
    mine = ratios["fopru:strategy=row"]
    alone = estimate(mine)
    assert figure["value"] == pytest.approx(0.65)
    assert (figure["n"], figure["images"]) == (400, 200)
    assert [figure["low"], figure["high"]] == pytest.approx([alone.low, alone.high], abs=1e-6)
    for key, other in (("minus_unpruned", "unpruned"), ("minus_random", "random")):
        right = difference(mine, ratios[other])
        found = figure[key]
        assert found["p"] == pytest.approx(right.p, rel=1e-4)
        numbers = [found[name] for name in ("value", "low", "high", "agreement")]
        assert numbers == pytest.approx(
            [right.value, right.low, right.high, right.agreement], abs=1e-6
        )


def test_nothing_is_compared_with_itself_or_with_another_budget():
    found = results(usual())
    unpruned = by_label(found, "unpruned", 1.0)["figures"]["easy/all"]
    assert unpruned["minus_unpruned"] is unpruned["minus_random"] is None
    random = by_label(found, "random")["figures"]["easy/all"]
    assert random["minus_random"] is None
    assert random["minus_unpruned"]["value"] == pytest.approx(-0.4)


def test_what_counts_nothing_is_null():
    nothing = Ratio(np.zeros(4), np.zeros(4), np.arange(4))
    rows = [row("a", 0.5, 1, figures={"easy/all": share(9), "empty": nothing})]
    figure = results(report(*rows))["rows"][0]["figures"]["empty"]
    assert figure["value"] is figure["low"] is figure["high"] is None
    assert table_rows(to_markdown(report(*rows)), "### 50% of the tokens")[1][2] != "-"


def test_the_report_reads_like_this():
    extra = {"easy/all": share(14), "easy/colour": share(6, of=8), "hard/colour": share(3)}
    text = to_markdown(
        report(
            row("unpruned", 1.0, 20),
            row("random", 0.25, 10, seeds=3),
            row("fopru:strategy=row", 0.25, 14, figures=extra, visual_tokens=9.25),
            row("tome", 0.25, None, note="needs blocks."),
            row("topv:stages=x", None, 12),
        )
    )
    assert text.startswith(
        "# scenes on demo\n\n> Note. easy/all: only 20 questions; the intervals are wide and rank"
        " little.\n\n## easy/all\n\n20 questions on 10 images.\n\n### All tokens\n\n"
        "| pruner               | tokens |                    all |\n"
        "|----------------------|-------:|-----------------------:|\n"
        "| `unpruned` (control) |     36 | 100.0 (100.0 to 100.0) |\n\n"
    )
    assert table_rows(text, "### 25% of the tokens") == [
        ["pruner", "tokens", "all", "minus unpruned", "minus random", "colour"],
        ["`fopru:strategy=row`", "9.2", "70.0 (55.0 to 85.0)", "-30.0 (-45.0 to -15.0) *",
         "+20.0 (+5.0 to +35.0) *", "75.0"],
        ["`random` (control, 3 seeds)", "9", "50.0 (50.0 to 50.0)", "-50.0 (-50.0 to -50.0) *",
         "-", "-"],
        ["`tome`", "9", "-", "-", "-", "-"],
    ]  # fmt: skip
    assert "### Budgets of their own\n" in text
    assert "## Notes\n\n- `tome` at 25%: needs blocks.\n" in text
    assert text.endswith(
        "## Settings and environment\n\n    ocvtp evaluate --task scenes\n\n"
        '- levels: ["easy"]\n- device: cpu\n'
    )


def test_differences_beside_zero_have_no_star():
    rows = [row("random", 0.5, 10), row("fopru", 0.5, 11), row("scope", 0.5, 19)]
    table = table_rows(to_markdown(report(*rows)), "### 50% of the tokens")
    stars = {line[0]: line[3].endswith("*") for line in table[1:]}
    assert stars == {"`scope`": True, "`fopru`": False, "`random` (control)": False}


def test_the_short_table_reads_like_this():
    assert short_table(usual()).splitlines() == [
        "| easy/all             |           50% |           25% |",
        "|----------------------|--------------:|--------------:|",
        "| `oracle` (control)   |     90.0 ±2.8 |     80.0 ±3.5 |",
        "| `ocvtp`              |     80.0 ±3.5 |     70.0 ±3.4 |",
        "| `fopru:strategy=row` | **75.0 ±3.4** | **65.0 ±3.2** |",
        "| `random` (control)   |     60.0 ±2.9 |     50.0 ±0.0 |",
        "| `tome`               |             - |             - |",
        "",
        "`unpruned` (control) 90.0 ±2.8, `shuffled` (control) 40.0 ±2.8. ±: half of the 95%"
        " interval. Bold: best without training.",
    ]


def bold(found):
    """Labels of a short table that are bold at the first budget."""
    return {cells(line)[0].strip("`") for line in found.splitlines() if "**" in line}


def test_nothing_is_best_where_nothing_counts():
    rows = [row("unpruned", 1.0, 0), row("random", 0.5, 0), row("fopru", 0.5, 0)]
    assert bold(text := short_table(report(*rows))) == set()
    assert "Bold" not in text
    assert bold(short_table(report(*rows, row("oracle", 0.5, 3)))) == set()
    assert bold(short_table(report(*rows, row("scope", 0.5, 1)))) == {"scope"}
    lower = {"lower_is_better": ["easy/all"]}
    assert bold(short_table(report(*rows, **lower))) == set()
    assert bold(short_table(report(*rows[:1], *rows[2:], row("scope", 0.5, 1), **lower))) == {
        "fopru"
    }


def test_a_metric_that_is_0_everywhere_is_told():
    rows = [row("unpruned", 1.0, 0, 400), row("shuffled", 1.0, 0, 400), row("fopru", 0.5, 0, 400)]
    for given in ({}, {"not_judged": ["easy/all"]}):
        ((level, text),) = warned(*rows, **given)
        assert level == "loud"
        assert text.startswith("easy/all: every figure is 0. No answer counts here")
    some = [row("unpruned", 1.0, 390, 400), *rows[1:], row("fopru", 0.25, 0, 400)]
    assert warned(*some) == [
        ("mild", "easy/all at 50%, 25%: every figure is 0, so that nothing is ranked there.")
    ]
    assert warned(*rows, lower_is_better=["easy/all"])[0][1].startswith("easy/all: unpruned minus")


@pytest.mark.slow
def test_equal_figures_are_all_bold():
    rows = [row(label, 0.5, 15) for label in ("fopru", "scope")]
    rows += [row("tome", 0.5, 14), row("random", 0.5, 15), row("ocvtp", 0.5, 15, trained=True)]
    assert bold(short_table(report(*rows))) == {"fopru", "scope"}
    near = [row("fopru", 0.5, 9000, 10_000), row("scope", 0.5, 9001, 10_000)]
    assert bold(short_table(report(*near))) == {"fopru", "scope"}  # 90.0 both
    apart = [row("fopru", 0.5, 9000, 10_000), row("scope", 0.5, 9010, 10_000)]
    assert bold(short_table(report(*apart))) == {"scope"}
    lower = [*apart, row("tome", 0.5, 9000, 10_000)]
    assert bold(short_table(report(*lower, lower_is_better=["easy/all"]))) == {"fopru", "tome"}


def test_a_method_of_yours_is_ranked_and_called_so():
    mine = row("mine", 0.5, 16, yours=True)
    given = report(row("fopru", 0.5, 15), mine, row("random", 0.5, 10))
    table = short_table(given)
    assert "| `mine` (yours)     |" in table
    assert bold(table) == {"mine` (yours)"}
    assert results(given)["rows"][1]["yours"]
    assert table_rows(to_markdown(given), "### 50% of the tokens")[1][0] == "`mine` (yours)"


def test_the_report_says_what_its_controls_are():
    own = {"control": True}
    labels = ["untrained:standardize=true", "pool", "pool (original positions)"]
    rows = [row(label, 0.5, 9, **own) for label in labels]
    others = [row("unpruned", 1.0, 18), row("fill_only", 0.5, 9), row("other", 0.5, 9, **own)]
    legend = to_markdown(report(*rows, *others)).split("## How to read this")[1]
    said = [line for line in legend.splitlines() if line.startswith("  - ")]
    assert said == [
        "  - `pool` averages neighbouring tokens, as if the image had been smaller",
        "  - `untrained` is a trained pruner's network with random weights",
    ]


def test_every_control_has_a_meaning():
    controls = {name for name in list_pruners() if pruner_class(name).status == "control"}
    assert {*CONTROLS, *controls} - {"none"} <= set(MEANINGS)


def test_remarks_are_in_the_report():
    given = report(row("fopru", 0.5, 15), remarks=["kept: x."])
    assert results(given)["remarks"] == ["kept: x."]
    assert "> Note. kept: x.\n" in to_markdown(given)


def test_the_short_table_has_one_a_metric_and_shares_in_full():
    both = {"a": share(3), "b": share(13)}
    rows = [row("fopru", 0.5, 0, figures=both)]
    text = short_table(report(*rows, metrics=["a", "b"], percent=False))
    assert "| a " in text
    assert "**0.150 ±0." in text
    assert "**0.650 ±0." in text.split("\n\n| b ")[1]


def test_without_pruned_rows_the_short_table_says_so():
    assert short_table(report(row("unpruned", 1.0, 9))) == "easy/all: nothing was pruned.\n"


def test_budgets_of_their_own_are_in_the_short_table_with_their_tokens():
    own = row("fopru:max_keep=9", None, 18, 20, visual_tokens=8.75)
    told = "`fopru:max_keep=9` 90.0 ±12.5 with 8.8 tokens. ±: half of the 95% interval."
    text = short_table(report(row("unpruned", 1.0, 20, 20), own))
    assert text == f"easy/all: `unpruned` (control) 100.0 ±0.0, {told}\n"
    assert told in short_table(report(own, row("fopru", 0.5, 9)))


@pytest.mark.parametrize(
    ("oracle", "level"), [(60, "loud"), (139, "mild"), (140, None), (200, None)]
)
def test_an_oracle_that_does_not_win_is_warned_of(oracle, level):
    """By the paired interval, and at its own budget."""
    rows = [
        row("oracle", 0.25, oracle, 400),
        row("uniform", 0.25, 140, 400, control=True),
        row("fopru", 0.25, 120, 400),
        row("fopru", 0.5, 390, 400),
        row("tome", 0.25, None, note="needs blocks."),
    ]
    found = warned(*rows)
    assert [kind for kind, _ in found] == ([level] if level else [])
    for _, text in found:
        assert text.startswith(
            "easy/all at 25%: the oracle does not win. Oracle minus uniform is -"
        )
    text = to_markdown(report(*rows))
    assert ("> **Warning.** " in text) == (level == "loud")
    assert ("> Note. " in text) == (level == "mild")


def test_one_image_says_nothing_of_whether_a_model_needs_images():
    def of_one(label, right):
        figures = {"easy/all": Ratio((np.arange(400) < right) * 1.0, np.ones(400), np.zeros(400))}
        return row(label, 1.0, None, figures=figures)

    rows = of_one("unpruned", 300), of_one("shuffled", 300)
    assert " on 1 image.\n" in to_markdown(report(*rows))
    ((level, text),) = warned(*rows)
    assert level == "mild"
    assert "there is one image, and no wrong one to ask about" in text
    ((_, text),) = warned(of_one("oracle", 20), of_one("fopru", 280))
    assert "is -65.0. " in text


def test_an_oracle_is_beside_pruners_at_its_own_positions():
    rows = [
        row("oracle", 0.25, 60, 400),
        row("oracle (original positions)", 0.25, 140, 400),
        row("fopru (original positions)", 0.25, 139, 400),
        row("fopru", 0.25, 59, 400),
    ]
    assert warned(*rows) == []
    ((_, text),) = warned(*rows, row("tome (original positions)", 0.25, 200, 400))
    assert "Oracle minus tome (original positions) is -" in text


def test_a_trained_pruner_may_win_against_the_oracle():
    rows = [row("oracle", 0.25, 60, 400), row("learned", 0.25, 140, 400, trained=True)]
    ((level, text),) = warned(*rows)
    assert level == "mild"
    assert "Oracle minus learned is -" in text
    assert text.endswith("that pruner was trained, and may know more.")
    found = dict(warned(*rows, row("fopru", 0.25, 200, 400)))
    assert "Oracle minus fopru is -" in found["loud"]
    assert "Oracle minus learned is -" in found["mild"]


@pytest.mark.parametrize(("shuffled", "warns"), [(100, False), (300, True), (299, True)])
def test_a_model_that_needs_no_image_is_warned_of(shuffled, warns):
    rows = [row("unpruned", 1.0, 300, 400), row("shuffled", 1.0, shuffled, 400)]
    found = warned(*rows)
    assert [kind for kind, _ in found] == ["loud"] * warns
    for _, text in found:
        assert "minus shuffled" in text


@pytest.mark.parametrize(("of", "warns"), [(299, True), (300, False)])
def test_few_questions_are_warned_of(of, warns):
    assert [kind for kind, _ in warned(row("fopru", 0.5, 9, of))] == ["mild"] * warns


def test_what_is_written_can_be_read_and_drawn_again(tmp_path):
    given = usual()
    answers = {
        "items": [{"key": "easy/0", "question": "q ±", "answers": ["yes"]}],
        "conditions": {"random@0.25": ["yes", "no"], "nan": [float("nan")]},
    }
    paths = write(given, tmp_path / "new", answers)
    names = ["results.json", "report.md", "accuracy.png", "differences.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)
    read = json.loads(paths[0].read_text(encoding="utf-8"))
    assert read.pop("answers") == answers | {
        "conditions": {"random@0.25": ["yes", "no"], "nan": [None]}
    }
    assert read == results(given)
    assert read["schema"] == 1
    assert tables.full(read) == paths[1].read_text(encoding="utf-8") == to_markdown(given)
    assert tables.short(read) == short_table(given)
    lines = paths[0].read_text(encoding="utf-8").splitlines()
    assert '   "random@0.25": ["yes", "no"],' in lines
    assert sum(line.startswith('   "label": ') for line in lines) == len(given.rows)


def test_what_fails_leaves_old_files_whole(tmp_path, monkeypatch):
    write(usual(), tmp_path, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write(usual(of=800), tmp_path, {"items": [object()]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def fail(*_, **__):
        raise OSError("full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="full"):
        write(usual(), tmp_path, {})
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_plots_of_an_earlier_run_do_not_stay(tmp_path):
    write(usual(), tmp_path, {})
    paths = write(report(row("unpruned", 1.0, 9)), tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "results.json"]
    assert len(paths) == 2


def test_reports_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"metrics=\['hard/all'\].*each of easy/all"):
        report(row("fopru", 0.5, 9), metrics=["hard/all"])
    with pytest.raises(ValueError, match="at least one"):
        report(row("fopru", 0.5, 9), metrics=[])
    with pytest.raises(ValueError, match=r"fopru at 0\.5 is there twice"):
        report(row("fopru", 0.5, 9), row("fopru", 0.5, 8), row("fopru", 0.25, 8))
