import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.scenes import (
    LEVELS,
    MAX_SEED,
    SceneStyle,
    draw_scene,
    scene_style,
    split_seed,
    write_scenes,
)

SCENES = 40


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(0, i) for i in range(SCENES)]


def test_scene_is_fixed_by_seed_and_index(scenes):
    again = draw_scene(0, 7)
    assert np.array_equal(again.image, scenes[7].image)
    assert [o.box for o in again.objects] == [o.box for o in scenes[7].objects]
    for other in (draw_scene(0, 8), draw_scene(1, 7), draw_scene(7, 0)):
        assert not np.array_equal(again.image, other.image)


def test_image_and_number_of_objects(scenes):
    assert {s.image.shape for s in scenes} == {(96, 96, 3)}
    assert {s.image.dtype for s in scenes} == {np.dtype(np.uint8)}
    assert {len(s.objects) for s in scenes} == {3, 4, 5, 6}
    assert {len(draw_scene(0, i, num_objects=(2, 2)).objects) for i in range(5)} == {2}


@pytest.fixture(scope="module")
def hard_scenes():
    return [draw_scene(0, i, 192, style=LEVELS["hard"]) for i in range(SCENES)]


def test_hard_scenes_hold_more_and_smaller_things(scenes, hard_scenes):
    assert {len(s.objects) for s in hard_scenes} == set(range(6, 13))
    smallest = {}
    for name, some, scale in (("easy", scenes, 1), ("hard", hard_scenes, 2)):
        objects = [o for s in some for o in s.objects]
        small = [max(o.box[2:]) / scale for o in objects if o.size == "small"]
        smallest[name] = np.mean(small), len(small) / len(objects)
    assert smallest["hard"][0] < smallest["easy"][0] - 1
    assert smallest["hard"][1] > 0.65 > smallest["easy"][1]


def test_hard_scenes_have_coloured_distractors(scenes, hard_scenes):
    """Colour where no object is."""

    def outside(some):
        shares = []
        for scene in some:
            covered = np.any([o.mask for o in scene.objects], axis=0)
            image = scene.image.astype(int)
            vivid = image.max(-1) - image.min(-1) > 100
            shares.append((vivid & ~covered).mean())
        return np.mean(shares)

    assert outside(hard_scenes) > 4 * outside(scenes)
    plain = replace(LEVELS["hard"], distractors=(0, 0))
    assert outside([draw_scene(0, i, 192, style=plain) for i in range(SCENES)]) < 0.02


def test_every_shape_colour_and_size_is_drawn(scenes):
    objects = [o for s in scenes for o in s.objects]
    assert {o.shape for o in objects} == set(SHAPES)
    assert {o.colour for o in objects} == set(COLOURS)
    assert {o.size for o in objects} == {"small", "large"}


def test_masks_are_apart_and_boxes_are_tight(scenes):
    for scene in scenes:
        assert sum(o.mask.astype(int) for o in scene.objects).max() == 1
        for item in scene.objects:
            rows, columns = np.nonzero(item.mask)
            x, y, width, height = item.box
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max(), rows.max()) == (x + width - 1, y + height - 1)


@pytest.mark.parametrize("size", [96, 224])
def test_extents_grow_with_the_image(size):
    scale = size / 96
    for scene in (draw_scene(3, i, size) for i in range(20)):
        assert scene.image.shape == (size, size, 3)
        for item in scene.objects:
            low, high = (11, 13) if item.size == "small" else (20, 24)
            # the tips of a star or triangle cover less than half of their last pixels
            assert low * scale - 3 <= max(item.box[2:]) <= round(high * scale)


def test_masked_pixels_have_the_named_colour(scenes):
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    for item, image in ((o, s.image) for s in scenes for o in s.objects):
        colour = np.median(image[item.mask], axis=0)
        assert names[np.abs(palette - colour).sum(1).argmin()] == item.colour


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fixture", ["scenes", "hard_scenes"])
def test_masks_are_exact(fixture, request):
    """Inside a mask all is of the object's colour, but for the antialiased rim."""
    scenes = request.getfixturevalue(fixture)
    for item, image in ((o, s.image.astype(int)) for s in scenes for o in s.objects):
        size = len(image)
        colour = np.median(image[item.mask], axis=0)
        far = np.abs(image - colour).max(-1) > 60
        assert (far & item.mask).sum() <= 0.25 * item.mask.sum()
        padded = np.pad(item.mask, 1)
        inner = item.mask.copy()
        for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
            inner &= padded[dy : dy + size, dx : dx + size]
        assert not (far & inner).any()


def test_the_drawing_is_that_of_its_version():
    """Scenes that were written before are those that are drawn now."""
    scene = draw_scene(3, 5)
    assert scene.image.sum(dtype=int) == pytest.approx(2_366_866, rel=1e-4)
    first = scene.objects[0]
    assert (first.shape, first.colour, first.size) == ("cross", "blue", "small")
    assert first.box == (64, 59, 11, 11)


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [("circle", 0.7, 0.85), ("square", 0.55, 1.01), ("triangle", 0.3, 0.55), ("star", 0.2, 0.5)],
)
def test_shapes_fill_their_boxes_as_they_should(scenes, shape, low, high):
    objects = [o for s in scenes for o in s.objects if o.shape == shape and o.size == "large"]
    for item in objects:
        assert low <= item.mask.sum() / max(item.box[2:]) ** 2 <= high
    assert objects


def test_style_changes_difficulty():
    tiny = SceneStyle(small=(6, 7), large_share=0.0, clutter=(0, 0), noise=0)
    scene = draw_scene(0, 0, num_objects=(20, 20), style=tiny)
    assert len(scene.objects) == 20
    assert {o.size for o in scene.objects} == {"small"}
    assert max(max(o.box[2:]) for o in scene.objects) <= 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, "size=8"),
        ({"num_objects": (0, 3)}, "num_objects"),
        ({"num_objects": (4, 3)}, "num_objects"),
        ({"num_objects": (90, 90)}, "90 objects do not fit"),
    ],
)
def test_impossible_scenes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scene(0, 0, **arguments)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(root, num_train=5, num_val=3, size=64, seed=4)
    return root


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_layout_is_that_of_coco(written):
    assert sorted(files(written)) == sorted(
        [f"train2017/{i:012d}.jpg" for i in range(1, 6)]
        + [f"val2017/{i:012d}.jpg" for i in range(1, 4)]
        + [f"annotations/instances_{split}2017.json" for split in ("train", "val")]
        + ["scenes.json"]
    )


def test_a_test_split_and_a_hard_level(tmp_path, capsys):
    hard = {"num_train": 1, "num_val": 0, "num_test": 2, "size": 96, "seed": 4, "level": "hard"}
    write_scenes(tmp_path, **hard)
    coco = COCO(str(tmp_path / "annotations/instances_test2017.json"))
    assert coco.dataset["info"]["description"] == "drawn scenes, hard"
    for image, index in ((1, 0), (2, 1)):
        scene = draw_scene(split_seed("test", 4), index, style=LEVELS["hard"])
        annotations = coco.imgToAnns[image]
        assert len(annotations) == len(scene.objects) >= 6
        for annotation, item in zip(annotations, scene.objects, strict=True):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), item.mask)
    with pytest.raises(ValueError, match="was made with"):
        write_scenes(tmp_path, **{**hard, "level": "easy"})


def test_splits_draw_from_streams_of_their_own():
    seeds = [0, 1, 7, MAX_SEED - 1]
    streams = [split_seed(split, seed) for split in ("train", "val", "test") for seed in seeds]
    assert len(set(streams)) == len(streams)
    assert split_seed("test", 0) > split_seed("val", MAX_SEED - 1)
    assert not np.array_equal(
        draw_scene(split_seed("test", 0), 0).image, draw_scene(split_seed("train", 0), 0).image
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_seed("dev", 0), "split='dev'"),
        (lambda: split_seed("val", MAX_SEED), "seed="),
        (lambda: split_seed("val", -1), "seed=-1"),
        (lambda: scene_style("brutal"), "level='brutal'"),
    ],
)
def test_unknown_splits_and_levels_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_annotations_say_what_was_drawn(written, capsys):
    coco = COCO(str(written / "annotations/instances_train2017.json"))
    assert sorted(coco.imgs) == [1, 2, 3, 4, 5]
    assert [c["name"] for c in coco.dataset["categories"]] == list(SHAPES)
    assert {"seed": 4, "size": 64, "num_train": 5, "num_val": 3}.items() <= coco.dataset[
        "info"
    ].items()
    scene = draw_scene(8, 2, 64)
    stored = np.asarray(Image.open(written / "train2017/000000000003.jpg")).astype(int)
    assert np.abs(stored - scene.image).mean() < 8
    annotations = coco.imgToAnns[3]
    assert len(annotations) == len(scene.objects)
    for annotation, item in zip(annotations, scene.objects, strict=True):
        assert np.array_equal(coco.annToMask(annotation).astype(bool), item.mask)
        assert annotation["area"] == item.mask.sum()
        assert annotation["bbox"] == list(item.box)
        assert annotation["iscrowd"] == 0
        assert coco.cats[annotation["category_id"]]["name"] == item.shape
        assert (annotation["colour"], annotation["size"]) == (item.colour, item.size)


def test_splits_and_seeds_share_no_image(written, tmp_path):
    write_scenes(tmp_path / "next", num_train=5, num_val=3, size=64, seed=5)
    images = [
        content
        for root in (written, tmp_path / "next")
        for name, content in files(root).items()
        if name.endswith(".jpg")
    ]
    assert len(set(images)) == 16


def test_interrupted_writing_ends_with_the_same_files(written, tmp_path):
    root = tmp_path / "set"
    write_scenes(root, num_train=5, num_val=3, size=64, seed=4)
    kept = root / "train2017/000000000001.jpg"
    time = kept.stat().st_mtime_ns
    (root / "train2017/000000000004.jpg").unlink()
    (root / "annotations/instances_train2017.json").unlink()
    (root / "val2017/000000000002.jpg").unlink()
    write_scenes(root, num_train=5, num_val=3, size=64, seed=4)
    assert files(root) == files(written)
    assert kept.stat().st_mtime_ns == time


def test_more_scenes_begin_with_the_same_ones(written, tmp_path):
    write_scenes(tmp_path, num_train=7, num_val=0, size=64, seed=4)
    few, many = files(written), files(tmp_path)
    assert all(many[f"train2017/{i:012d}.jpg"] == few[f"train2017/{i:012d}.jpg"] for i in (1, 5))


@pytest.mark.parametrize("change", [{"seed": 5}, {"size": 96}, {"num_train": 6}, {"num_val": 2}])
def test_other_settings_are_refused(written, change):
    before = files(written)
    settings = {"num_train": 5, "num_val": 3, "size": 64, "seed": 4} | change
    with pytest.raises(ValueError, match="was made with"):
        write_scenes(written, **settings)
    assert files(written) == before


def test_other_settings_are_refused_after_an_interruption(written, tmp_path):
    (tmp_path / "scenes.json").write_bytes((written / "scenes.json").read_bytes())
    with pytest.raises(ValueError, match="was made with"):
        write_scenes(tmp_path, num_train=5, num_val=3, size=64, seed=9)


def test_images_of_others_are_not_touched(tmp_path):
    photograph = tmp_path / "train2017/000000000001.jpg"
    photograph.parent.mkdir()
    photograph.write_bytes(b"someone's")
    with pytest.raises(ValueError, match="came from elsewhere"):
        write_scenes(tmp_path, num_train=2, num_val=1, size=64, seed=0)
    assert list(files(tmp_path).values()) == [b"someone's"]


def test_nothing_is_written_for_bad_numbers(tmp_path):
    root = tmp_path / "set"
    for numbers in ({"num_train": -1}, {"seed": -1}, {"size": 10}, {"level": "none"}):
        settings = {"num_train": 1, "num_val": 1, "size": 64, "seed": 0} | numbers
        with pytest.raises(ValueError, match=next(iter(numbers))):
            write_scenes(root, **settings)
    assert not root.exists()


def test_settings_file_is_json(written):
    assert json.loads((written / "scenes.json").read_text())["version"] == 1
