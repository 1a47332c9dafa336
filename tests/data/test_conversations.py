"""Conversations about images from LLaVA's files."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from PIL import ExifTags, Image

from ocvtp.data.conversations import ConversationDataModule


def turns(*texts):
    roles = ("human", "gpt")
    return [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]


def sample(image="a/one.png", said=("<image>\nWhat?", "That."), **more):
    return {"id": "x", "image": image, "conversations": turns(*said), **more}


SAMPLES = [
    sample(),
    sample("two.png", ("Where?\n<image>", " There. ", "Why?", "So."), boxes=[[2, 1, 5.5, 4]]),
    sample(said=("How many?", "2")),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    Image.new("RGB", (12, 8), "red").save(tmp_path / "images/a/one.png")
    Image.new("RGB", (10, 6), "blue").save(tmp_path / "images/two.png")
    return tmp_path


def module(folder, samples, lines=False, **options):
    text = "\n".join(json.dumps(s) for s in samples) if lines else json.dumps(samples)
    (folder / "train.json").write_text(text)
    return ConversationDataModule(str(folder), "train.json", images="images", **options)


@pytest.mark.parametrize("lines", [False, True])
def test_every_answer_is_a_question_with_what_was_said_before(folder, lines):
    data = module(folder, SAMPLES, lines).questions("train")
    assert [(q.key, q.image, q.question, q.answer, q.before) for q in data.questions] == [
        ("train/1/0", "a/one.png", "What?", "That.", ()),
        ("train/3/0", "a/one.png", "How many?", "2", ()),
        ("train/2/0", "two.png", "Where?", "There.", ()),
        ("train/2/1", "two.png", "Why?", "So.", ("Where?", "There.")),
    ]
    assert data.owners.tolist() == [0, 0, 1, 1]
    assert data[0]["image"].size == (12, 8)
    assert data[0]["masks"] is None


def test_boxes_become_masks_of_the_pixels_that_they_touch(folder):
    said = turns("<image>Where?", "There.", "Why?", "So.", "Nothing?", "No.")
    said[2]["boxes"] = [[0, 0, 1, 1], [8, 4, 99, 99]]
    said[4]["boxes"] = []
    given = {"image": "two.png", "conversations": said, "boxes": [[2, 1, 5.5, 4]]}
    data = module(folder, [given]).questions("train")
    shared, own, none = (data[n]["masks"] for n in range(3))
    expected = np.zeros((6, 10), np.bool_)
    expected[1:4, 2:6] = True
    assert np.array_equal(shared, expected[None])
    assert own.shape == (2, 6, 10)
    assert own.sum(axis=(1, 2)).tolist() == [1, 4]
    assert none.shape == (0, 6, 10)


def test_boxes_are_of_the_upright_image(folder):
    path = folder / "images/two.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(path).save(path, exif=exif)
    data = module(folder, [sample("two.png", boxes=[[0, 7, 6, 10]])]).questions("train")
    assert data[0]["image"].size == (6, 10)
    assert data[0]["masks"].sum() == 18
    assert data[0]["masks"][0, 7:].all()


def test_a_box_outside_of_its_image_is_an_error_of_the_item(folder):
    given = [sample("two.png", boxes=[[20, 1, 25, 4]]), sample()]
    with pytest.raises(ValueError, match=r"lies outside of the image, which has 10 x 6 pixels"):
        module(folder, given).questions("train")[0]
    data = module(folder, given, on_error="skip").questions("train")
    assert "outside of the image" in data[0]["error"]
    assert data[1]["answer"] == "That."


BAD = {
    "lacks 'image'": {"conversations": turns("What?", "That.")},
    "as 'image'; pass a text": sample(image=7),
    "no whole 'conversations'": sample(said=("What?",)),
    "has no whole": {"image": "two.png"},
    "turn 2 of .* is from 'human', not from 'gpt'": {
        "image": "two.png",
        "conversations": [{"from": "human", "value": "a"}] * 2,
    },
    "turn 1 of .* is from None": {"image": "two.png", "conversations": ["What?", "That."]},
    "turn 1 of .* as 'value'": {
        "image": "two.png",
        "conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}],
    },
    "turn 1 of .* has 2 <image>": sample(said=("<image><image> What?", "That.")),
    "turn 2 of .* has 1 <image>": sample(said=("What?", "<image>")),
    "turn 3 of .* has 1 <image>": sample(said=("What?", "That.", "<image> And?", "So.")),
    "turn 1 of .* says nothing": sample(said=("<image>\n", "That.")),
    "turn 2 of .* says nothing": sample(said=("What?", " ")),
    "is not a name inside of its folder": sample("../two.png"),
    "cannot be used: image '/etc/x.png'": sample("/etc/x.png"),
    r"has the box \[1, 2, 3\]": sample(boxes=[[1, 2, 3]]),
    r"has the box \[5, 2, 3, 4\]": sample(boxes=[[5, 2, 3, 4]]),
    "has the box 1; pass": sample(boxes=[1, 2, 3, 4]),
    "has the box nan": sample(boxes=float("nan")),
    "has the box 'all'": sample(boxes="all"),
}


@pytest.mark.parametrize("words", BAD)
def test_samples_that_cannot_be_used_are_refused_or_left_out(folder, words, caplog):
    given = [SAMPLES[0], BAD[words], SAMPLES[1]]
    with pytest.raises(ValueError, match=words) as error:
        module(folder, given).questions("train")
    assert "\n" not in str(error.value)
    assert "entry 2 of" in str(error.value)
    with caplog.at_level(logging.WARNING):
        data = module(folder, given, on_error="skip").questions("train")
    assert [q.key for q in data.questions] == ["train/1/0", "train/3/0", "train/3/1"]
    assert "left out 1 of the samples; the first: " in caplog.text


def test_lines_that_are_no_json_are_refused_or_left_out(folder):
    data = module(folder, [], on_error="skip")
    lines = [json.dumps(SAMPLES[0]), "{torn", "[1]", json.dumps(SAMPLES[2])]
    (folder / "train.json").write_text("\n".join(lines))
    assert [q.key for q in data.questions("train").questions] == ["train/1/0", "train/4/0"]
    with pytest.raises(ValueError, match=r"line 2: .*"):
        ConversationDataModule(str(folder), "train.json", images="images").questions("train")


def test_splits_and_limits(folder):
    data = module(folder, SAMPLES, limit_train=2, transform=list, batch_size=2)
    assert not data.has_validation
    assert len(data.questions("train")) == 3
    (folder / "val.json").write_text(json.dumps(SAMPLES[:1]))
    both = module(folder, SAMPLES, val_file="val.json", transform=list, batch_size=2)
    both.setup()
    assert [q.key for q in both.val_set.questions] == ["val/1/0"]
    with pytest.raises(ValueError, match="limit_val=0 leaves no sample"):
        module(folder, SAMPLES, limit_val=0)
    with pytest.raises(ValueError, match="question file .* does not exist"):
        ConversationDataModule(str(folder), "absent.json").questions("train")
