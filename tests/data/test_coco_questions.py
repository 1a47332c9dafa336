"""Existence and captions, asked of a COCO folder that is made up here."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from ocvtp.data.annotations import CaptionFile
from ocvtp.data.coco_questions import CocoQuestionDataModule

NAMES = ["cat", "dog", "apple", "sofa", "person", "ski"]
# Of every image the numbers of its categories; the second has one twice.
THERE = [[0, 1], [0, 0, 4], [0, 4], [4, 2, 3], [], [0, 1, 2, 3, 4, 5]]
WIDTH, HEIGHT = 40, 30


def square(number):
    left, top = 6 * number, 4
    return [left, top, left + 5, top, left + 5, top + 5, left, top + 5]


def instances(**changes):
    images = [
        {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT}
        for n in range(1, len(THERE) + 1)
    ]
    annotations = [
        {"id": 10 * image + place, "image_id": image, "category_id": category}
        | {"segmentation": [square(place)], "bbox": [6 * place, 4, 5, 5]}
        for image, own in enumerate(THERE, start=1)
        for place, category in enumerate(own)
    ]
    for number, change in changes.items():
        next(a for a in annotations if a["id"] == int(number[1:])).update(change)
    categories = [{"id": n, "name": name} for n, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def captions():
    said = [(1, "A cat. "), (1, "A dog."), (3, "A person"), (1, "Both.")]
    made = [{"image_id": n, "id": i, "caption": text} for i, (n, text) in enumerate(said)]
    return {"images": instances()["images"], "annotations": made}


def write(root, content=None, said=None):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(exist_ok=True)
        for number in range(1, len(THERE) + 1):
            pixels = np.full((HEIGHT, WIDTH, 3), number, np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017/{number}.png")
        for kind, made in (("instances", content or instances()), ("captions", said or captions())):
            (root / f"annotations/{kind}_{split}2017.json").write_text(json.dumps(made))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("coco"))


def asked(root, split="train", **options):
    return CocoQuestionDataModule(str(root), **options).questions(split)


def thing(question):
    return question.question.removeprefix("Is there a").split(" in ")[0].removeprefix("n").strip()


def by_image(data):
    found = {}
    for question in data.questions:
        found.setdefault(int(question.image.split(".")[0]), []).append(question)
    return found


def test_half_of_the_answers_is_no_and_all_are_right(root):
    found = by_image(asked(root))
    assert {image: len(own) for image, own in found.items()} == {1: 4, 2: 4, 3: 4, 4: 6}
    for image, own in found.items():
        there = {NAMES[category] for category in THERE[image - 1]}
        assert [question.answer for question in own] == ["yes", "no"] * (len(own) // 2)
        for question in own:
            assert (thing(question) in there) == (question.answer == "yes"), question
        assert len({thing(question) for question in own}) == len(own)


def test_masks_are_all_objects_of_the_category_and_none_for_a_no(root):
    data = asked(root)
    for number, question in enumerate(data.questions):
        item, image = data[number], int(question.image.split(".")[0])
        wanted = [p for p, c in enumerate(THERE[image - 1]) if NAMES[c] == thing(question)]
        assert item["masks"].shape == (len(wanted), HEIGHT, WIDTH)
        for mask, place in zip(item["masks"], wanted, strict=True):
            expected = np.zeros((HEIGHT, WIDTH), np.bool_)
            expected[4:9, 6 * place : 6 * place + 5] = True
            assert np.array_equal(mask, expected)


def test_crowds_count_and_boxes_stand_for_masks(tmp_path):
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    changes = {"_20": {"segmentation": []}, "_21": {"segmentation": runs, "iscrowd": 1}}
    data = asked(write(tmp_path, instances(**changes)))
    own = [n for n, q in enumerate(data.questions) if q.image == "2.png" and thing(q) == "cat"]
    box, crowd = data[own[0]]["masks"]
    assert box.sum() == 25
    assert box[4:9, :5].all()
    assert crowd.all()


def test_a_category_without_a_place_has_no_masks_and_a_wrong_box_is_an_error(tmp_path):
    nowhere = instances(_20={"segmentation": None, "bbox": None})
    data = asked(write(tmp_path, nowhere))
    own = [n for n, q in enumerate(data.questions) if q.image == "2.png" and thing(q) == "cat"]
    assert data[own[0]]["masks"] is None
    with pytest.raises(ValueError, match="annotation 20 has the bbox"):
        asked(write(tmp_path, instances(_20={"segmentation": None, "bbox": [1, "x"]})))


def test_adversarial_popular_and_random_negatives(root):
    def absent(kind, image, **options):
        own = by_image(asked(root, negatives=[kind], **options))[image]
        return [thing(question) for question in own if question.answer == "no"]

    # Persons and cats are in four images, dogs, apples and sofas in two.
    assert absent("popular", 1, existence=2) == ["person"]
    assert absent("popular", 4, existence=2) == ["cat"]
    with_cats = {"dog": 2, "person": 3, "apple": 1, "sofa": 1}  # together with a cat
    first = by_image(asked(root, negatives=["adversarial"], existence=4))[3]
    expected = {"cat": "dog", "person": "apple"}
    assert max((n for n in with_cats if n != "person"), key=with_cats.get) == "dog"
    pairs = [(thing(yes), thing(no)) for yes, no in zip(first[::2], first[1::2], strict=True)]
    assert pairs[0][1] == expected[pairs[0][0]]
    drawn = {absent("random", 1, existence=2, question_seed=seed)[0] for seed in range(30)}
    assert drawn == {"apple", "sofa", "person", "ski"}


def test_questions_are_the_same_in_every_run_and_others_by_seed(root):
    first, again = asked(root), asked(root)
    assert [q.question for q in first.questions] == [q.question for q in again.questions]
    others = [asked(root, question_seed=seed).questions for seed in range(1, 4)]
    assert any([q.question for q in o] != [q.question for q in first.questions] for o in others)


def test_captions_answer_and_stand_beside_the_other_questions(root):
    options = {"train_captions": "annotations/captions_train2017.json", "captions": 2}
    data = asked(root, **options)
    own = by_image(data)[1]
    assert [q.key.split("/")[2].split()[0] for q in own] == ["0", "1", "2", "3"] + ["caption"] * 2
    said = [q for q in data.questions if q.question == "Describe the image."]
    assert [q.image for q in said] == ["1.png", "1.png", "3.png"]
    assert {q.answer for q in said} <= {"A cat.", "A dog.", "Both.", "A person"}
    assert len({q.answer for q in said}) == 3
    assert all(q.places is None for q in said)
    assert data.owners.tolist() == sorted(data.owners.tolist())
    alone = asked(root, **options, train_annotations=None)
    assert [q.answer for q in alone.questions] == [q.answer for q in said]


def test_suffix_limit_and_validation(root):
    data = CocoQuestionDataModule(
        str(root), suffix="\nAnswer yes or no.", limit_val=2, transform=list, batch_size=4
    )
    data.setup()
    assert len(data.train_set) == 18
    assert {q.image for q in data.val_set.questions} == {"1.png", "2.png"}
    assert all(q.question.endswith("image?\nAnswer yes or no.") for q in data.val_set.questions)
    assert {q.key.split("/")[0] for q in data.val_set.questions} == {"val"}
    assert not CocoQuestionDataModule(str(root), val_images=None).has_validation


def test_images_lying_on_their_side_are_turned_with_their_masks(tmp_path):
    write(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    path = tmp_path / "train2017/1.png"
    Image.open(path).save(path, exif=exif)
    data = asked(tmp_path)
    number = next(n for n, q in enumerate(data.questions) if q.answer == "yes")
    item, place = data[number], THERE[0].index(NAMES.index(thing(data.questions[number])))
    assert item["image"].size == (HEIGHT, WIDTH)
    stored = np.zeros((HEIGHT, WIDTH), np.bool_)
    stored[4:9, 6 * place : 6 * place + 5] = True
    assert np.array_equal(item["masks"][0], np.rot90(stored, -1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"existence": 3}, "even number"),
        ({"existence": -2}, "no negative"),
        ({"captions": -1}, "no negative"),
        ({"negatives": []}, r"pass some of \['random', 'popular', 'adversarial'\]"),
        ({"negatives": ["hard"]}, "negatives="),
        ({"limit_train": 0}, "limit_train=0 leaves no image"),
        ({"train_images": "nowhere"}, "nowhere does not exist"),
        ({"train_annotations": "nothing.json"}, "an instances_.*json file"),
        ({"train_annotations": None}, "no question"),
        ({"train_captions": "nothing.json"}, r"nothing\.json does not exist; pass a captions_"),
        (
            {"train_captions": "annotations/instances_train2017.json"},
            "lacks caption .* add what is missing",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(root, options, words):
    with pytest.raises(ValueError, match=words):
        asked(root, **options)


@pytest.mark.parametrize(
    "name", ["/etc/1.png", "../1.png", "a/../../1.png", "..\\1.png", "C:1.png"]
)
def test_images_outside_of_their_folder_are_refused(tmp_path, name):
    content = instances()
    content["images"][0]["file_name"] = name
    with pytest.raises(ValueError, match="is not a name inside of its folder"):
        asked(write(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caption": "  "}, "entry 2 of 'annotations' has the caption"),
        ({"image_id": 99}, "entry 2 of 'annotations' is of image 99, which the file does not list"),
    ],
)
def test_captions_that_are_none_are_refused(tmp_path, change, words):
    said = captions()
    said["annotations"][1].update(change)
    write(tmp_path, said=said)
    with pytest.raises(ValueError, match=words):
        CaptionFile(tmp_path / "annotations/captions_train2017.json")
