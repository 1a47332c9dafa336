"""Coverage of objects, nearest-kept cosine and the unrestored share, against loops and by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_processor
from torch import Tensor

from ocvtp.data.scenes import write_scenes
from ocvtp.encoders.clip import ProcessorTransform
from ocvtp.evaluation.tasks.coverage import CoverageTask
from ocvtp.evaluation.tasks.kept_tokens import kept_cells, nearest_kept, unrestored
from ocvtp.evaluation.tasks.object_cells import cells_on, sight_of_host
from ocvtp.hosts.attach import attached
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Pruner, build_pruner
from ocvtp.random_models.clip_config import plain_processor
from ocvtp.structures import Selection

NAMES = [f"coverage/{size}" for size in ("small", "medium", "large", "all")]


@dataclass(kw_only=True, eq=False)
class These(Pruner):
    """Keep tokens that the test names, another number of each image."""

    rows: tuple[tuple[int, ...], ...]
    name = "these"

    def _select(self, tokens, num_keep):
        most = max(map(len, self.rows))
        keep = torch.tensor([(*row, *[0] * (most - len(row))) for row in self.rows])
        valid = torch.tensor([[i < len(row) for i in range(most)] for row in self.rows])
        return Selection(keep, valid=None if bool(valid.all()) else valid)


def these(*rows):
    return These(num_keep=max(map(len, rows)), rows=rows)


def run(task, vlm, processor, pruner, items, **options):
    """The records of a batch, as a runner gets them; and the prompt."""
    inputs = processor(
        images=[[task.image(item.owner)] for item in items],
        text=[with_template(processor, item.question, 1) for item in items],
        return_tensors="pt",
        padding=True,
    )
    prompts = []
    with (
        attached(vlm, pruner, on_prune=prompts.append, processor=processor, **options),
        torch.no_grad(),
    ):
        vlm(**inputs, logits_to_keep=1)
        host = find_host(vlm)
        return task.look(host, prompts[0], items), prompts[0]


def write_coco(folder, pictures, objects):
    """Images [h, w, 3] and (image, mask [h, w], extra entries) as a COCO folder."""
    from pycocotools import mask as rle

    (folder / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, pixels in enumerate(pictures, start=1):
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        content["images"].append({"id": number, "file_name": f"{number}.png", **size})
    for number, (image, mask, extra) in enumerate(objects, start=1):
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        code = {"size": code["size"], "counts": code["counts"].decode()}
        entry = {"id": number, "image_id": image, "category_id": 1, "segmentation": code}
        content["annotations"].append(entry | {"area": int(mask.sum()), "iscrowd": 0} | extra)
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "images", folder / "instances.json"


def block(height, width, top, left, rows, columns):
    mask = np.zeros((height, width), bool)
    mask[top : top + rows, left : left + columns] = True
    return mask


def cells_by_loops(seen, grid, side):
    """Which cells lie on which objects, pixel by pixel."""
    on = np.zeros((len(seen), grid[0] * grid[1]), bool)
    for number, mask in enumerate(seen):
        counts = {}
        for row in range(grid[0] * side):
            for column in range(grid[1] * side):
                if mask[row, column]:
                    cell = row // side * grid[1] + column // side
                    counts[cell] = counts.get(cell, 0) + 1
        for cell, count in counts.items():
            on[number, cell] = count / side**2 >= 0.25 or count == max(counts.values())
    return on


@pytest.mark.parametrize(
    ("picture", "grid", "patch", "side"),
    [((24, 24), (4, 4), 6, 6), ((27, 22), (4, 3), 6, 6), ((24, 36), (2, 3), 6, 12)],
)
def test_cells_on_objects_are_those_of_a_loop(picture, grid, patch, side):
    rng = np.random.default_rng(0)
    density = rng.random((30, 1, 1)) ** 3
    seen = rng.random((30, *picture)) < density  # from a few pixels to nearly all
    seen[0] = False
    expected = cells_by_loops(seen, grid, side)
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(cells_on(seen, grid, patch), expected)
    assert cells_on(seen[:0], grid, patch).shape == (0, grid[0] * grid[1])


def test_a_quarter_of_a_cell_counts_and_less_where_it_is_most():
    seen = np.stack([block(8, 8, 0, 0, 4, 5), block(8, 8, 0, 0, 4, 5), block(8, 8, 7, 7, 1, 1)])
    seen[1, 3, 4] = False
    expected = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]  # 16 + 4, 16 + 3, 1 of 16 pixels
    np.testing.assert_array_equal(cells_on(seen, (2, 2), 4), np.array(expected, bool))
    level = block(8, 8, 3, 3, 2, 2)[None]  # a pixel in each
    assert cells_on(level, (2, 2), 4).all()


@pytest.mark.parametrize("size", [(100, 60), (60, 700), (40, 30)])
@pytest.mark.parametrize("do_resize", [True, False])
def test_pixels_come_from_where_the_processor_takes_them(llava, size, do_resize):
    processor = plain_processor(56)
    processor.do_resize = do_resize
    noise = np.random.default_rng(1).integers(1, 255, (size[1], size[0], 3), np.uint8)
    settings = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
    made = processor(images=[Image.fromarray(noise)], return_tensors="pt", **settings)
    rows, columns, inside = sight_of_host(find_host(llava), processor).sources(size)
    taken = noise[rows, columns] * inside[:, :, None]
    np.testing.assert_array_equal(taken, made["pixel_values"][0].permute(1, 2, 0).numpy())
    assert inside.all() == (do_resize or min(size) >= 56)


@pytest.mark.parametrize("name", ["random:tiny-qwen2.5-vl", "random:tiny-qwen3-vl"])
def test_pixels_of_packed_patches_are_put_together(name):
    vlm, processor = load_model(name)
    sight = sight_of_host(find_host(vlm), processor.image_processor)
    rows, columns, inside = sight.sources((320, 200))
    assert inside.all()
    assert rows.shape[0] < rows.shape[1]  # as wide as the image
    assert (np.diff(rows, axis=0) >= 0).all()
    assert (np.diff(columns, axis=1) >= 0).all()
    assert (rows.T == rows[:, 0]).all()
    assert rows.min() < 4
    assert rows.max() > 195
    assert (columns == columns[0]).all()
    assert columns.max() > 315


def random_tokens(seed=0, batch=3, count=12, dim=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, dim, generator=generator) * 2 + 1


KEPT = torch.zeros(3, 12, dtype=torch.bool)
KEPT[0, [1, 5]], KEPT[1, [0, 3, 11]], KEPT[2, 7] = True, True, True


def test_nearest_kept_is_that_of_a_loop():
    features = random_tokens()
    expected = []
    for image, kept in zip(features.double().numpy(), KEPT.numpy(), strict=True):
        directions = [x / np.sqrt((x * x).sum()) for x in image]
        best = [max(float(x @ directions[k]) for k in np.flatnonzero(kept)) for x in directions]
        expected.append(sum(best) / len(best))
    torch.testing.assert_close(nearest_kept(features, KEPT), Tensor(expected))
    torch.testing.assert_close(nearest_kept(features, torch.ones_like(KEPT)), torch.ones(3))


def test_unrestored_is_ridge_regression_image_by_image():
    features = random_tokens()
    expected = []
    for image, kept in zip(features.double().numpy(), KEPT.numpy(), strict=True):
        tokens = (image - image.mean(0)) / (image.std(0) + 0.01)
        chosen = tokens[kept]
        energy = (tokens**2).sum() / len(tokens)
        inner = chosen.T @ chosen + 0.3 * energy * np.eye(chosen.shape[1])
        # Regression in the space of features: x -> Z^T (Z Z^T + a I)^-1 Z x
        residual = tokens - tokens @ np.linalg.solve(inner, chosen.T @ chosen)
        expected.append((residual**2).sum() / (tokens**2).sum())
    torch.testing.assert_close(unrestored(features, KEPT), Tensor(expected))
    more = unrestored(features, KEPT | torch.eye(12, dtype=torch.bool)[2])
    assert (more < unrestored(features, KEPT)).all()


@pytest.fixture
def two_images(tmp_path):
    """A square image of 56 pixels as the tower sees it, cells of 14; and a wide one."""
    rng = np.random.default_rng(0)
    square = rng.integers(0, 255, (56, 56, 3), np.uint8)
    wide = rng.integers(0, 255, (56, 112, 3), np.uint8)
    objects = [
        (1, block(56, 56, 0, 0, 14, 14), {}),  # cell 0; 196 pixels: small
        (1, block(56, 56, 0, 0, 28, 28), {"area": 1024}),  # over it: 0, 1, 4, 5; medium
        (1, block(56, 56, 42, 42, 3, 3), {}),  # a corner of cell 15
        (1, block(56, 56, 0, 42, 14, 14), {"iscrowd": 1}),
        (2, block(56, 112, 0, 0, 56, 20), {"area": 9216}),  # cropped away
        (2, block(56, 112, 0, 20, 56, 9), {"area": 9215}),  # one column in the picture
        (2, block(56, 112, 14, 70, 14, 42), {"area": 9216}),  # 7, and what is cropped away
    ]
    return write_coco(tmp_path, [square, wide], objects)


def counts(record):
    return [(record[f"{name}/hits"], record[f"{name}/of"]) for name in NAMES]


@pytest.mark.parametrize(
    ("rows", "first", "second"),
    [
        (((0,), (7,)), [(1, 2), (1, 1), (0, 0), (2, 3)], [(0, 0), (0, 1), (1, 1), (1, 2)]),
        (((5, 15), (0, 1)), [(1, 2), (1, 1), (0, 0), (2, 3)], [(0, 0), (1, 1), (0, 1), (1, 2)]),
        (((3, 14), (6, 15)), [(0, 2), (0, 1), (0, 0), (0, 3)], [(0, 0), (0, 1), (0, 1), (0, 2)]),
        (((0, 1, 15), (4,)), [(2, 2), (1, 1), (0, 0), (3, 3)], [(0, 0), (1, 1), (0, 1), (1, 2)]),
    ],
)
def test_objects_are_counted_by_size_where_the_tower_sees_them(
    llava, two_images, rows, first, second
):
    task = CoverageTask(*two_images, tiny_processor())
    records, prompt = run(task, llava, tiny_processor(), these(*rows), task.items)
    assert [counts(record) for record in records] == [first, second]
    assert json.loads(json.dumps(records)) == records
    kept = torch.zeros(2, 16, dtype=torch.bool)
    for number, row in enumerate(rows):
        kept[number, list(row)] = True
    features = prompt.encoded.tokens.features
    for number, record in enumerate(records):
        own = features[number : number + 1], kept[number : number + 1]
        assert record["cosine"] == pytest.approx(float(nearest_kept(*own)), abs=1e-6)
        assert record["unrestored"] == pytest.approx(float(unrestored(*own)), abs=1e-5)


def test_ratios_share_objects_and_average_images(llava, two_images):
    task = CoverageTask(*two_images, tiny_processor())
    records, _ = run(task, llava, tiny_processor(), these((0,), (7,)), task.items)
    ratios = task.ratios(records)
    assert list(ratios) == [*NAMES, "cosine", "unrestored"]
    assert set(task.metrics) < set(ratios)
    values = [ratios[name].value for name in NAMES]
    assert values == [1 / 2, 1 / 2, 1 / 1, 3 / 5]
    for name in ("cosine", "unrestored"):
        assert ratios[name].value == pytest.approx(np.mean([r[name] for r in records]))
    assert ratios["coverage/all"].owners.tolist() == [0, 1]
    old = [{"ridge" if k == "unrestored" else k: v for k, v in r.items()} for r in records]
    assert task.ratios(old)["unrestored"].value == ratios["unrestored"].value


def test_objects_without_a_mask_do_not_count(tmp_path, llava):
    picture, corner = np.zeros((56, 56, 3), np.uint8), block(56, 56, 0, 0, 14, 14)
    objects = [(1, corner, {}), (1, corner, {"segmentation": []}), (2, corner, {})]
    folder, annotations = write_coco(tmp_path, [picture] * 2, objects)
    task = CoverageTask(folder, annotations, tiny_processor())
    assert [len(task.masks(owner)) for owner in (0, 1)] == [1, 1]
    records, _ = run(task, llava, tiny_processor(), these((0,), (1,)), task.items)
    assert [counts(record)[-1] for record in records] == [(1, 1), (0, 1)]
    content = json.loads(annotations.read_text())
    for entry in content["annotations"]:
        entry |= {"segmentation": [], "bbox": [0, 0, 14, 14]}
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"coverage needs masks, .*instances\.json have none"):
        CoverageTask(folder, annotations, tiny_processor())


@pytest.mark.parametrize(
    ("area", "size"), [(None, 0), (2000, 1), (1e5, 2), ("9", None), (-1, None)]
)
def test_areas_are_read_or_counted(tmp_path, llava, area, size):
    picture, corner = np.zeros((56, 56, 3), np.uint8), block(56, 56, 0, 0, 14, 14)
    source = write_coco(tmp_path, [picture], [(1, corner, {"area": area})])
    task = CoverageTask(*source, tiny_processor())
    if size is None:
        with pytest.raises(ValueError, match=f"image 1 has the area {area!r} in"):
            run(task, llava, tiny_processor(), these((0,)), task.items)
        return
    records, _ = run(task, llava, tiny_processor(), these((0,)), task.items)
    assert counts(records[0]) == [(int(n == size), int(n == size)) for n in range(3)] + [(1, 1)]


def test_photographs_on_their_side_stay_as_their_masks(tmp_path):
    picture, corner = np.zeros((40, 60, 3), np.uint8), block(40, 60, 0, 0, 14, 14)
    picture[:14, :14] = 255
    folder, annotations = write_coco(tmp_path, [picture], [(1, corner, {})])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(folder / "1.png", exif=exif)
    task = CoverageTask(folder, annotations, tiny_processor())
    np.testing.assert_array_equal(np.asarray(task.image(0))[..., 0] > 0, task.masks(0)[0])


def test_items_and_settings(two_images):
    task = CoverageTask(*two_images, tiny_processor(), question="What is there?", limit=1)
    (item,) = task.items
    assert (item.key, item.owner, item.question) == ("1", 0, "What is there?")
    assert task.describe()["limit"] == 1
    assert json.dumps(task.describe())
    assert task.image(0).size == (56, 56)
    expected = [block(56, 56, 0, 0, 14, 14), block(56, 56, 0, 0, 28, 28)]
    np.testing.assert_array_equal(task.masks(0), [*expected, block(56, 56, 42, 42, 3, 3)])


def test_images_may_have_been_resized(tmp_path, llava, two_images):
    folder, annotations = two_images
    Image.open(folder / "2.png").resize((224, 112)).save(folder / "2.png")
    task = CoverageTask(folder, annotations, tiny_processor())
    assert task.masks(1).shape == (3, 112, 224)
    records, _ = run(task, llava, tiny_processor(), these((7,)), task.items[1:])
    assert counts(records[0]) == [(0, 0), (0, 1), (1, 1), (1, 2)]


def test_nothing_lies_on_borders_that_the_processor_adds(tmp_path, llava):
    processor = tiny_processor()
    processor.image_processor.do_resize = False  # 40 pixels in the middle of 56
    corner = block(40, 40, 0, 0, 6, 6)
    source = write_coco(tmp_path, [np.zeros((40, 40, 3), np.uint8)], [(1, corner, {})])
    task = CoverageTask(*source, processor)
    for kept, hits in ((0, 1), (3, 0), (12, 0)):
        records, _ = run(task, llava, processor, these((kept,)), task.items)
        assert counts(records[0])[-1] == (hits, 1)


def test_an_image_is_cut_into_cells_once(llava, two_images):
    task = CoverageTask(*two_images, tiny_processor())
    first, prompt = run(task, llava, tiny_processor(), these((0,), (7,)), task.items)
    for path in two_images[0].iterdir():
        path.unlink()
    assert task.look(find_host(llava), prompt, task.items) == first


def test_all_tokens_cover_all_drawn_objects(tmp_path):
    write_scenes(tmp_path, num_train=0, num_val=3, size=96, seed=0)
    vlm, processor = load_model("random:tiny-llava")
    source = tmp_path / "val2017", tmp_path / "annotations/instances_val2017.json"
    task = CoverageTask(*source, processor)
    (full, _), (few, prompt) = (
        run(task, vlm, processor, build_pruner(name, num_keep=keep), task.items)
        for name, keep in (("none", 144), ("random", 9))
    )
    listed = json.loads(source[1].read_text())["annotations"]
    for owner, (record, pruned) in enumerate(zip(full, few, strict=True)):
        num_objects = sum(entry["image_id"] == owner + 1 for entry in listed)
        assert record["coverage/all/hits"] == record["coverage/all/of"] == num_objects
        assert record["cosine"] == pytest.approx(1.0, abs=1e-5)
        assert record["unrestored"] < pruned["unrestored"] < 1
        on = cells_by_loops(task.masks(owner), (12, 12), 8)
        hits = on[:, prompt.selection.keep_indices[owner].numpy()].any(axis=1).sum()
        assert pruned["coverage/all/hits"] == hits < num_objects


def test_photographs_are_cut_as_the_processor_cuts_them(coco_folder, llava):
    images, annotations = (
        coco_folder / "val2017",
        coco_folder / "annotations/instances_val2017.json",
    )
    processor = tiny_processor()
    task = CoverageTask(images, annotations, processor, limit=4)
    records, prompt = run(task, llava, processor, build_pruner("divprune", num_keep=4), task.items)
    transform = ProcessorTransform(processor.image_processor)
    listed = json.loads(annotations.read_text())["annotations"]
    for item, record, keep in zip(task.items, records, prompt.selection.keep_indices, strict=True):
        masks = [transform.instance_map(mask.astype(np.uint8)) for mask in task.masks(item.owner)]
        on = cells_by_loops(torch.stack(masks).bool().numpy(), (4, 4), 14)
        areas = [e["area"] for e in listed if str(e["image_id"]) == item.key and not e["iscrowd"]]
        kept = on[:, keep.numpy()].any(axis=1)
        sizes = {"small": (0, 1024), "medium": (1024, 9216), "large": (9216, 1e9), "all": (0, 1e9)}
        for name, (least, end) in sizes.items():
            mine = [number for number, area in enumerate(areas) if least <= area < end]
            assert record[f"coverage/{name}/of"] == on[mine].any(axis=1).sum()
            assert record[f"coverage/{name}/hits"] == kept[mine].sum()
    assert sum(record["coverage/all/of"] for record in records) > 4


def test_merged_tokens_stand_at_their_anchors(llava, two_images):
    task = CoverageTask(*two_images, tiny_processor())
    pruner = build_pruner("prumerge", num_keep=5)
    _, prompt = run(task, llava, tiny_processor(), pruner, task.items)
    assert prompt.selection.merge is not None
    expected = torch.zeros(2, 16, dtype=torch.bool)
    expected.scatter_(1, prompt.selection.keep_indices, True)
    if prompt.selection.valid is not None:
        expected = torch.zeros(2, 16, dtype=torch.bool)
        for row in range(2):
            own = prompt.selection.keep_indices[row][prompt.selection.valid[row]]
            expected[row, own] = True
    assert kept_cells(find_host(llava), prompt).equal(expected)


@pytest.mark.parametrize("name", ["vprune", "tome"])
def test_tokens_dropped_in_the_tower_are_to_be_restored_too(llava, two_images, name):
    processor = tiny_processor()
    task = CoverageTask(*two_images, processor)
    _, whole = run(task, llava, processor, build_pruner("none", num_keep=16), task.items)
    records, prompt = run(task, llava, processor, build_pruner(name, num_keep=5), task.items)
    host = find_host(llava)
    kept = kept_cells(host, prompt)
    assert kept.sum(dim=1).tolist() == [5, 5]
    assert prompt.encoded.tokens.num_tokens == 5
    there = prompt.encoded.places - torch.tensor([[0], [16]])
    assert kept.equal(torch.zeros_like(kept).scatter(1, there, True))
    features = whole.encoded.tokens.features
    cosines = [record["cosine"] for record in records]
    assert cosines == pytest.approx(nearest_kept(features, kept).tolist(), abs=1e-5)
    assert max(cosines) < 0.999
    left = [record["unrestored"] for record in records]
    assert left == pytest.approx(unrestored(features, kept).tolist(), abs=1e-5)


def test_inside_the_language_model_the_last_layer_counts(llava, two_images):
    processor = tiny_processor()
    task = CoverageTask(*two_images, processor)
    pruner = build_pruner("pyramiddrop", stages=((1, 9), (2, 4)))
    records, prompt = run(task, llava, processor, pruner, task.items)
    stages = prompt.layers.kept
    assert [stage.layer for stage in stages] == [1, 2]
    assert prompt.selection.keep_indices.shape[1] == 16
    kept = kept_cells(find_host(llava), prompt)
    assert kept.equal(torch.zeros_like(kept).scatter(1, stages[-1].places, True))
    assert kept.sum(dim=1).tolist() == [4, 4]
    features = prompt.encoded.tokens.features
    assert records[1]["unrestored"] == pytest.approx(float(unrestored(features, kept)[1]), abs=1e-5)


def test_a_prompt_that_is_still_to_be_read_is_refused(llava, two_images):
    processor = tiny_processor()
    task = CoverageTask(*two_images, processor)
    host, seen = find_host(llava), []
    inputs = processor(images=[task.image(0)], text=["<image>\nwhat"], return_tensors="pt")
    pruner = build_pruner("pyramiddrop", stages=((1, 4),))

    def early(prompt):
        with pytest.raises(ValueError, match="has not read this prompt yet"):
            task.look(host, prompt, task.items[:1])
        seen.append(prompt)

    with attached(llava, pruner, on_prune=early, processor=processor):
        llava(**inputs)
    assert len(seen) == 1


def test_rows_that_are_not_the_items_are_refused(llava, two_images):
    processor = tiny_processor()
    task = CoverageTask(*two_images, processor)
    _, prompt = run(task, llava, processor, these((1,), (2,)), task.items)
    with pytest.raises(ValueError, match="1 items, but the call has 2 images or tiles in 2 rows"):
        task.look(find_host(llava), prompt, task.items[:1])


def test_another_processor_is_refused(llava, two_images):
    task = CoverageTask(*two_images, plain_processor(70))
    with pytest.raises(ValueError, match=r"\(70, 70\) pixels.*one of \(56, 56\)"):
        run(task, llava, tiny_processor(), these((1,)), task.items[:1])


@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
def test_tiles_are_refused(two_images, budget):
    vlm, processor = load_model("random:tiny-llava-next")
    task = CoverageTask(*two_images, processor)
    with pytest.raises(ValueError, match="'llava_next' cuts images into tiles"):
        run(task, vlm, processor, build_pruner("none", num_keep=1), task.items, budget=budget)


def test_grids_of_any_shape_come_one_at_a_time(two_images):
    vlm, processor = load_model("random:tiny-qwen2.5-vl")
    task = CoverageTask(*two_images, processor)
    pruner = build_pruner("none", num_keep=1)
    with pytest.raises(ValueError, match="grids of different shapes.*batch size 1"):
        run(task, vlm, processor, pruner, task.items)
    for item, shape in zip(task.items, [(1, 1), (1, 2)], strict=True):
        records, prompt = run(task, vlm, processor, pruner, [item])
        height, width = prompt.encoded.tokens.grid_hw
        assert width / height == shape[1]
        assert records[0]["coverage/all/hits"] == records[0]["coverage/all/of"] == 3
    for kept, hits in ((0, 2), (3, 1), (4, 2), (5, 0)):  # 2 x 4 cells of 28 pixels
        records, _ = run(task, vlm, processor, these((kept,)), task.items[1:])
        assert counts(records[0])[-1] == (hits, 3)


@pytest.mark.parametrize("name", ["random:tiny-internvl", "random:tiny-qwen3-vl"])
def test_grids_of_one_shape_come_together(tmp_path, name):
    picture = np.zeros((56, 56, 3), np.uint8)
    corners = block(56, 56, 0, 0, 14, 14), block(56, 56, 42, 42, 14, 14)
    source = write_coco(tmp_path, [picture] * 2, [(1, corners[0], {}), (2, corners[1], {})])
    vlm, processor = load_model(name)
    task = CoverageTask(*source, processor)
    _, prompt = run(task, vlm, processor, build_pruner("none", num_keep=1), task.items)
    last = prompt.encoded.tokens.num_tokens - 1
    for rows, hits in (((0,), (0,)), (1, 0)), (((1, last), (0, last)), (0, 1)):
        records, _ = run(task, vlm, processor, these(*rows), task.items)
        assert tuple(record["coverage/all/hits"] for record in records) == hits


def test_a_second_encoding_leaves_no_hooks(llava, two_images):
    processor = tiny_processor()

    def count_hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in llava.modules()]

    before = count_hooks()
    task = CoverageTask(*two_images, processor)
    run(task, llava, processor, build_pruner("tome", num_keep=5), task.items)
    assert count_hooks() == before


@pytest.fixture
def folders(tmp_path):
    """Two folders of scenes whose images have the same numbers, and a file of each."""
    found = []
    for seed in (0, 1):
        write_scenes(tmp_path / str(seed), num_train=1, num_val=2, size=56, seed=seed)
        place = tmp_path / str(seed)
        found.append((place / "val2017", place / "annotations/instances_val2017.json"))
    return list(zip(*found, strict=True))


def test_several_folders_are_one_after_the_other(folders, llava):
    task = CoverageTask(*folders, tiny_processor())
    alone = [CoverageTask(*pair, tiny_processor()) for pair in zip(*folders, strict=True)]
    assert len({item.key for item in task.items}) == 4
    assert [item.owner for item in task.items] == [0, 1, 2, 3]
    assert task.describe()["images"] == [str(folder) for folder in folders[0]]
    assert alone[0].describe()["images"] == str(folders[0][0])
    listed = CoverageTask(folders[0][:1], folders[1][:1], tiny_processor())
    assert listed.describe() == alone[0].describe()
    pruner = build_pruner("uniform", num_keep=3)
    records, _ = run(task, llava, tiny_processor(), pruner, task.items)
    apart = [run(one, llava, tiny_processor(), pruner, one.items)[0] for one in alone]
    for record, own in zip(records, [*apart[0], *apart[1]], strict=True):
        assert record == pytest.approx(own, abs=1e-5)
    assert apart[0] != apart[1]
    assert [counts(r)[-1][1] for r in records] == [len(task.masks(owner)) for owner in range(4)]
    few = CoverageTask(*folders, None, limit=3)
    assert [item.key for item in few.items] == [item.key for item in task.items][:3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((0,), r"images: .*0/val2017, .*1/val2017; annotation files: .*json; pass a file for each"),
        ((0, 1, 1), "pass a file for each folder, in the same order"),
        ((), "annotation files: none; pass a file for each folder"),
    ],
)
def test_folders_and_files_go_in_pairs(folders, files, message):
    with pytest.raises(ValueError, match=message):
        CoverageTask(folders[0], [folders[1][number] for number in files], None)


def test_an_image_counts_once(folders):
    with pytest.raises(ValueError, match="would count twice; pass every image once"):
        CoverageTask([folders[0][0]] * 2, [folders[1][0]] * 2, None)


def test_a_model_s_tokens_need_its_processor(llava, two_images):
    task = CoverageTask(*two_images, None)
    with pytest.raises(ValueError, match="made without a processor"):
        run(task, llava, tiny_processor(), these((0,), (7,)), task.items)
