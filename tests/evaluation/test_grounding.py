"""Objects that are to be found: on drawn scenes, on COCO's images, and as a file asks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from listed_files import answers
from PIL import Image

from ocvtp.data.grounding import seek
from ocvtp.data.scenes import LEVELS, draw_scene
from ocvtp.evaluation.tasks.base import Supplied
from ocvtp.evaluation.tasks.box_answers import parse_box
from ocvtp.evaluation.tasks.grounding import GroundingTask, box_text


@pytest.fixture(scope="module")
def task():
    return GroundingTask(num_images=6, questions=3, size=60, seed=3)


def asked(folder, **settings):
    supplied = Supplied("grounding", Path(folder), None)
    return GroundingTask.from_command(supplied, **settings)


def test_every_name_fits_one_object_and_the_box_is_its_own(task):
    for owner in range(12):
        scene, masks = task._scene(owner).objects, task.masks(owner)
        for item in (item for item in task.items if item.owner == owner):
            words = item.question.removeprefix("Where is the ").split("?")[0].split()
            fits = [o for o in scene if {o.size, o.colour, o.shape} >= set(words)]
            assert len(fits) == 1
            (mask,) = (m for m, o in zip(masks, scene, strict=True) if o is fits[0])
            assert parse_box(item.answers[0]) == Image.fromarray(mask).getbbox()
            assert item.kind.endswith(f"/{fits[0].size}")
    assert len({item.key for item in task.items}) == len(task.items) > 20


def test_the_size_is_named_only_where_it_is_needed():
    found = [
        (one.name, scene.objects)
        for index in range(30)
        for scene in [draw_scene(1, index, 60, style=LEVELS["hard"])]
        for one in seek(scene.objects, 12, np.random.default_rng(0))
    ]
    sized = [(name, objects) for name, objects in found if len(name.split()) == 3]
    assert 0 < len(sized) < len(found) / 2
    for name, objects in sized:
        _, colour, shape = name.split()
        assert sum((o.colour, o.shape) == (colour, shape) for o in objects) > 1


def test_figures(task):
    right = [item.answers[0] for item in task.items]
    assert {ratio.value for ratio in task.ratios(answers(right)).values()} == {1}
    shifted = []
    for text in right:
        x1, y1, x2, y2 = parse_box(text)
        shifted.append(box_text((x1, y1, x2, y2 + (y2 - y1))))  # half of it is beside the object
    figures = task.ratios(answers(["no idea", "0 0 1", *shifted[2:]]))
    n = len(right)
    assert figures["all/parsed"].value == pytest.approx((n - 2) / n)
    assert figures["all/iou"].value == pytest.approx((n - 2) / n / 2)
    assert figures["all/acc@0.5"].value == pytest.approx((n - 2) / n)
    assert set(task.metrics) <= figures.keys()
    assert {"easy/all/iou", "hard/small/acc@0.5"} <= figures.keys()
    worse = [box_text((0, 0, 59, 59))] * n
    assert task.ratios(answers(worse))["all/acc@0.5"].value == 0
    assert 0 < task.ratios(answers(worse))["all/iou"].value < 0.3


def test_pixels_of_a_smaller_picture_are_brought_to_the_image(task):
    records = [
        {"answer": box_text([edge / 2 for edge in parse_box(item.answers[0])]), "shown": [30, 30]}
        for item in task.items
    ]
    assert task.ratios(records)["all/iou"].value == pytest.approx(1)


def test_the_same_settings_ask_the_same(task):
    again = GroundingTask(num_images=6, questions=3, size=60, seed=3)
    assert (again.items, again.describe()) == (task.items, task.describe())
    json.dumps(task.describe())
    other = GroundingTask(num_images=6, questions=3, size=60, seed=3, prompt="Find the {object}.")
    assert other.items[0].question.startswith("Find the ")
    assert other.describe() != task.describe()
    with pytest.raises(ValueError, match=r"names no \{object\}"):
        GroundingTask(prompt="Where is it?")


COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 8, "file_name": "b.png", "width": 40, "height": 20},
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "cow"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [4, 2, 10, 6], "area": 1500},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 3, 3], "area": 9},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [9, 9, 3, 3], "area": 9},
        {"id": 4, "image_id": 7, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 5, "image_id": 8, "category_id": 2, "bbox": [10, 5, 20, 10]},
    ],
}


@pytest.fixture
def coco(tmp_path):
    """The first image was made half as large, and the second lies on its side."""
    file, folder = tmp_path / "instances.json", tmp_path / "images"
    entries = [{"iscrowd": 0, **entry} for entry in COCO["annotations"]]
    file.write_text(json.dumps(COCO | {"annotations": entries}))
    folder.mkdir()
    Image.new("RGB", (20, 10)).save(folder / "a.png")
    side = Image.new("RGB", (40, 20))
    side.getexif()[0x0112] = 6  # to be turned clockwise
    side.save(folder / "b.png", exif=side.getexif())
    return {"instances": str(file), "images": [str(folder)]}


def test_cocos_images_are_asked_for_what_they_have_one_of(coco, tmp_path):
    task = asked(tmp_path, **coco)
    found = [(item.question, item.answers[0], item.kind, item.owner) for item in task.items]
    text = "Where is the {}? Answer with its box."
    assert found == [
        (text.format("dog"), "[2, 1, 7, 4]", "medium", 0),
        (text.format("cat"), "[5, 10, 15, 30]", "small", 1),
    ]
    assert task.image(1).size == task.image_size(1) == (20, 40)
    figures = task.ratios(answers(["[0.1, 0.1, 0.35, 0.4]", '{"bbox_2d": [5, 10, 15, 30]}']))
    assert figures["all/iou"].value == pytest.approx(1)
    assert task.masks(0) is None
    assert len(asked(tmp_path, **coco, num_images=1).items) == 1


def test_boxes_of_coco_are_cut_off_at_the_edges_of_their_images(coco, tmp_path):
    beyond = [[36, -3, 9, 9], [-9, 0, 9, 9], [0, 0, 1, 1]]
    for box, expected in zip(beyond, (["[18, 0, 20, 3]"], [], []), strict=True):
        content = json.loads(Path(coco["instances"]).read_text())
        content["annotations"][0]["bbox"] = box
        Path(coco["instances"]).write_text(json.dumps(content))
        found = asked(tmp_path, **coco).items
        assert [item.answers[0] for item in found] == [*expected, "[5, 10, 15, 30]"]


def test_a_file_of_ones_own(coco, tmp_path):
    entries = [
        {"image": "a.png", "question": "The dog?", "box": [2, 1, 7, 4]},
        {"image": "b.png", "question": "A cat?", "answers": [[0, 0, 4, 4], "5 10 15 30"]},
        {"image": "b.png", "question": "Cat?", "answer": [5, 10, 15, 30], "kind": "again"},
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(entries))
    settings = {"questions_file": [str(file)], "images": coco["images"]}
    task = asked(tmp_path, **settings, suffix=" As JSON.")
    asks = ["The dog? As JSON.", "A cat? As JSON.", "Cat? As JSON."]
    assert [item.question for item in task.items] == asks
    figures = task.ratios(answers(["2 1 7 4", "5 10 15 30", "{'bbox_2d': [5, 10, 15, 30]}"]))
    assert figures["all/acc@0.5"].value == figures["again/iou"].value == 1
    for wrong in ([1, 2, 3], [7, 4, 2, 1], "a dog", None, {"x": 1}):
        file.write_text(json.dumps([entries[1], entries[0] | {"box": wrong}]))
        with pytest.raises(ValueError, match=r"entry 2 of .* as its box; pass \[x1, y1, x2, y2\]"):
            asked(tmp_path, **settings)


def test_boxes_that_are_not_of_their_image_get_one_clear_error(coco, tmp_path):
    """Images of 20 x 10 and, upright, 20 x 40 pixels; half a pixel may be rounded away."""
    file = tmp_path / "boxes.json"
    settings = {"questions_file": [str(file)], "images": coco["images"]}

    def ask(image, **boxes):
        file.write_text(json.dumps([{"image": image, "question": "Where?", **boxes}]))
        return asked(tmp_path, **settings)

    for image, box in (("a.png", [-0.4, 0, 20.4, 10.5]), ("b.png", [0, 0, 20, 40])):
        assert len(ask(image, box=box).items) == 1
    outside = ([0, 0, 20, 11], [0, 0, 21, 10], [-1, 0, 9, 9], [0, -3, 9, 9], [200, 30, 400, 60])
    for box in outside:
        for boxes in ({"box": box}, {"answers": [[1, 1, 9, 9], box]}):
            message = (
                r"question \d has the box \[.*outside of its image a.png, 20 x 10 pixels; pass"
            )
            with pytest.raises(ValueError, match=message):
                ask("a.png", **boxes)
    with pytest.raises(ValueError, match="less than a pixel .*no parts or thousandths"):
        ask("a.png", box=[0.1, 0.2, 0.9, 0.8])
    for empty in ([], [3, 3, 3, 9], [3, 4, 9, 4]):
        with pytest.raises(ValueError, match="as its box; pass"):
            ask("a.png", box=empty)
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image .*a.png cannot be read"):
        ask("a.png", box=[1, 1, 9, 9])


def test_what_is_lacking_is_named(coco, tmp_path):
    with pytest.raises(ValueError, match="needs --images"):
        asked(tmp_path, instances=coco["instances"])
    with pytest.raises(ValueError, match="needs --instances"):
        asked(tmp_path, images=coco["images"])
    with pytest.raises(ValueError, match="pass at least one question"):
        asked(tmp_path, **coco, questions=0)
