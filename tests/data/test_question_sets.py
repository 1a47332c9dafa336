"""Questions about images: drawn scenes, their order in training, unreadable images."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import groupby, islice

import numpy as np
import pytest
from PIL import Image

from ocvtp.data.module import QuestionDataModule
from ocvtp.data.question_sets import ImageQuestion, QuestionSet
from ocvtp.data.questions import ask
from ocvtp.data.scenes import LEVELS, draw_scene, split_seed, write_scenes


def keep(items):
    """A transform that makes a batch of the items themselves."""
    return {"items": items, "keys": [item.get("key") for item in items]}


def module(root, **options):
    settings = {"num_train": 6, "num_val": 3, "questions": 4, "image_size": 64, "scene_seed": 3}
    made = QuestionDataModule(
        str(root), **settings | {"batch_size": 6, "transform": keep} | options
    )
    made.prepare_data()
    made.setup()
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "scenes"
    module(folder)
    return folder


def test_scenes_come_as_they_were_drawn_with_the_objects_of_their_questions(root):
    asked = module(root).questions("val")
    assert len(asked) == 3 * 4
    levels = Counter(key.split("/")[0] for key in (q.key for q in asked.questions))
    assert levels == {"easy": 8, "hard": 4}
    for item in (asked[n] for n in range(len(asked))):
        level, split, image, number = item["key"].split("/")
        scene = draw_scene(split_seed(split, 3), int(image) - 1, 64, style=LEVELS[level])
        assert np.array_equal(np.asarray(item["image"]), scene.image)
        random = np.random.default_rng([split_seed(split, 3), int(image), 3])
        expected = ask(scene.objects, 4, random, distinct=True)
        if int(number) >= len(expected):  # one was asked twice, and another for it
            continue
        one = expected[int(number)]
        assert (item["question"], item["answer"]) == (one.text, one.answer)
        masks = [scene.objects[place].mask for place in one.objects]
        assert np.array_equal(item["masks"], np.array(masks).reshape(-1, 64, 64))
        assert item["masks"].dtype == np.bool_
        assert item["before"] == ()


def test_every_scene_has_its_questions_and_none_twice_while_there_are_others(root):
    for data in (module(root).train_set, module(root).val_set):
        for _, own in groupby(data.questions, key=lambda question: question.image):
            texts = [question.question for question in own]
            assert len(texts) == 4
            assert len(set(texts)) == 4


@pytest.mark.slow
def test_scenes_of_too_few_questions_repeat_them(tmp_path):
    data = module(tmp_path / "few", levels="easy", num_train=2, questions=150)
    texts = [question.question for question in data.train_set.questions[:150]]
    once = list(dict.fromkeys(texts))
    assert len(once) < 150
    assert texts == (once * 150)[:150]


def test_one_level_lies_in_the_root_itself(tmp_path):
    data = module(tmp_path / "hard", levels="hard")
    assert data.train_set.questions[0].image.startswith("train2017/")
    assert data.train_set.questions[0].key == "train/1/0"
    assert (tmp_path / "hard/train2017/000000000001.png").is_file()


def test_jpegs_of_before_are_written_as_before(tmp_path):
    write_scenes(tmp_path, 1, 1, 64, 0)
    assert (tmp_path / "train2017/000000000001.jpg").is_file()
    with pytest.raises(ValueError, match="was made with"):
        write_scenes(tmp_path, 1, 1, 64, 0, lossless=True)


def keys(loader, num):
    return [batch["keys"] for batch in islice(iter(loader), num)]


def test_questions_of_an_image_stay_together_in_an_order_of_each_epoch(root):
    data = module(root, batch_size=4)
    loader = data.train_dataloader()
    epochs = [[key for batch in loader for key in batch["keys"]] for _ in range(3)]
    for order in epochs:
        assert len(set(order)) == 6 * 4
        images = [image for image, _ in groupby(order, key=lambda key: key.rsplit("/", 1)[0])]
        assert len(images) == len(set(images)) == 6
    assert len({tuple(order) for order in epochs}) == 3
    assert epochs[0] != [question.key for question in data.train_set.questions]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_goes_on_inside_of_an_image(root, num_workers):
    whole = keys(module(root).train_dataloader(), 4)
    first = module(root, num_workers=num_workers)
    assert keys(first.train_dataloader(), 1) == whole[:1]  # 6 of 8 questions of two images
    second = module(root, num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert keys(second.train_dataloader(), 3) == whole[1:4]


def test_a_checkpoint_of_other_questions_is_refused(root, tmp_path):
    first = module(root)
    keys(first.train_dataloader(), 1)
    other = module(tmp_path / "other", num_train=12, questions=2)
    other.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="num_groups"):
        other.train_dataloader()


def test_validation_is_in_order_and_may_be_left_out(root, tmp_path):
    data = module(root)
    seen = [key for batch in data.val_dataloader() for key in batch["keys"]]
    assert seen == [question.key for question in data.val_set.questions]
    alone = module(tmp_path / "alone", num_val=0)
    assert not alone.has_validation
    assert alone.val_dataloader() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"questions": 0}, "questions=0"),
        ({"transform": None}, "has no transform; set `.transform` to a PromptTransform"),
        ({"levels": "medium"}, "level='medium'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        module(tmp_path / "refused", **options)


def test_scenes_of_another_tool_are_refused(root, tmp_path):
    data = module(tmp_path / "other", levels="easy")
    file = tmp_path / "other/annotations/instances_val2017.json"
    file.write_text(file.read_text().replace('"colour"', '"hue"'))
    with pytest.raises(ValueError, match="object without 'colour'"):
        data.questions("val")


def folder_of_two(folder):
    Image.new("RGB", (8, 6), "red").save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    names = ("bad.png", "good.png", "bad.png", "absent.png")
    return [ImageQuestion(str(n), name, "What?", "red") for n, name in enumerate(names)]


def test_unreadable_images_are_errors_or_named(tmp_path):
    asked = folder_of_two(tmp_path)
    data = QuestionSet(tmp_path, asked, on_error="skip")
    assert [question.key for question in data.questions] == ["0", "2", "1", "3"]
    assert data.owners.tolist() == [0, 0, 1, 2]
    items = [data[n] for n in range(4)]
    assert [item.get("key") for item in items] == [None, None, "1", None]
    assert items[2]["masks"] is None
    assert items[0]["error"].startswith("bad.png: ")
    assert items[3]["error"].startswith("absent.png: ")
    with pytest.raises(ValueError, match=r"question 0 about .*bad\.png cannot be used"):
        QuestionSet(tmp_path, asked)[0]


def test_a_set_is_not_empty_and_has_each_question_once(tmp_path):
    with pytest.raises(ValueError, match="no question"):
        QuestionSet(tmp_path, [])
    twice = [ImageQuestion("a", "x.png", "?", "!")] * 2
    with pytest.raises(ValueError, match="two questions are a"):
        QuestionSet(tmp_path, twice)
    with pytest.raises(ValueError, match="on_error='maybe'"):
        QuestionSet(tmp_path, twice[:1], on_error="maybe")


def test_a_set_goes_to_another_process(root):
    data = module(root).val_set
    there = copy.deepcopy(data)  # by the state that is pickled
    assert np.array_equal(np.asarray(there[1]["image"]), np.asarray(data[1]["image"]))
