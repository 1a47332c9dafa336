"""Cut-outs and composites: the same every time, with masks of what is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from shutil import copytree

import numpy as np
import pytest
from tiny_photo_vlm import RULE, SIZE, write_inputs

from ocvtp.data.annotations import CocoFile
from tools.photo_vlm import composites
from tools.photo_vlm.composites import LEAST_VISIBLE, MOST_OBJECTS, Painter, split_photos, vary
from tools.photo_vlm.cutouts import Cutout, Cutouts, cut_out, usable_box


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("photo"))


@pytest.fixture(scope="module")
def cutouts(inputs):
    return cut_out(inputs["coco"], RULE)


def painter(inputs, cutouts, split="train", seed=0):
    return Painter(cutouts[split], split_photos(inputs["photos"])[split], SIZE, seed, split)


def test_cutouts_are_the_masked_pixels_of_their_split(inputs, cutouts):
    assert cutouts["train"].categories == cutouts["test"].categories
    for split, name in (("train", "train2017"), ("test", "val2017")):
        file = CocoFile(f"{inputs['coco']}/annotations/instances_{name}.json", True)
        areas = {
            int(file.mask(entry).sum()) for number in file.images for entry in file.masked(number)
        }
        for category, found in cutouts[split].by_category.items():
            assert RULE.least_train <= len(found) <= RULE.most
            for cutout in found:
                assert cutout.category == category
                assert cutout.mask.any(0).all() or cutout.mask.any(0)[[0, -1]].all()
                assert int(cutout.mask.sum()) in areas
                assert cutout.mask.sum() >= RULE.least_area


def test_a_category_needs_enough_in_both_splits(inputs, tmp_path):
    copytree(inputs["coco"], tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    gone = content["categories"][0]["id"]
    content["annotations"] = [e for e in content["annotations"] if e["category_id"] != gone]
    path.write_text(json.dumps(content))
    found = cut_out(tmp_path / "coco", RULE)
    before = cut_out(inputs["coco"], RULE)["train"].categories
    assert found["train"].categories == found["test"].categories == before[1:]


def test_cutouts_of_one_image_count_once(inputs, tmp_path):
    """A category whose cut-outs, as many as before, are all of one image is not used."""
    copytree(inputs["coco"], tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    category = content["categories"][0]["id"]
    own = [e for e in content["annotations"] if e["category_id"] == category]
    one = [e for e in own if e["image_id"] == own[0]["image_id"]]
    others = [e for e in content["annotations"] if e["category_id"] != category]
    again = [{**one[0], "id": 10**6 + n} for n in range(len(own))]
    path.write_text(json.dumps({**content, "annotations": others + again}))
    found = cut_out(tmp_path / "coco", RULE)
    before = cut_out(inputs["coco"], RULE)["train"].categories
    assert found["train"].categories == before[1:]


def test_too_few_categories_are_refused(inputs):
    with pytest.raises(ValueError, match="has 0 categories with cut-outs from 999 images of"):
        cut_out(inputs["coco"], replace(RULE, least_train=999))


@pytest.mark.parametrize(
    ("there", "used"),
    [
        ((slice(10, 40), slice(10, 40)), True),
        ((slice(10, 40), slice(10, 11)), False),  # too small
        ((slice(0, 40), slice(10, 40)), True),  # at an edge
        ((slice(10, 18), slice(10, 18)), False),  # too short
        ((slice(10, 40, 4), slice(10, 40, 4)), False),  # fills too little of its box
    ],
)
def test_which_objects_are_cut_out(there, used):
    mask = np.zeros((50, 60), bool)
    mask[there] = True
    box = usable_box(mask, replace(RULE, least_area=50))
    assert (box is not None) == used
    assert box is None or mask[box].any()


def test_how_often_coco_shows_two_together(inputs, cutouts):
    names, together = cutouts["train"].categories, cutouts["train"].together
    file = CocoFile(f"{inputs['coco']}/annotations/instances_train2017.json", True)
    for a, one in enumerate(names):
        for b, other in enumerate(names):
            both = sum(
                {one, other} <= {file.categories[e["category_id"]] for e in file.objects(number)}
                for number in file.images
            )
            assert together[a, b] == (0 if a == b else both)


def test_a_composite_depends_on_seed_split_and_number_alone(inputs, cutouts):
    first, again = painter(inputs, cutouts), painter(inputs, cutouts)
    drawn = [first.draw(number) for number in range(4)]
    for number in (3, 0):
        same = again.draw(number)
        np.testing.assert_array_equal(same.image, drawn[number].image)
        for one, other in zip(same.objects, drawn[number].objects, strict=True):
            assert one.category == other.category
            np.testing.assert_array_equal(one.mask, other.mask)
    for other in (painter(inputs, cutouts, seed=1), painter(inputs, cutouts, "test")):
        assert not np.array_equal(other.draw(0).image, drawn[0].image)


def test_masks_are_what_is_visible(inputs):
    """Cut-outs of one colour each on grey: every pixel of a mask has its colour, and no other."""
    names = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    flat = {
        name: [Cutout(name, np.full((40, 30, 3), colour, np.uint8), np.ones((40, 30), bool))]
        for name, colour in names.items()
    }
    source = Cutouts(flat, np.zeros((3, 3), int))
    drawn = Painter(source, split_photos(inputs["photos"])["test"], SIZE, 0, "test")
    hidden = 0
    for number in range(30):
        composite = drawn.draw(number)
        assert 1 <= len(composite.objects) <= MOST_OBJECTS
        total = np.stack([item.mask for item in composite.objects]).sum(0)
        assert total.max() <= 1  # nobody is seen through another
        for item in composite.objects:
            channel = list(names).index(item.category)
            seen = composite.image[item.mask].astype(int)
            others = [c for c in range(3) if c != channel]
            assert (seen[:, channel] >= 200).all()
            assert (seen[:, others] <= 2).all()
            rows, columns = item.mask.nonzero()
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            hidden += item.area < box
            assert item.area >= LEAST_VISIBLE * box * 0.5
            assert item.centre == pytest.approx(
                ((columns.mean() + 0.5) / SIZE, (rows.mean() + 0.5) / SIZE)
            )
    assert hidden  # some are behind others


def test_only_training_varies_its_cutouts(inputs, cutouts):
    assert painter(inputs, cutouts).varied
    assert not painter(inputs, cutouts, "test").varied
    cutout = next(iter(cutouts["train"].by_category.values()))[0]
    rng = np.random.default_rng(0)
    varied = [vary(rng, cutout) for _ in range(20)]
    assert all(one.mask.any() and one.pixels.shape[:2] == one.mask.shape for one in varied)
    assert len({one.mask.shape for one in varied}) > 1


def test_backgrounds_are_split_by_name(inputs, tmp_path):
    photos = split_photos(inputs["photos"])
    assert [path.name for path in photos["train"]] == [f"{n:04d}.png" for n in range(7)]
    assert [path.name for path in photos["test"]] == ["0007.png"]
    with pytest.raises(ValueError, match="holds 0 photographs; pass a folder of at least two"):
        split_photos(tmp_path)


def test_an_object_that_vanishes_is_not_there(inputs):
    """One pixel wide and as small as objects get: nothing of it would be seen."""
    mask = np.zeros((60, 60), bool)
    mask[:, 0] = True
    mask[0] = True
    thin = Cutout("thin", np.zeros((60, 60, 3), np.uint8), mask)
    canvas = np.zeros((24, 24, 3), np.float32)
    rng = np.random.default_rng(0)
    assert composites._place(rng, canvas, thin, []) is None
    assert not canvas.any()
