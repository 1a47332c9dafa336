"""Where tokens are in an image, and the positions that a decoder learns for these places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ocvtp.slots.positions import PositionEmbedding, token_places


def test_places_are_the_centres_of_the_cells_of_each_view():
    grids = torch.tensor([[[2, 2], [1, 3]], [[3, 1], [0, 0]]])
    places, view = token_places(grids, 8)
    own = [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)]
    own += [(0.5, 1 / 6), (0.5, 0.5), (0.5, 5 / 6)]
    assert_close(places[0, :7], torch.tensor(own))
    assert_close(places[1, :3], torch.tensor([(1 / 6, 0.5), (0.5, 0.5), (5 / 6, 0.5)]))
    assert view[0, :7].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert view[1, :3].tolist() == [0, 0, 0]


def test_the_stored_grid_is_used_as_it_is():
    embedding = PositionEmbedding(6, (4, 5))
    assert_close(embedding((4, 5)), embedding.weight, rtol=0, atol=0)
    assert_close(embedding(torch.tensor([[[4, 5]]]), 20), embedding.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(3, 7), (8, 10), (1, 1), (4, 9)])
def test_other_grids_are_bicubic_interpolations(grid):
    embedding = PositionEmbedding(6, (4, 5))
    stored = embedding.weight.unflatten(1, (4, 5)).permute(0, 3, 1, 2)
    expected = F.interpolate(stored, size=grid, mode="bicubic", align_corners=False)
    assert_close(embedding(grid), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_padded_image_has_the_positions_that_it_has_alone():
    embedding = PositionEmbedding(6, (4, 5))
    together = embedding(torch.tensor([[[3, 7]], [[5, 2]]]), 21)
    assert together.shape == (2, 21, 6)
    assert_close(together[:1], embedding((3, 7)), rtol=1e-5, atol=1e-6)
    assert_close(together[1:, :10], embedding((5, 2)), rtol=1e-5, atol=1e-6)
    assert together.isfinite().all()


def test_each_view_has_a_table_of_its_own():
    embedding = PositionEmbedding(6, (4, 5), num_views=2)
    fine = PositionEmbedding(6, (4, 5))
    with torch.no_grad():
        fine.weight.copy_(embedding.weight[1:])
    found = embedding(torch.tensor([[[4, 5], [6, 3]], [[4, 5], [0, 0]]]), 38)
    assert_close(found[0, :20], embedding.weight[0], rtol=1e-5, atol=1e-6)
    assert_close(found[0, 20:], fine((6, 3))[0], rtol=1e-5, atol=1e-6)
    assert_close(found[1, :20], embedding((4, 5))[0], rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert (embedding.weight.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_more_views_than_tables_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2, 2\].* at most 1 views"):
        PositionEmbedding(6, (4, 5))(torch.ones(1, 2, 2).long(), 2)
