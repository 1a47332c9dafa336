import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torch.utils.data import DataLoader

from ocvtp.data.coco import CocoImages, collate, find_images

COCO_TINY = Path(__file__).parents[2] / "../shared/coco-tiny"


class Resize:
    """[3, 20, 20], stretched."""

    size = (20, 20)

    def __call__(self, image):
        assert image.mode == "RGB"
        pixels = np.array(image.resize(self.size, Image.Resampling.NEAREST))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    def instance_map(self, ids):
        assert ids.dtype == np.uint8
        resized = Image.fromarray(ids).resize(self.size, Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(resized).astype(np.int64))

    def describe(self):
        return {"size": self.size}


class Keep(Resize):
    """As it is stored."""

    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    def instance_map(self, ids):
        return torch.from_numpy(ids.astype(np.int64))


def rectangle(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def write_json(path, images, annotations, size=(40, 30)):
    entries = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]} for i, name in images
    ]
    records = [
        {"id": n, "image_id": i, "segmentation": shape, "iscrowd": int(isinstance(shape, dict))}
        for n, (i, shape) in enumerate(annotations, start=1)
    ]
    path.write_text(json.dumps({"images": entries, "annotations": records}))
    return path


@pytest.fixture
def folder(tmp_path):
    """Images c, a, b of ids 9, 3, 5; a without instances, b with a crowd over everything."""
    images = tmp_path / "images"
    images.mkdir()
    for value, name in enumerate(("c.jpg", "a.jpg", "b.jpg"), start=1):
        Image.new("RGB", (40, 30), (value * 60, 0, 0)).save(images / name)
    crowd = rle.encode(np.ones((30, 40), np.uint8, order="F"))
    crowd = {"size": crowd["size"], "counts": crowd["counts"].decode()}
    write_json(
        tmp_path / "instances.json",
        [(9, "c.jpg"), (3, "a.jpg"), (5, "b.jpg")],
        [
            (9, rectangle(4, 4, 4, 4)),
            (9, rectangle(0, 0, 20, 20)),
            (9, rectangle(15, 10, 10, 10)),
            (5, rectangle(0, 0, 10, 10)),
            (5, crowd),
        ],
    )
    return tmp_path


def open_images(folder, transform=None, **options):
    options = {"annotations": folder / "instances.json", **options}
    return CocoImages(folder / "images", transform=transform or Keep(), **options)


def test_images_of_a_file_come_in_the_order_of_their_ids(folder, capsys):
    images = open_images(folder, with_instances=True)
    assert capsys.readouterr().out == ""
    items = list(images)
    assert [(i["image_id"], i["file_name"]) for i in items] == [
        (3, "a.jpg"),
        (5, "b.jpg"),
        (9, "c.jpg"),
    ]
    reds = [round(float(i["pixel_values"][0].mean()) * 255) for i in items]
    assert reds == pytest.approx([120, 180, 60], abs=3)
    assert {tuple(i["pixel_values"].shape) for i in items} == {(3, 30, 40)}


def test_smaller_instances_lie_over_larger_ones(folder):
    empty, crowded, three = (i["instances"] for i in open_images(folder, with_instances=True))
    assert not empty.any()
    expected = torch.zeros(30, 40, dtype=torch.int64)
    expected[:10, :10] = 1
    assert torch.equal(crowded, expected)
    expected = torch.zeros(30, 40, dtype=torch.int64)
    expected[:20, :20] = 1
    expected[10:20, 15:25] = 2
    expected[4:8, 4:8] = 3
    assert torch.equal(three, expected)


def test_the_largest_255_instances_are_kept(folder):
    cells = [(9, rectangle(x, y, 1, 1)) for y in range(8) for x in range(40)]
    write_json(folder / "instances.json", [(9, "c.jpg")], [*cells, (9, rectangle(0, 20, 40, 10))])
    ids = open_images(folder, with_instances=True)[0]["instances"]
    assert ids.unique().tolist() == list(range(256))
    assert (ids[20:] == 1).all()


def test_transform_gets_both(folder):
    item = open_images(folder, Resize(), with_instances=True)[2]
    assert item["pixel_values"].shape == (3, 20, 20)
    assert item["instances"].shape == (20, 20)
    assert item["instances"].unique().tolist() == [0, 1, 2, 3]


def test_instances_only_on_demand(folder):
    assert "instances" not in open_images(folder)[0]


def test_limit(folder):
    assert [i["image_id"] for i in open_images(folder, limit=2)] == [3, 5]
    assert len(open_images(folder, limit=7)) == 3


def test_folder_without_annotations(folder):
    (folder / "images/sub").mkdir()
    for name in ("sub/z.PNG", "0.webp", "d.jpeg", ".hidden.jpg"):
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    (folder / "images/notes.txt").write_text("no image")
    items = list(open_images(folder, annotations=None))
    names = ["0.webp", "a.jpg", "b.jpg", "c.jpg", "d.jpeg", "sub/z.PNG"]
    assert [i["file_name"] for i in items] == names
    assert [i["image_id"] for i in items] == list(range(6))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_all_modes_become_rgb(folder, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = folder / f"images/x.{suffix}"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    images = open_images(folder, annotations=None)
    item = next(i for i in images if i["file_name"].startswith("x"))
    assert item["pixel_values"].shape == (3, 8, 8)
    assert item["pixel_values"].mean() > 0.95


def test_stored_orientation_is_kept(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    Image.new("RGB", (40, 30)).save(folder / "images/c.jpg", exif=exif)
    item = open_images(folder, with_instances=True)[2]
    assert item["pixel_values"].shape == (3, 30, 40)
    assert item["instances"].shape == (30, 40)


def test_without_masks_images_are_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "images/c.jpg", exif=exif)
    for options in ({"annotations": None}, {}):
        item = open_images(folder, **options)[2]
        assert item["pixel_values"].shape == (3, 40, 30)
        assert item["image_size"] == (40, 30)


def test_sixteen_bits_are_scaled(folder):
    Image.fromarray(np.full((30, 40), 128 * 257, np.uint16)).save(folder / "images/b.png")
    item = open_images(folder, annotations=None)[2]
    assert item["pixel_values"].unique().tolist() == pytest.approx([128 / 255])


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "text":
        path.write_text("no image")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "does not exist"),
        ("text", "cannot identify"),
        ("empty", "cannot identify"),
        ("cut", "truncated"),
    ],
)
def test_unreadable_images(folder, how, reason):
    damage(folder / "images/b.jpg", how)
    images = open_images(folder)
    with pytest.raises(ValueError, match=rf"b\.jpg cannot be used: .*{reason}.*on_error='skip'"):
        images[1]
    items = list(open_images(folder, on_error="skip"))
    assert [i.get("file_name") for i in items] == ["a.jpg", None, "c.jpg"]
    assert items[1].keys() == {"error"}
    assert items[1]["error"].startswith("b.jpg: ")
    assert reason in items[1]["error"]


def test_masks_of_another_size(folder):
    image = Image.new("RGB", (20, 15), (60, 0, 0))
    image.save(folder / "images/c.jpg")
    ids = open_images(folder, with_instances=True)[2]["instances"]
    expected = torch.zeros(15, 20, dtype=torch.int64)
    expected[:10, :10] = 1
    expected[5:10, 8:12] = 2
    expected[2:4, 2:4] = 3
    assert ids.shape == expected.shape
    assert (ids == expected).float().mean() > 0.96


def test_masks_of_another_shape(folder):
    Image.new("RGB", (30, 40)).save(folder / "images/c.jpg")
    with pytest.raises(ValueError, match=r"30x40.*40x30.*do not fit"):
        open_images(folder, with_instances=True)[2]
    assert open_images(folder)[2]["pixel_values"].shape == (3, 40, 30)


@pytest.mark.parametrize(
    "shape",
    [
        *([[1, 2]], [[0, 0, 9, 9]], [0, 0, 9, 0, 9, 9], "all", 7),
        *({"counts": [1], "size": "no"}, {"counts": "0`U1", "size": [40, 30]}),
    ],
)
def test_unreadable_masks(folder, shape):
    write_json(folder / "instances.json", [(9, "c.jpg")], [(9, rectangle(0, 0, 9, 9)), (9, [])])
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"][1]["segmentation"] = shape
    (folder / "instances.json").write_text(json.dumps(content))
    message = r"c\.jpg.*annotation 2 has no readable mask.*; repair .*instances\.json, or"
    with pytest.raises(ValueError, match=message):
        open_images(folder, with_instances=True)[0]
    assert "error" in open_images(folder, with_instances=True, on_error="skip")[0]


BOX = {"id": 9, "image_id": 3, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize("segmentation", [[], [[]], None, "missing"])
def test_objects_with_a_box_alone_have_no_mask(folder, segmentation, caplog):
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    alone = {key: value for key, value in BOX.items() if segmentation == "missing"}
    content["annotations"] += [alone or {**BOX, "segmentation": segmentation}]
    content["annotations"] += [{**BOX, "id": 10, "image_id": 9, "segmentation": []}]
    path.write_text(json.dumps(content))
    for with_instances in (True, None):
        images = open_images(folder, with_instances=with_instances)
        assert [int(item["instances"].max()) for item in images] == [0, 1, 3]
    assert "2 of 6 objects have no mask" in caplog.text


def test_a_file_of_boxes_alone(folder, caplog):
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": [BOX]}))
    assert "instances" not in open_images(folder, with_instances=None)[0]
    assert not open_images(folder, with_instances=True)[0]["instances"].any()
    assert "1 of 1 objects have no mask" in caplog.text
    Image.new("RGB", (30, 40)).save(folder / "images/a.jpg")  # of another shape than the file says
    assert open_images(folder, with_instances=True)[0]["instances"].shape == (40, 30)


def test_an_image_that_is_listed_twice_is_refused(folder):
    write_json(folder / "instances.json", [(9, "c.jpg"), (9, "a.jpg")], [])
    with pytest.raises(ValueError, match=r"two images have the id 9, c\.jpg and a\.jpg"):
        open_images(folder)


GOOD = {"id": 1, "file_name": "a.jpg", "width": 1, "height": 1}
CAPTION = {"id": 1, "image_id": 1, "caption": "a cat"}
NO_INSTANCES = {
    "no JSON": "{",
    "no JSON object": "[]",
    "without a list 'images'": '{"annotations": []}',
    "without a list 'annotations'": json.dumps({"images": [GOOD]}),
    r"annotation 1 lacks segmentation or bbox \(it has id, image_id, caption\)": json.dumps(
        {"images": [GOOD], "annotations": [CAPTION]}
    ),
    "entry 1 of 'images' lacks height, width": json.dumps(
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
    ),
    "the id '1'": json.dumps({"images": [GOOD | {"id": "1"}], "annotations": []}),
    "lists no images": json.dumps({"images": [], "annotations": []}),
}


@pytest.mark.parametrize("found", NO_INSTANCES)
def test_files_that_are_no_instances_files(folder, found):
    (folder / "instances.json").write_text(NO_INSTANCES[found])
    with pytest.raises(ValueError, match=rf"annotation file .*instances\.json .*{found}"):
        open_images(folder)


def test_binary_annotations(folder):
    with pytest.raises(ValueError, match=r"a\.jpg is no JSON"):
        open_images(folder, annotations=folder / "images/a.jpg")


def test_missing_places(folder):
    with pytest.raises(ValueError, match=r"images folder .*absent does not exist"):
        CocoImages(folder / "absent", folder / "instances.json", Keep())
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        open_images(folder, annotations=folder / "absent.json")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no jpg, jpeg, png, webp, bmp, tif, tiff files"):
        CocoImages(folder / "empty", None, Keep())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"limit": 0}, "limit=0"),
        ({"annotations": None, "with_instances": True}, "annotations=None"),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_images(folder, **arguments)


def test_collate_keeps_errors_apart(folder):
    damage(folder / "images/b.jpg", "text")
    items = list(open_images(folder, with_instances=True, on_error="skip"))
    batch = collate(items)
    assert batch["pixel_values"].shape == (2, 3, 30, 40)
    assert torch.equal(batch["pixel_values"][1], items[2]["pixel_values"])
    assert torch.equal(batch["instances"][1], items[2]["instances"])
    assert batch["image_ids"] == [3, 9]
    assert batch["file_names"] == ["a.jpg", "c.jpg"]
    assert len(batch["errors"]) == 1
    assert batch["errors"][0].startswith("b.jpg: ")


def test_collate_without_instances_or_images(folder):
    batch = collate(list(open_images(folder)))
    assert "instances" not in batch
    assert batch["errors"] == []
    nothing = collate([{"error": "x: y"}])
    assert nothing["pixel_values"].shape[0] == 0
    assert (nothing["image_ids"], nothing["errors"]) == ([], ["x: y"])


@pytest.mark.slow
def test_workers_give_the_same_batches(folder):
    images = open_images(folder, with_instances=True)
    alone, helped = (
        list(DataLoader(images, batch_size=2, collate_fn=collate, num_workers=n)) for n in (0, 2)
    )
    assert len(alone) == 2
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["instances"], b["instances"])
        assert torch.equal(a["pixel_values"], b["pixel_values"])


@pytest.mark.sampled(1)
@pytest.mark.skipif(not COCO_TINY.is_dir(), reason="no coco-tiny beside the repository")
@pytest.mark.parametrize(("split", "count"), [("train2017", 50), ("val2017", 20)])
def test_real_images(split, count):
    annotations = COCO_TINY / f"annotations/instances_{split}.json"
    images = CocoImages(COCO_TINY / split, annotations, Resize(), with_instances=True)
    assert len(images) == count
    items = list(images)
    ids = [i["image_id"] for i in items]
    assert ids == sorted(ids)
    assert sum(int(i["instances"].max()) > 0 for i in items) > count // 2
    for item in items:
        shown = (item["pixel_values"].shape, item["instances"].shape)
        assert shown == ((3, 20, 20), (20, 20))
    with pytest.raises(ValueError, match="lacks segmentation or bbox"):
        CocoImages(COCO_TINY / split, COCO_TINY / f"annotations/captions_{split}.json", Resize())


def test_images_are_found_in_the_order_of_their_paths(tmp_path):
    """As pathlib sorts paths; with links to files, and none of folders."""
    names = ["b.jpg", "a/z.PNG", "a-b/c.jpeg", "a.jpg", "a/b/c.tif", ".h/x.jpg", "é.webp", "A.bmp"]
    for name in [*names, "a/.hidden.jpg", "a/x.txt", "noend", "a/.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "absent.jpg")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    (tmp_path / "around").symlink_to(tmp_path / "a")
    wanted = sorted(map(Path, [*names, "link.jpg"]))
    assert find_images(tmp_path) == wanted
    assert find_images(tmp_path / "absent") == []
