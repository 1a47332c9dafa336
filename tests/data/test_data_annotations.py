"""COCO files are read, and what is wrong with a hand-made one is said in one sentence."""

import copy
import gc
import json

import numpy as np
import pytest

from ocvtp.data import mapped_arrays
from ocvtp.data.annotations import CaptionFile, CocoFile
from ocvtp.data.coco import CocoImages
from ocvtp.data.masks import read_mask

SQUARE = [[0, 0, 4, 0, 4, 4, 0, 4]]


def image(number, **changes):
    return {"id": number, "file_name": f"{number}.jpg", "height": 6, "width": 8, **changes}


def thing(number, image_id, **changes):
    wanted = {"id": number, "image_id": image_id, "category_id": 1, "bbox": [0, 0, 4, 4]}
    return {**wanted, "segmentation": SQUARE, **changes}


GOOD = {
    "images": [image(7), image(3)],
    "annotations": [thing(1, 3), thing(2, 7), thing(5, 3, segmentation=[], category_id=2)],
    "categories": [{"id": 2, "name": "hat"}, {"id": 1, "name": "dog"}],
}


@pytest.fixture
def written(tmp_path):
    """Write a changed GOOD."""

    def write(change=lambda content: None):
        content = copy.deepcopy(GOOD)
        change(content)
        (tmp_path / "own.json").write_text(json.dumps(content))
        return tmp_path / "own.json"

    return write


def test_what_a_file_says(written):
    coco = CocoFile(written(), with_categories=True)
    assert list(coco.images) == [7, 3]
    assert dict(coco.categories) == {2: "hat", 1: "dog"}
    assert [entry["id"] for entry in coco.objects(3)] == [1, 5]
    assert [entry["id"] for entry in coco.masked(3)] == [1]
    assert [coco.all_masked(number) for number in (7, 3)] == [True, False]
    assert (coco.num_objects, coco.num_masks) == (3, 2)
    mask = coco.mask(coco.masked(3)[0])
    assert mask.shape == (6, 8)
    np.testing.assert_array_equal(mask, np.outer([1] * 4 + [0] * 2, [1] * 4 + [0] * 4))
    assert coco.objects(99) == []


def drop(part, key):
    def change(content):
        for entry in content[part]:
            del entry[key]

    return change


WORKS = {
    "boxes alone": drop("annotations", "segmentation"),
    "masks alone": drop("annotations", "bbox"),
    "annotations without ids": drop("annotations", "id"),
    "no annotations": lambda c: c.update(annotations=[]),
    "odd boxes": lambda c: c["annotations"][0].update(bbox=[1, "x", float("nan")]),
    "an absolute path": lambda c: c["images"][0].update(file_name="/tmp/../tmp/a.jpg"),
    "a path upwards": lambda c: c["images"][0].update(file_name="../a.jpg"),
    "no crowd": lambda c: c["annotations"][0].update(iscrowd=None),
    "id 0": lambda c: c["images"].append(image(0)),
    "other things": lambda c: c.update(licenses=None, info=[3]),
}


@pytest.mark.parametrize("name", WORKS)
def test_what_works(name, written):
    coco = CocoFile(written(WORKS[name]), with_categories=True)
    assert len(coco.images) >= 2
    assert coco.num_masks == {"boxes alone": 0, "no annotations": 0}.get(name, 2)


def first(part, **changes):
    return lambda content: content[part][0].update(changes)


def again(part, **changes):
    return lambda content: content[part].append({**content[part][0], **changes})


REFUSED = {
    "two images have the id 7, 7.jpg and other.jpg; list": again("images", file_name="other.jpg"),
    "two images have the id 7, 7.jpg and 7.jpg; list": again("images"),
    "images 7 and 9 are one file, 7.jpg; list": again("images", id=9),
    "images 7 and 9 are one file, ./7.jpg; list": again("images", id=9, file_name="./7.jpg"),
    "two annotations have the id 1; list": again("annotations"),
    "annotation 1 has the image_id '3'; ids are whole": first("annotations", image_id="3"),
    "annotation 1 has the image_id 3.0; ids are": first("annotations", image_id=3.0),
    "annotation 1 is of image 4, which the file does not list; list it": first(
        "annotations", image_id=4
    ),
    "annotation 1 has the image_id None; ids are": first("annotations", image_id=None),
    r"annotation 1 has the image_id \[3\]; ids are": first("annotations", image_id=[3]),
    "entry 1 of 'annotations' lacks image_id": drop("annotations", "image_id"),
    "entry 1 of 'annotations' has the id 'a'; ids are whole": first("annotations", id="a"),
    "entry 1 of 'annotations' has the id -1; ids are whole": first("annotations", id=-1),
    "entry 1 of 'annotations' is 3; pass a JSON object": lambda c: c["annotations"].insert(0, 3),
    "annotation 1 lacks segmentation or bbox": lambda c: c.update(
        annotations=[{"id": 1, "image_id": 3, "caption": "a dog"}]
    ),
    "annotation 1 has iscrowd '0'; pass 0": first("annotations", iscrowd="0"),
    "entry 1 of 'images' has the id 'img_6818'; ids are whole": first("images", id="img_6818"),
    "entry 1 of 'images' has the id -7; ids are whole": first("images", id=-7),
    "entry 1 of 'images' has the id 7.5; ids are whole": first("images", id=7.5),
    "entry 1 of 'images' has the id True; ids are whole": first("images", id=True),
    "entry 1 of 'images' has the id None; ids are whole": first("images", id=None),
    "image 7 .7.jpg. has the height None; pass": first("images", height=None),
    "image 7 .7.jpg. has the width '640'; pass": first("images", width="640"),
    "image 7 .7.jpg. has the width 0; pass": first("images", width=0),
    "image 7 .7.jpg. has the width 8.5; pass": first("images", width=8.5),
    "image 7 has the file_name 5; pass a text": first("images", file_name=5),
    "image 7 has the file_name ''; pass a text": first("images", file_name=""),
    "entry 1 of 'images' lacks file_name .it has id": drop("images", "file_name"),
    "entry 1 of 'images' lacks id": drop("images", "id"),
    "entry 1 of 'images' lacks height": drop("images", "height"),
    "entry 1 of 'images' is '7.jpg'": lambda c: c["images"].insert(0, "7.jpg"),
    "without a list 'images'": lambda c: c.update(images={"7": image(7)}),
    "without a list 'annotations'": lambda c: c.pop("annotations"),
    "entry 1 of 'images' has the id 9223372036854775808; ids": first("images", id=2**63),
    "image 7 .7.jpg. has the width 9223372036854775808; pass": first("images", width=2**63),
    "annotation 1 has the image_id 1000.*000; ids are": first("annotations", image_id=10**40),
}
NAMES_REFUSED = {
    "annotation 1 is of category 9, which": first("annotations", category_id=9),
    "annotation 1 has the category_id '1'; ids are": first("annotations", category_id="1"),
    "annotation 1 has the category_id None; ids are": drop("annotations", "category_id"),
    "two categories have the id 2, 'hat' and 'cap'": again("categories", name="cap"),
    "two categories have the id 2, 'hat' and 'hat'": again("categories"),
    "categories 2 and 4 are both called 'hat'": again("categories", id=4),
    "categories 2 and 4 are both called ' Hat'": again("categories", id=4, name=" Hat"),
    "entry 1 of 'categories' lacks name": drop("categories", "name"),
    "category 2 has the name None; pass a text": first("categories", name=None),
    "entry 1 of 'categories' has the id 'two'": first("categories", id="two"),
    "without a list 'categories'": lambda c: c.update(categories=None),
}


@pytest.mark.parametrize("message", REFUSED | NAMES_REFUSED)
def test_what_is_refused(message, written):
    path = written((REFUSED | NAMES_REFUSED)[message])
    with pytest.raises(ValueError, match=rf"annotation file .*own\.json .*{message}") as caught:
        CocoFile(path, with_categories=True)
    assert "\n" not in str(caught.value)
    if message in NAMES_REFUSED:
        assert CocoFile(path).num_objects == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON"),
        (b'{"images": [', "no JSON"),
        (b"\x80\xff\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
    ],
)
def test_what_is_no_json_is_refused(text, message, tmp_path):
    (tmp_path / "own.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"own\.json is {message}.*; pass an instances_"):
        CocoFile(tmp_path / "own.json")


def test_a_file_with_a_byte_order_mark(written):
    path = written()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert CocoFile(path).num_objects == 3


def test_missing_files_are_named(tmp_path):
    for name in ("absent.json", "."):
        with pytest.raises(ValueError, match=r"annotation file .* does not exist; pass"):
            CocoFile(tmp_path / name)


def test_an_image_on_its_side_is_named(written):
    coco = CocoFile(written())
    coco.check_shape(7, (8, 6))
    coco.check_shape(7, (16, 12))
    with pytest.raises(ValueError, match="is 6x8, but .* says 8x6.*do not fit: it may lie on its"):
        coco.check_shape(7, (6, 8))
    with pytest.raises(ValueError, match="is 80x20, but .* says 8x6.*do not fit$"):
        coco.check_shape(7, (80, 20))


# ------------------------------------------------------------------ entries, out of arrays

ODD = {
    "extra keys": {"colour": "red", "attributes": {"x": [1, None]}, "score": 0.5},
    "two polygons": {"segmentation": [[0, 0, 4, 0, 4, 4], [1.25, 1, 3, 1.5, 3, 3, 0.1, 3]]},
    "run lengths": {"segmentation": {"size": [6, 8], "counts": [40, 3, 5]}},
    "text of run lengths": {"segmentation": {"size": [6, 8], "counts": "04o1"}},
    "an empty polygon beside another": {"segmentation": [[], [0, 0, 4, 0, 4, 4]]},
    "texts as points": {"segmentation": [["0", "0", "4", "0", "4", "4"]]},
    "an odd count": {"segmentation": [[0, 0, 4, 0, 4]]},
    "points in pairs": {"segmentation": [[[0, 0], [4, 0], [4, 4]]]},
    "one good polygon and a bad one": {"segmentation": [[0, 0, 4, 0, 4, 4], None]},
    "a huge number": {"segmentation": [[0, 0, 10**400, 0, 4, 4]]},
    "nan in a polygon": {"segmentation": [[0, 0, float("nan"), 0, 4, 4]]},
    "a text": {"segmentation": "x"},
    "an area": {"area": 12.25},
    "a whole area": {"area": 12},
    "no area": {"area": None},
    "an area below 0": {"area": -1},
    "a wrong area": {"area": "12"},
    "nan as the area": {"area": float("nan")},
    "true as the area": {"area": True},
    "an odd box": {"bbox": [1, "x", float("nan")]},
    "nan in a box": {"bbox": [float("nan"), 1, 2, 3]},
    "no box": {"bbox": None},
    "a crowd": {"iscrowd": 1},
    "a large id": {"id": 2**63 - 1},
}


def drawn(segmentation):
    try:
        return read_mask(segmentation, 6, 8).tolist()
    except Exception as error:
        return str(error).replace(".0", "")


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_entries_come_back_as_they_were(name, kept, written, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "KEPT_FROM", 0 if kept else 10**9)
    entry = thing(1, 3) | ODD[name]
    path = written(lambda content: content["annotations"].__setitem__(0, entry))
    found = CocoFile(path).objects(3)[0]
    wanted = {"iscrowd": 0} | entry
    assert found.keys() == wanted.keys()
    for key in wanted.keys() - {"segmentation"}:
        assert repr(found[key]).replace(".0", "") == repr(wanted[key]).replace(".0", ""), key
    assert drawn(found["segmentation"]) == drawn(entry["segmentation"])
    assert found.get("nothing") is None
    with pytest.raises(KeyError):
        found["nothing"]


def test_lists_may_stand_in_any_order(written):
    path = written()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert [entry["id"] for entry in CocoFile(path, True).objects(3)] == [1, 5]
    path.write_text(path.read_text()[:-1] + ', "images": []}')
    with pytest.raises(ValueError, match="two lists 'images'"):
        CocoFile(path)


def test_captions_are_kept_too(written, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "KEPT_FROM", 0)
    said = [{"image_id": 3, "caption": " a \n"}, {"image_id": 3, "caption": "b"}]
    path = written(lambda content: content.update(annotations=said))
    for _ in range(2):
        found = CaptionFile(path).captions
        assert dict(found) == {3: ["a", "b"]}
        assert (len(found), found.get(7, [])) == (1, [])


def num_reachable(thing):
    """Python objects that a dataset holds, each of which a worker would copy a page to count."""
    seen, todo = {id(thing)}, [thing]
    while todo:
        for found in gc.get_referents(todo.pop()):
            if id(found) not in seen and not isinstance(found, type):
                seen.add(id(found))
                todo.append(found)
    return len(seen)


@pytest.mark.parametrize("masks", [False, True])
def test_the_objects_of_a_dataset_do_not_grow_with_its_images(written, tmp_path, masks):
    counts = []
    for count in (300, 500):
        content = {
            "images": [image(n) for n in range(count)],
            "annotations": [thing(n, n) for n in range(count)],
        }
        path = written(lambda old, new=content: old.update(new))
        images = CocoImages(tmp_path, path, str, with_instances=masks)
        assert images.names[5] == (5, "5.jpg")
        counts.append(num_reachable(images))
    assert counts[0] == counts[1]
