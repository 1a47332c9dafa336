"""Questions on drawn scenes: who is right, and how it is counted."""

from __future__ import annotations

import numpy as np
import pytest

from ocvtp.data.questions import KINDS
from ocvtp.data.scenes import LEVELS, draw_scene, split_seed
from ocvtp.evaluation.tasks.scenes import SceneTask


@pytest.fixture(scope="module")
def task():
    return SceneTask(num_images=12, questions=6, size=60, seed=3)


def right(task):
    return [{"answer": item.answers[0]} for item in task.items]


def test_images_are_those_of_the_test_split(task):
    stream = split_seed("test", 3)
    for owner, level in ((0, "easy"), (11, "easy"), (12, "hard"), (23, "hard")):
        scene = draw_scene(stream, owner % 12, 60, style=LEVELS[level])
        assert (np.asarray(task.image(owner)) == scene.image).all()
        assert (task.masks(owner) == np.stack([o.mask for o in scene.objects])).all()


def test_items_of_an_image_stand_side_by_side_and_have_names_of_their_own(task):
    owners = [item.owner for item in task.items]
    assert owners == sorted(owners)
    assert set(owners) == set(range(24))
    assert len({item.key for item in task.items}) == len(task.items)
    per_image = [[i.question for i in task.items if i.owner == owner] for owner in range(24)]
    assert all(len(set(asked)) == len(asked) <= 6 for asked in per_image)


def test_the_same_settings_ask_the_same(task):
    again = SceneTask(num_images=12, questions=6, size=60, seed=3)
    assert again.items == task.items
    assert again.describe() == task.describe()
    other = SceneTask(num_images=12, questions=6, size=60, seed=3, split="val")
    assert other.items != task.items
    assert other.describe() != task.describe()


def test_fewer_images_are_the_first_ones(task):
    few = SceneTask(["easy"], num_images=5, questions=6, size=60, seed=3)
    assert few.items == [item for item in task.items if item.owner < 5]


def test_figures_of_each_level_and_kind(task):
    figures = task.ratios(right(task))
    names = {f"{level}/{kind}" for level in LEVELS for kind in (*KINDS, "all")} | {"all"}
    assert set(figures) == names
    assert all(figure.value == 1 for figure in figures.values())
    assert len(figures["all"].hits) == len(task.items)
    parts = [len(figures[f"hard/{kind}"].hits) for kind in KINDS]
    assert len(figures["hard/all"].hits) == sum(parts)


def test_an_answer_is_right_as_a_whole_word(task):
    records = right(task)
    number = next(n for n, item in enumerate(task.items) if item.kind == "easy/existence")
    for wrong in (records[number]["answer"].upper(), records[number]["answer"] + " .", ""):
        changed = [*records]
        changed[number] = {"answer": wrong}
        figures = task.ratios(changed)
        count = len(figures["easy/existence"].hits)
        assert figures["easy/existence"].value == pytest.approx(1 - 1 / count)
        assert figures["hard/all"].value == 1
    changed[number] = {"answer": f" {records[number]['answer']}\n"}
    assert task.ratios(changed)["all"].value == 1


@pytest.mark.parametrize(
    "settings", [{"levels": []}, {"num_images": 0}, {"questions": 0}, {"split": "dev"}]
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="pass"):
        SceneTask(**settings)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level='medium'"):
        SceneTask(["medium"])
