"""Masks of annotations, against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as rle

from ocvtp.data.masks import has_mask, read_mask

H, W = 11, 7


def compressed(mask):
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode()}


def uncompressed(mask):
    """Run lengths by loops."""
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def test_run_lengths_come_back():
    random = np.random.default_rng(0)
    for share in np.linspace(0, 1, 101):
        height, width = random.integers(1, 256), random.integers(1, 6)
        drawn = random.random((height, width)) < share
        mask = np.repeat(drawn, 3, axis=0)[:height]
        for code in (compressed(mask), uncompressed(mask)):
            read = read_mask(code, height, width)
            assert read.dtype == bool
            np.testing.assert_array_equal(read, mask)


def test_long_runs_come_back():
    mask = np.zeros((2000, 900), bool)
    mask[5:7, 100] = mask[1999, 899] = mask[300:, 400:600] = True
    np.testing.assert_array_equal(read_mask(compressed(mask), 2000, 900), mask)


def test_polygons_are_drawn_as_pycocotools_draws_them():
    polygons = [[1, 1, 5.5, 1, 5, 8.25], [0, 9, 6, 9, 6, 10, 0, 10], []]
    expected = rle.decode(rle.merge(rle.frPyObjects(polygons[:2], H, W)))
    read = read_mask(polygons, H, W)
    assert read.dtype == bool
    assert read.sum() > 20
    np.testing.assert_array_equal(read, expected)


def test_a_polygon_may_reach_out_of_the_image():
    assert read_mask([[-50, -50, 50, -50, 50, 50, -50, 50]], H, W).all()


RUNS = uncompressed(np.eye(H, W, dtype=bool))
BAD = {
    "three points or more": [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[[1, 2], [3, 4], [5, 6]]]],
    "list of lists": [[1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, 6], "7"]],
    "something else than numbers": [[[1, 2, "x", 4, 5, 6]], [[1, 2, {}, 4, 5, 6]]],
    "far outside of the image": [[[0, 0, 5, 0, 5, 1e9]], [[0, 0, 5, float("nan"), 5, 5]]],
    "its size is": [{**RUNS, "size": [W, H]}, {"counts": [1]}, {**RUNS, "size": "no"}],
    "its counts are 77 pixels": [],
    "its counts are 76 pixels": [{**RUNS, "counts": [76]}],
    "its counts are": [
        *({**RUNS, "counts": counts} for counts in (None, 3, [1.5], [True], [-1, 78], ["1"])),
        *({**RUNS, "counts": text} for text in ("", "[1, 2]", "é")),
    ],
    "ends inside of a number": [{**RUNS, "counts": compressed(np.eye(H, W))["counts"] + "P"}],
    "segmentation is": ["all", 7, True],
}


@pytest.mark.parametrize(("found", "bad"), [(found, bad) for found in BAD for bad in BAD[found]])
def test_what_is_no_mask_is_refused(found, bad):
    with pytest.raises(ValueError, match=found):
        read_mask(bad, H, W)


def test_truncated_runs_are_refused():
    code = compressed(np.random.default_rng(0).random((H, W)) < 0.5)
    for end in range(len(code["counts"])):
        with pytest.raises(ValueError, match="its counts are"):
            read_mask({**code, "counts": code["counts"][:end]}, H, W)


def test_boxes_alone_are_no_mask():
    assert not any(has_mask(nothing) for nothing in ([], [[]], [[], []], {}, None))
    assert all(has_mask(something) for something in ([[1]], [1], {"size": 1}, "x"))
