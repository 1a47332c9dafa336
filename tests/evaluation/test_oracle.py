"""The oracle keeps what lies on objects, each of them before any a second time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ocvtp.evaluation.oracle import Oracle, object_first, on_cells
from ocvtp.structures import VisualTokens


def squares(*boxes: tuple[int, int, int], size: int = 32) -> np.ndarray:
    """Masks [O, size, size] of squares at x, y with a side."""
    seen = np.zeros((len(boxes), size, size), bool)
    for mask, (x, y, side) in zip(seen, boxes, strict=True):
        mask[y : y + side, x : x + side] = True
    return seen


def test_cells_are_covered_in_part():
    cover = on_cells(squares((0, 0, 12), (16, 8, 4)), (4, 4))
    expected = np.zeros((2, 16))
    expected[0, [0, 1, 4, 5]] = 1, 0.5, 0.5, 0.25
    expected[1, 6] = 0.25
    np.testing.assert_allclose(cover, expected)


def test_pixels_beyond_the_last_cell_are_no_ones():
    assert on_cells(squares((32, 32, 2), size=34), (4, 4)).sum() == 0


def test_every_object_has_a_token_before_any_has_two():
    seen = squares((0, 0, 16), (24, 0, 8), (17, 25, 2))  # four cells, one, and a sixteenth of one
    order = np.argsort(-object_first(on_cells(seen, (4, 4))))
    assert {3, 14} < set(order[:3])
    assert set(order[:3]) & {0, 1, 4, 5}
    assert set(order[:6]) == {0, 1, 4, 5, 3, 14}


def test_the_fullest_cell_of_an_object_goes_first():
    cover = np.zeros((1, 5))
    cover[0] = 0.3, 1.0, 0.5, 0.1, 0.0
    assert np.argsort(-object_first(cover))[:3].tolist() == [1, 2, 0]


def test_an_image_without_objects_is_background():
    scores = object_first(on_cells(np.zeros((0, 32, 32), bool), (4, 4)))
    assert scores.shape == (16,)
    assert len(set(scores)) == 16


@pytest.mark.parametrize("num_keep", [1, 3, 16])
def test_it_prunes_each_image_by_its_own_objects(num_keep):
    seen = [squares((0, 0, 8)), squares((24, 24, 8))]
    pruner = Oracle(num_keep=num_keep, seen=seen)
    keep = pruner.select(VisualTokens(torch.zeros(2, 16, 3), grid_hw=(4, 4))).keep_indices
    assert keep.shape == (2, num_keep)
    assert 0 in keep[0].tolist()
    assert 15 in keep[1].tolist()
