"""Several questions one after the other, several images in one prompt, and both pruned."""

from __future__ import annotations

import numpy as np
import pytest

from ocvtp import build_pruner
from ocvtp.cli import main
from ocvtp.data.scenes import draw_scene, split_seed
from ocvtp.data.several_images import ask_of_several
from ocvtp.evaluation.conditions import Budget, at_positions, pruner_conditions, unpruned_conditions
from ocvtp.evaluation.labels import ORIGINAL
from ocvtp.evaluation.logs import Log
from ocvtp.evaluation.prompts import make_prompts
from ocvtp.evaluation.report import results, to_markdown
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject, run
from ocvtp.evaluation.tasks.several import SeveralTask
from ocvtp.evaluation.tasks.turns import TurnsTask
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_turns
from ocvtp.recommend.typical import typical


@pytest.fixture(scope="module")
def subject():
    return Subject(*load_model("random:tiny-llava", "float32"), "random:tiny-llava")


@pytest.fixture(scope="module")
def turns():
    return TurnsTask(["easy"], num_images=2, size=48)


@pytest.fixture(scope="module")
def several():
    return SeveralTask(["easy"], num_images=3, questions=3, size=48)


def observed(subject, task, pruner, items=None):
    items = task.items if items is None else items
    inputs = subject.inputs(task, items, [item.owner for item in items])
    shared = subject.sharing([pruner])
    return [record["answer"] for record in subject.observe(task, items, pruner, inputs, shared)]


def test_a_turn_comes_after_the_right_answers_to_those_before_it(turns):
    for owner in range(2):
        own = [item for item in turns.items if item.owner == owner]
        said = [text for item in own for text in (item.question, *item.answers)]
        assert [item.before for item in own] == [tuple(said[: 2 * n]) for n in range(len(own))]
        assert [item.kind for item in own] == [f"easy/turn{n + 1}" for n in range(len(own))]
        assert len({item.question for item in own}) == len(own)
    records = [{"answer": item.answers[0] if item.before else "?"} for item in turns.items]
    figures = turns.ratios(records)
    assert (figures["easy/turn1"].value, figures["easy/turn2"].value) == (0, 1)
    with pytest.raises(ValueError, match="questions=1 is no conversation"):
        TurnsTask(questions=1)


def by_hand(subject, task, item, pruner):
    """On the cache of the first question alone, one row at a time."""
    processor, model = subject.processor, subject.model
    talk = (*item.before, item.question)
    image = task.image(item.owner)
    first = processor(
        images=[image], text=[with_turns(processor, talk[:1], 1)], return_tensors="pt"
    )
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    with pruner(model, processor=processor):
        made = model.generate(**first, **options | ({"max_new_tokens": 1} if item.before else {}))
        start = first["input_ids"].shape[1]
        if item.before:
            whole = processor(
                images=[image], text=[with_turns(processor, talk, 1)], return_tensors="pt"
            )
            start = whole["input_ids"].shape[1]
            cache = {k: v for k, v in made.items() if k in ("cache", "past_key_values")}
            whole.pop("pixel_values")
            made = model.generate(**whole, **cache, **options)
    return processor.decode(made.sequences[0, start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "pruner",
    ["zspaprune", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "divprune"))],
)
def test_a_batch_goes_on_from_the_tokens_of_the_first_question(subject, turns, pruner):
    """Also where a pruner reads the prompt, and rows of a batch are at other turns."""
    pruner = build_pruner(pruner, **({} if pruner == "none" else {"num_keep": 9}))
    said = observed(subject, turns, pruner)
    assert said == [by_hand(subject, turns, item, pruner) for item in turns.items]


def test_read_again_a_pruner_without_a_prompt_gives_the_same(subject, turns):
    again = TurnsTask(["easy"], num_images=2, size=48, cache=False)
    assert again.items == turns.items
    assert again.describe() != turns.describe()
    pruner = build_pruner("fopru", num_keep=9)
    assert observed(subject, again, pruner) == observed(subject, turns, pruner)


def test_the_image_that_is_asked_about_is_named(several):
    stream = split_seed("test", 0)
    for item in several.items:
        scenes = [draw_scene(stream, 2 * item.owner + n, 48).objects for n in range(2)]
        words = item.question.split()
        number = ["first", "second"].index(words[-2])
        there = [{(o.colour, o.shape) for o in objects} for objects in scenes]
        pair = (words[3], words[4])
        assert item.answers == (("yes",) if pair in there[number] else ("no",))
        where = "there" if pair in there[number] else "elsewhere"
        assert item.kind == f"easy/{where if pair in there[0] | there[1] else 'nowhere'}"
    shown = [np.asarray(several.image(number)) for number in several.shown(1)]
    assert (shown[1] == draw_scene(stream, 3, 48).image).all()
    with pytest.raises(ValueError, match="1 images; pass 2 to 4"):
        ask_of_several([[]], 1, np.random.default_rng(0))


def test_every_image_of_a_prompt_keeps_its_own_tokens(subject, several):
    pruner = build_pruner("divprune", num_keep=9)
    items = several.items[:2]
    inputs = make_prompts(subject.processor, several, items, [0, 0], "cpu", subject.dtype)
    assert len(inputs.first["pixel_values"]) == 4
    found = subject.observe(several, items, pruner, inputs, subject.sharing([pruner]))
    assert [record["kept"] for record in found] == [9, 9]
    assert typical(subject, several).images == 2


def test_what_drops_nothing_has_no_positions():
    budgets = [Budget(num_keep=9)]
    found = [*unpruned_conditions(), *pruner_conditions("fopru", budgets, [0], [], 36)]
    assert at_positions(found, ()) == found
    both = at_positions(found, ("contiguous", "original"))
    labels = ["unpruned", "shuffled", "fopru", "fopru" + ORIGINAL]
    assert [one.label for one in both] == labels
    assert [one.positions for one in both] == [None, None, "contiguous", "original"]
    assert len({one.key for one in both}) == 4


def test_contiguous_positions_said_aloud_are_those_that_nobody_named(subject, several, tmp_path):
    """A run goes on, whichever of the two began it; what was trained at others is another."""
    usual = pruner_conditions("fopru", [Budget(num_keep=9)], [0], [], 36)
    said = at_positions(usual, ["contiguous"])
    for first, second, name in ((usual, said, "a"), (said, usual, "b")):
        run(subject, several, first, tmp_path / name, batch_size=99)
        (log,) = (tmp_path / name).iterdir()
        before = log.read_text()
        run(subject, several, second, tmp_path / name, batch_size=99)
        assert log.read_text() == before
    header = {"positions": "contiguous"}
    Log(tmp_path, "x # 0", header, {"positions": "contiguous"})
    with pytest.raises(ValueError, match="positions was 'contiguous' and is 'original'"):
        Log(tmp_path, "x # 0", {}, {"positions": "original"})


@pytest.mark.slow
def test_original_positions_are_rows_of_their_own_beside_contiguous_ones(
    subject, several, tmp_path
):
    report, _ = evaluate(
        subject,
        several,
        ["fopru"],
        [Budget(num_keep=9)],
        tmp_path,
        seeds=[0],
        controls=("random", "oracle"),
        positions=("contiguous", "original"),
    )
    labels = {row.label for row in report.rows}
    pruned = {"fopru", "random", "oracle"}
    assert labels == {"unpruned", "shuffled", *pruned, *(name + ORIGINAL for name in pruned)}
    found = results(report)["original_minus_contiguous"]
    assert {part["label"] for part in found} == pruned
    figures = {row.label: row.figures["easy/all"].value for row in report.rows}
    for part in found:
        label = part["label"]
        assert part["value"] == pytest.approx(figures[label + ORIGINAL] - figures[label])
    assert "## easy/all, original positions minus contiguous" in to_markdown(report)
    with pytest.raises(ValueError, match="positions='gaps'; pass 'contiguous' or 'original'"):
        evaluate(subject, several, [], [], tmp_path, positions=("gaps",))


def test_a_tower_alone_has_no_positions(tmp_path, capsys):
    words = ["evaluate", "--tower", "random:tiny", "--task", "coverage", "--num-keep", "9"]
    assert main([*words, "--output", str(tmp_path), "--positions", "original"]) == 2
    assert "--positions original are those in a language model" in capsys.readouterr().err
