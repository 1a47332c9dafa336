import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from listed_files import answers, write_images, write_lines
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from ocvtp.evaluation.tasks.pope import PopeTask, build_pope, pope_question

COCO_TINY = Path(__file__).parents[2] / "../shared/coco-tiny"
OLD, NEW = "COCO_val2014_000000310196.jpg", "000000310196.jpg"
OTHER = "COCO_val2014_000000000042.jpg"


def line(number, image, thing, label):
    text = f"Is there a {thing} in the image?"
    return {"question_id": number, "image": image, "text": text, "label": label}


@pytest.fixture
def files(tmp_path):
    random = [line(1, OLD, "dog", "yes"), line(2, OLD, "cat", "no"), line(3, OTHER, "car", "yes")]
    popular = [line(1, OTHER, "bus", "no"), line(2, OLD, "dog", "yes")]
    return [
        write_lines(tmp_path / "coco_pope_random.json", random),
        write_lines(tmp_path / "coco_pope_popular.json", popular),
    ]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "val", [NEW, OTHER])


def test_official_lines(files, folder):
    task = PopeTask(files, folder)
    got = [(i.key, i.owner, i.question, i.answers, i.kind) for i in task.items]
    assert got == [
        ("random/1", 0, "Is there a dog in the image?", ("yes",), "random"),
        ("random/2", 0, "Is there a cat in the image?", ("no",), "random"),
        ("popular/2", 0, "Is there a dog in the image?", ("yes",), "popular"),
        ("random/3", 1, "Is there a car in the image?", ("yes",), "random"),
        ("popular/1", 1, "Is there a bus in the image?", ("no",), "popular"),
    ]
    # the first lies there under its name of 2017, the second under the one it stands with
    assert [task.image(owner).getpixel((0, 0))[0] for owner in (0, 1)] == [0, 1]
    assert task.masks(0) is None
    assert task.describe()["instances"] is None
    suffixed = PopeTask(files, folder, suffix="\nAnswer yes or no.", limit=1)
    assert [i.question[-18:] for i in suffixed.items] == ["\nAnswer yes or no."] * 3


def test_an_image_under_both_names_is_one_image(folder, tmp_path):
    path = write_lines(tmp_path / "a.json", [line(1, OLD, "a", "no"), line(2, NEW, "b", "no")])
    assert [item.owner for item in PopeTask({"x": path}, folder).items] == [0, 0]


def test_an_image_can_have_its_old_name_on_disk(tmp_path):
    folder = write_images(tmp_path / "val", [OLD])
    path = write_lines(tmp_path / "a.json", [line(1, OLD, "a", "no"), line(2, NEW, "b", "no")])
    assert len(PopeTask({"x": path}, folder).items) == 2


def test_images_lie_in_several_folders(files, tmp_path):
    folders = [write_images(tmp_path / "t", [NEW]), write_images(tmp_path / "v", ["x", OTHER])]
    task = PopeTask(files, folders)
    assert [task.image(owner).getpixel((0, 0))[0] for owner in (0, 1)] == [0, 1]


def test_splits_can_be_given(files, folder):
    task = PopeTask({"easy": files[0], "other": files[1]}, folder)
    assert {item.kind for item in task.items} == {"easy", "other"}
    assert [item.kind for item in PopeTask(files[1], folder).items] == ["popular"] * 2


def test_figures_by_hand(folder, tmp_path):
    def make(name, labels):
        rows = [line(n, (OLD, OTHER)[n % 2], "dog", label) for n, label in enumerate(labels)]
        return write_lines(tmp_path / f"coco_pope_{name}.json", rows)

    files = [make("random", ["yes", "yes", "no", "no", "yes"]), make("popular", ["no", "no"])]
    task = PopeTask(files, folder)
    said = {
        "random/0": "Yes",  # TP
        "random/1": "No, there is not",  # FN
        "random/2": "NO",  # FP by the official parser, exact right
        "random/3": "no.",  # TN
        "random/4": "Yes, it is",  # TP, exact wrong
        "popular/0": "not sure",  # TN, exact wrong
        "popular/1": "Yes. No.",  # FP
    }
    figures = task.ratios(answers([said[item.key] for item in task.items]))
    values = {name: ratio.value for name, ratio in figures.items()}
    expected = {
        "all": (4 / 7, 2 / 4, 2 / 3, 4 / 7, 4 / 7, 3 / 7),
        "random": (3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5, 3 / 5),
        "popular": (1 / 2, 0, None, 0, 1 / 2, 0),
    }
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio", "exact")
    assert len(values) == 18
    for split, numbers in expected.items():
        for name, number in zip(names, numbers, strict=True):
            assert values[f"{split}/{name}"] == pytest.approx(
                float("nan") if number is None else number, nan_ok=True
            ), (split, name)
    assert set(task.metrics) <= figures.keys()
    owners = [item.owner for item in task.items]
    assert figures["all/precision"].owners.tolist() == owners == [0] * 4 + [1] * 3
    assert all(ratio.hits.dtype == ratio.of.dtype == np.float64 for ratio in figures.values())


def test_missing_images_are_counted(files, folder, tmp_path):
    (folder / OTHER).unlink()
    with pytest.raises(ValueError, match=f"1 of 2 images are not in .*val, e.g. {OTHER}; pass"):
        PopeTask(files, folder)
    assert len(PopeTask(files, folder, limit=1).items) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "Yes"}, "line 1 of .* has the label 'Yes'"),
        ({"question_id": None}, "line 1 of .* has None as 'question_id'"),
        ({"text": 3}, "line 1 of .* has 3 as 'text'"),
    ],
)
def test_bad_lines_are_named(change, message, folder, tmp_path):
    path = write_lines(tmp_path / "x_random.json", [{**line(1, OLD, "dog", "yes"), **change}])
    with pytest.raises(ValueError, match=message):
        PopeTask([path], folder)


def test_questions_and_splits_are_there_once(files, folder, tmp_path):
    twice = write_lines(tmp_path / "p_twice.json", [line(1, OLD, "a", "no")] * 2)
    with pytest.raises(ValueError, match="two questions are twice/1"):
        PopeTask(twice, folder)
    for wrong in ([files[0], files[0]], [], {"all": files[0]}):
        with pytest.raises(ValueError, match="each of its own split"):
            PopeTask(wrong, folder)


THINGS = ["person", "dog", "apple", "car", "bus", "cup", "owl", "hat"]
PRESENT = {
    1: ["dog", "person", "apple"],
    2: ["person", "car", "bus", "car"],
    3: ["person", "car"],
    4: ["hat", "dog"],
    5: ["cup"],
    6: ["cup"],
}


@pytest.fixture
def instances(tmp_path):
    """Six images of 12 x 8 pixels; object n of one is row n; the last of image 1 is a crowd."""
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 10 + n, "name": name} for n, name in enumerate(THINGS)]
    for number, names in PRESENT.items():
        name = f"COCO_val2014_{number:012d}.jpg"
        content["images"] += [{"id": number, "file_name": name, "height": 8, "width": 12}]
        for row, thing in enumerate(names):
            mask = np.zeros((8, 12), np.uint8, order="F")
            mask[row] = 1
            code = rle.encode(mask)
            content["annotations"] += [
                {
                    "image_id": number,
                    "category_id": 10 + THINGS.index(thing),
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                    "iscrowd": int(thing == "apple"),
                }
            ]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def asked(path):
    """By image: what is asked for, and the labels."""
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(1, len(rows) + 1))
    found = {}
    for row in rows:
        thing = row["text"].removeprefix("Is there a").removesuffix(" in the image?")
        thing = thing.removeprefix("n ").strip()
        found.setdefault(int(row["image"][-16:-4]), []).append((thing, row["label"]))
    return found


def test_built_negatives(instances, tmp_path):
    files = build_pope(instances, tmp_path / "new" / "sets", seed=3)
    assert [path.name for path in files.values()] == [
        "coco_pope_random.json",
        "coco_pope_popular.json",
        "coco_pope_adversarial.json",
    ]
    found = {split: asked(path) for split, path in files.items()}
    for split in found.values():
        assert list(split) == [1, 2]  # three distinct objects
        for image, pairs in split.items():
            assert [label for _, label in pairs] == ["yes", "no"] * 3
            assert [thing for thing, _ in pairs[::2]] == PRESENT[image][:3]
            negatives = [thing for thing, _ in pairs[1::2]]
            assert len(set(negatives)) == 3
            assert not set(negatives) & set(PRESENT[image])
    # images: person 3; dog, car, cup 2; apple, bus, hat 1. Equal ones by the file's order
    assert [t for t, _ in found["popular"][1][1::2]] == ["car", "cup", "bus"]
    assert [t for t, _ in found["popular"][2][1::2]] == ["dog", "cup", "apple"]
    # dog: with hat; person: with car (2); person: with dog before apple
    assert [t for t, _ in found["adversarial"][1][1:5:2]] == ["hat", "car"]
    assert found["adversarial"][2][1] == ("dog", "no")


@pytest.mark.slow
def test_random_negatives_are_uniform_and_seeded(instances, tmp_path):
    def negatives(seed, split):
        found = asked(build_pope(instances, tmp_path / str(seed), seed=seed)[split])
        return tuple(thing for thing, _ in found[1][1::2])

    drawn = [negatives(seed, "random") for seed in range(100)]
    counts = Counter(thing for three in drawn for thing in three)
    assert counts.keys() == {"car", "bus", "cup", "owl", "hat"}  # 60 each, +-5
    assert all(40 <= count <= 80 for count in counts.values())
    assert negatives(7, "random") == drawn[7]
    rest = {negatives(seed, "adversarial")[2] for seed in range(40)}
    assert rest == {"bus", "cup", "owl"}  # where nothing absent goes with apple: any


def test_images_draw_for_themselves(instances, tmp_path):
    def place(seed, image):
        first = found[seed][image][1][0]
        return [thing for thing in THINGS if thing not in PRESENT[image]].index(first)

    found = [asked(build_pope(instances, tmp_path, seed=seed)["random"]) for seed in range(20)]
    assert [place(seed, 1) for seed in range(20)] != [place(seed, 2) for seed in range(20)]


def test_images_with_too_little_that_is_absent_are_left_out(instances, tmp_path):
    content = json.loads(instances.read_text())
    kept = [entry for entry in content["categories"] if entry["name"] != "owl"]
    content["categories"] = kept
    like = content["annotations"][0]
    for entry in kept[
        3:
    ]:  # image 4 has dog, hat and now car, bus, cup: person and apple are absent
        content["annotations"].append({**like, "image_id": 4, "category_id": entry["id"]})
    instances.write_text(json.dumps(content))
    assert list(asked(build_pope(instances, tmp_path)["random"])) == [1, 2]


def test_images_are_drawn_by_the_seed(instances, tmp_path):
    whole = asked(build_pope(instances, tmp_path / "all")["random"])
    one = [asked(build_pope(instances, tmp_path / "one", 1, s)["random"]) for s in range(20)]
    assert {next(iter(found)) for found in one} == {1, 2}
    assert one[0].items() <= whole.items()
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"2 images of 3 objects .*num_images={number}"):
            build_pope(instances, tmp_path, number)
    with pytest.raises(ValueError, match="seed=-1"):
        build_pope(instances, tmp_path, seed=-1)


def test_nothing_is_written_by_halves(instances, tmp_path, monkeypatch):
    files = build_pope(instances, tmp_path / "sets")
    before = {path: path.read_bytes() for path in files.values()}

    def break_down(self, *args, **kwargs):
        self.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", break_down)
    with pytest.raises(OSError, match="disk full"):
        build_pope(instances, tmp_path / "sets", seed=1)
    assert {path: path.read_bytes() for path in (tmp_path / "sets").iterdir()} == before


def test_articles():
    assert pope_question("apple") == "Is there an apple in the image?"
    assert pope_question("umbrella") == "Is there an umbrella in the image?"
    assert pope_question("hair drier") == "Is there a hair drier in the image?"


def test_masks_have_the_images_own_size(instances, tmp_path):
    names = [f"{number:012d}.jpg" for number in (1, 2)]
    images = write_images(tmp_path / "val", names)
    files = build_pope(instances, tmp_path)
    task = PopeTask(files, images, instances=instances)
    masks = task.masks(0)
    expected = np.zeros((2, 8, 12), bool)  # without the crowd
    expected[0, 0] = expected[1, 1] = True
    assert masks.dtype == bool
    assert np.array_equal(masks, expected)
    assert task.masks(1).shape == (4, 8, 12)
    write_images(images, names, size=(24, 16))
    assert np.array_equal(task.masks(0), expected.repeat(2, 1).repeat(2, 2))
    write_images(images, names, size=(12, 12))
    with pytest.raises(ValueError, match="is 12x12, but .* says 12x8"):
        task.masks(0)


def with_boxes(path, *numbers):
    """Take the masks out of the file, of these images."""
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        if entry["image_id"] in numbers:
            entry["segmentation"] = []
            entry["bbox"] = [0, 0, 3, 4]
    path.write_text(json.dumps(content))


def test_boxes_are_enough(instances, tmp_path):
    masks = build_pope(instances, tmp_path / "masks")
    with_boxes(instances, *PRESENT)
    boxes = build_pope(instances, tmp_path / "boxes")
    for split, path in masks.items():
        assert boxes[split].read_bytes() == path.read_bytes()
    images = write_images(tmp_path / "val", [f"{number:012d}.jpg" for number in (1, 2)])
    task = PopeTask(boxes, images, instances=instances)
    assert [task.masks(owner) for owner in (0, 1)] == [None, None]


def test_masks_are_known_of_all_images_or_of_none(instances, tmp_path):
    files = build_pope(instances, tmp_path)
    images = write_images(tmp_path / "val", [f"{number:012d}.jpg" for number in (1, 2)])
    with_boxes(instances, 2)
    assert PopeTask(files, images, instances=instances).masks(0) is None
    assert PopeTask(files, images, instances=instances, limit=1).masks(0).shape == (2, 8, 12)
    content = json.loads(instances.read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    instances.write_text(json.dumps(content))
    assert PopeTask(files, images, instances=instances).masks(0) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_turned_with_the_image(instances, tmp_path, orientation):
    """Object n of an image is its row n; here the row is red."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[1, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "val").mkdir()
    for number in (1, 2):
        path = tmp_path / f"val/{number:012d}.jpg"
        Image.fromarray(pixels).save(path, format="PNG", exif=exif)
    task = PopeTask(build_pope(instances, tmp_path), tmp_path / "val", instances=instances)
    red = np.asarray(task.image(0))[..., 0] > 0
    assert red.shape == ((8, 12) if orientation < 5 else (12, 8))
    assert np.array_equal(task.masks(0)[1], red)


def test_an_image_under_two_names_is_refused(instances, tmp_path):
    content = json.loads(instances.read_text())
    content["images"] += [{**content["images"][0], "id": 77, "file_name": f"{1:012d}.jpg"}]
    instances.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="images 1 and 77 are both called 000000000001.jpg"):
        build_pope(instances, tmp_path)


def test_images_without_masks(instances, files, folder):
    task = PopeTask(files, folder, instances=instances)
    assert task.masks(0) is None
    assert task.describe() != PopeTask(files, folder).describe()


def test_no_objects_are_no_masks(instances, tmp_path):
    content = json.loads(instances.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["iscrowd"]]
    instances.write_text(json.dumps(content))
    path = write_lines(tmp_path / "x_y.json", [line(1, f"{1:012d}.jpg", "dog", "no")])
    images = write_images(tmp_path / "val", [f"{1:012d}.jpg"])
    assert PopeTask(path, images, instances=instances).masks(0).shape == (0, 8, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "without a list 'categories'"),
        (lambda c: c["images"][1].pop("width"), "'images' lacks width"),
        (
            lambda c: c["annotations"][0].update(image_id=99),
            "entry 1 of 'annotations' is of image 99",
        ),
        (
            lambda c: c["annotations"][0].update(category_id=99),
            "entry 1 of 'annotations' is of category 99",
        ),
        (lambda c: c["annotations"].clear(), "0 images of 3 objects"),
    ],
)
def test_what_is_no_instances_file_is_refused(change, message, instances, tmp_path):
    content = json.loads(instances.read_text())
    change(content)
    instances.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build_pope(instances, tmp_path)


def test_unreadable_instances_are_refused(instances, tmp_path):
    for text, message in (("[]", "is no JSON object"), ("{", "is no JSON")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            build_pope(tmp_path / "bad.json", tmp_path)
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        build_pope(tmp_path / "none.json", tmp_path)
    content = json.loads(instances.read_text())
    content["annotations"][0]["segmentation"] = {"size": [8, 12], "counts": None}
    instances.write_text(json.dumps(content))
    images = write_images(tmp_path / "val", [f"{number:012d}.jpg" for number in (1, 2)])
    task = PopeTask(build_pope(instances, tmp_path), images, instances=instances)
    with pytest.raises(ValueError, match="annotation of image 1 has no readable mask"):
        task.masks(0)


@pytest.mark.skipif(not COCO_TINY.is_dir(), reason="no coco-tiny beside the repository")
def test_real_images(tmp_path, capsys):
    path = COCO_TINY / "annotations/instances_val2017.json"
    files = build_pope(path, tmp_path)
    task = PopeTask(files, COCO_TINY / "val2017", instances=path)
    content = json.loads(path.read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    number = {e["file_name"]: e["id"] for e in content["images"]}
    present = {}
    for entry in content["annotations"]:
        present.setdefault(entry["image_id"], set()).add(names[entry["category_id"]])
    assert len(task.image_names) == sum(len(things) >= 3 for things in present.values())
    assert len(task.items) == 18 * len(task.image_names)
    assert Counter(item.answers[0] for item in task.items) == {
        "yes": 9 * len(task.image_names),
        "no": 9 * len(task.image_names),
    }
    for item in task.items:
        things = present[number[task.image_names[item.owner]]]
        there = any(item.question == pope_question(thing) for thing in things)
        assert there == (item.answers[0] == "yes")
    coco = COCO(path)
    for owner, name in enumerate(task.image_names):
        entries = coco.loadAnns(coco.getAnnIds(imgIds=number[name], iscrowd=False))
        masks = task.masks(owner)
        assert masks.shape[1:] == Image.open(COCO_TINY / "val2017" / name).size[::-1]
        assert np.array_equal(masks, [coco.annToMask(entry) for entry in entries])
