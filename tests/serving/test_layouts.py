"""Places that a server reserves are those that transformers' own processors count; no server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_vision
from tiny_next import PINPOINTS, tiny_next_processor
from tiny_onevision import PINPOINTS as ONEVISION_PINPOINTS
from tiny_onevision import tiny_onevision_processor

import ocvtp
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.registry import find_host
from ocvtp.ops.token_views import seen_of_tiles
from ocvtp.serving.kept_rows import TiledImage, tiled_rows
from ocvtp.serving.plan import layout_of, read_plan
from ocvtp.structures import Needs

SIZES = [(56, 112), (112, 56), (30, 200), (200, 33), (112, 112), (7, 9), (224, 200), (57, 56)]
"""Heights and widths: whole tiles, portrait, landscape, tiny, and some that unpadding cuts."""


def config(kind: str, **changes: Any) -> Any:
    tower, strategy = ("clip", "default") if kind != "llava_onevision" else ("siglip", "full")
    text = SimpleNamespace(hidden_size=48, num_hidden_layers=3)
    given = {"model_type": kind, "vision_config": tiny_vision(tower), "vision_feature_layer": -2}
    given |= {"vision_feature_select_strategy": strategy, "image_grid_pinpoints": PINPOINTS}
    if kind == "llava_onevision":
        given |= {
            "vision_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
        }
    return SimpleNamespace(get_text_config=lambda: text, **given | changes)


@pytest.mark.parametrize(
    ("kind", "make"),
    [("llava_next", tiny_next_processor), ("llava_onevision", tiny_onevision_processor)],
)
def test_rows_of_an_image_are_as_many_as_the_processor_says(kind, make):
    processor = make()
    layout = layout_of(config(kind), Tiling(separators="all"))
    counted = processor._get_num_multimodal_tokens(image_sizes=SIZES).num_image_tokens
    shapes = [layout.shape(size) for size in SIZES]
    assert [shape.num_tokens + shape.ends for shape in shapes] == counted
    per_tile = layout_of(config(kind), Tiling("per_tile", "none"))
    for size, shape in zip(SIZES, shapes, strict=True):
        if not shape.is_resized:
            tiles = per_tile.shape(size)
            assert (sum(tiles.views), tiles.ends) == (shape.num_tokens, 0)
            assert max(tiles.views) <= 16 < shape.num_tokens


def test_the_largest_image_is_one_that_the_pruner_can_choose_from():
    layout = layout_of(config("llava_onevision"), Tiling(separators="all"))
    small, large = (ocvtp.build_pruner(name, num_keep=4) for name in ("visiondrop", "divprune"))
    assert layout.largest(small) == (112, 112)
    assert layout.shape(layout.largest(large)).is_resized
    everywhere = config("llava_onevision", image_grid_pinpoints=[[224, 224]])
    with pytest.raises(ValueError, match=r"reads attention.*pass a smaller image"):
        layout_of(everywhere).largest(small)


def test_an_internvls_tiles_are_one_image_or_many():
    vision = SimpleNamespace(model_type="internvl_vision", image_size=[56, 56], patch_size=[7, 7])
    vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads = 4, 32, 4
    given = {"model_type": "internvl", "vision_config": vision, "downsample_ratio": 0.5}
    text = SimpleNamespace(hidden_size=48, num_hidden_layers=3)
    own = SimpleNamespace(vision_feature_layer=-1, get_text_config=lambda: text, **given)
    assert layout_of(own).shape(5).views == (80,)
    assert layout_of(own, Tiling("per_tile")).shape(5).views == (16,) * 5
    assert layout_of(own).widths["features"] == 128
    own.vision_feature_layer = -2
    with pytest.raises(ValueError, match="vision_feature_layer=-2.*vLLM reads the last"):
        layout_of(own)


def test_newlines_whose_number_is_not_known_are_refused():
    settings = {"pruner": "divprune", "num_keep": 4, "separators": "rows"}
    with pytest.raises(ValueError, match="before it knows these; pass 'all' or 'none'"):
        read_plan(config("llava_next"), settings)


@pytest.mark.parametrize(
    ("spec", "tiling"),
    [
        ("visionzip", {"separators": "all"}),
        ("fastervlm", {"separators": "none"}),
        ("visionzip", {"separators": "all", "budget": "per_tile"}),
    ],
)
def test_rows_are_those_of_transformers(llava_next, spec, tiling):
    """Of what the tower gave, the rows that a server puts into the prompt are `attach`'s."""
    sizes = [(56, 112), (112, 112), (30, 200)]
    torch.manual_seed(0)
    layout = layout_of(llava_next.config)
    maps = [layout.token_map(size) for size in sizes]
    counts = [sum(one.num_tiles) for one in maps]
    pixels = torch.randn(3, max(counts), 3, 56, 56)
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    ids = torch.full((1, sum(len(one.source) for one in maps) + 2), 100)
    ids[0, 0] = ids[0, -1] = 5
    settings = {"pruner": spec, "num_keep": 5, **tiling}
    plan, seen = read_plan(llava_next.config, settings), []
    handle = ocvtp.attach(llava_next, plan.pruner, on_prune=seen.append, **tiling)
    with torch.inference_mode():
        llava_next(input_ids=ids, **inputs)
        found = found_by(llava_next, handle, inputs, plan.pruner.needs)
        handle.remove()
        firsts = [0, counts[0], sum(counts[:2])]
        asked = [plan.asked(plan.layout.shape(size), plan.budget) for size in sizes]
        images = [TiledImage(*image) for image in zip(maps, asked, firsts, strict=True)]
        inner = llava_next.model
        rows = tiled_rows(plan, found, images, inner.multi_modal_projector, inner.image_newline)
    for own, shape, image in zip(rows, map(plan.layout.shape, sizes), images, strict=True):
        assert len(own) == shape.num_rows(image.asked)
    [prompt] = seen
    expected = prompt.embeddings[0][prompt.short_ids[0] == 100]
    torch.testing.assert_close(torch.cat(rows), expected, rtol=0, atol=1e-5)


def found_by(model: Any, handle: Any, inputs: Any, needs: Needs) -> dict[str, Any]:
    """What the tower gives of all tiles, with the hooks of a pruner in place."""
    host = find_host(model)
    _, found, _ = host._look_inside(dict(inputs), needs)
    everything = torch.arange(found["features"][:, :, 0].numel()).view(len(found["features"]), -1)
    return seen_of_tiles(found, everything, torch.arange(len(everything)))
