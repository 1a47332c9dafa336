"""How a server turns images into rows of Qwen-VL, as its host in transformers does."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen import FAMILIES

from ocvtp.hosts import find_host
from ocvtp.hosts.loading import load_config
from ocvtp.serving.packed_tower import batches
from ocvtp.serving.plan import alternatives, read_plan

GRIDS = [(4, 4), (3, 5), (6, 2)]


@pytest.fixture(scope="module", params=FAMILIES)
def host(request):
    return find_host(FAMILIES[request.param]())


def plan(host, **settings):
    return read_plan(host.model.config, settings)


def test_places_and_segments_are_those_of_the_tower(host):
    layout = plan(host, pruner="divprune", num_keep=3).layout
    for block in range(host.num_tower_blocks):
        sizes = [size for grid in GRIDS for size in host.segments(block, grid)]
        assert layout.ends(block, GRIDS).diff().tolist() == sizes
    patches = torch.arange(4 * sum(rows * columns for rows, columns in GRIDS)).float()
    in_order = host._places(GRIDS).argsort()
    run = patches.unflatten(0, (-1, 4))[in_order].flatten()  # as the tower runs them
    means = patches.unflatten(0, (-1, 4)).mean(dim=1)
    found = layout.units(GRIDS).raster(run)
    for own, expected in zip(found, means.split([16, 15, 12]), strict=True):
        assert torch.equal(own[: len(expected)], expected)


def test_a_random_qwen3_says_how_it_turns():
    """As published ones do: a server reads it there, transformers knows it."""
    text = load_config("random:tiny-qwen3-vl").text_config
    assert text.rope_parameters["mrope_interleaved"] is True
    assert sum(text.rope_parameters["mrope_section"]) == text.head_dim // 2


def test_what_is_asked_of_images_of_any_size(host):
    served = plan(host, pruner="divprune", num_keep=12)
    budget = served.budget
    shapes = [served.layout.shape([1, 2 * rows, 2 * columns]) for rows, columns in GRIDS]
    assert [shape.num_rows(served.asked(shape, budget)) for shape in shapes] == [12, 12, 12]
    share = served.of_request({"keep_ratio": 0.5})
    assert [shape.num_rows(served.asked(shape, share)) for shape in shapes] == [8, 8, 6]
    many = served.of_request({"num_keep": 15})
    assert [shape.num_rows(served.asked(shape, many)) for shape in shapes] == [15, 15, 12]


def test_pruners_that_read_a_cls_are_not_served(host):
    names = alternatives(plan(host, pruner="divprune", num_keep=3).layout)
    assert {"divprune", "fopru", "uniform"} <= set(names)
    assert not {"fastervlm", "trim", "fastv"} & set(names)
    with pytest.raises(ValueError, match="CLS"):
        plan(host, pruner="fastervlm", num_keep=3)


def test_blocks_are_those_of_the_whole_tower(host):
    depth = host.num_tower_blocks
    served = plan(host, pruner=f"visionzip:guidance=received,block={depth - 1}", num_keep=3)
    assert served.tower.block(-1) == depth - 1
    with pytest.raises(ValueError, match="does not exist"):
        plan(host, pruner=f"visionzip:guidance=received,block={depth}", num_keep=3)


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([5, 5, 5], 10, [(0, 2), (2, 3)]),
        ([50, 5, 5], 10, [(0, 1), (1, 3)]),
        ([5, 50, 5], 10, [(0, 1), (1, 2), (2, 3)]),
        ([5, 5], 100, [(0, 2)]),
        ([], 10, []),
    ],
)
def test_a_run_of_the_tower_has_no_more_tokens_than_an_unpruned_engine_gives_it(
    sizes, most, expected
):
    assert [(own.start, own.stop) for own in batches(sizes, most)] == expected
