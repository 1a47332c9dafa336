"""InternVL: what pruners see of its tiles, and logits of prompts pruned by hand."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import IMG, Scripted, assert_close, fingerprint, tower_states
from reference_internvl import (
    BATCH,
    NUM_TOKENS,
    ONE,
    SEVERAL,
    best_cells,
    features,
    make_internvl,
    projected,
    selected,
    shorten_internvl,
    single_internvl,
    units,
    views,
)
from tiny_internvl import tiny_internvl
from tiny_models import IMAGE_TOKEN
from torch import Tensor

import ocvtp
from ocvtp import Needs, Pruner, Selection, VisualTokens, build_pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.prompt.read_call import look

BUDGETS = ["per_image", "per_tile"]
budgets = pytest.mark.parametrize("budget", BUDGETS)
sides = pytest.mark.parametrize("side", ["left", "right"])
pytestmark = [pytest.mark.usefixtures("untouched_internvl"), pytest.mark.sampled(1)]


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=7)


@pytest.fixture(scope="module")
def plain() -> Any:
    """A tower with a norm at its end and none of queries and keys."""
    return tiny_internvl({"use_qk_norm": False, "use_mean_pooling": False})


@pytest.fixture(scope="module")
def inner() -> Any:
    """A model that reads another layer than the last."""
    return tiny_internvl(vision_feature_layer=-2)


def test_a_token_is_the_unit_that_pixel_shuffle_makes(internvl: Any) -> None:
    numbers = torch.arange(64.0).view(1, 8, 8, 1)
    shuffled = internvl.model.pixel_shuffle(numbers, 0.5).view(1, NUM_TOKENS, 4)
    assert shuffled.equal(units(numbers.view(1, 64)))


# ------------------------------------------------------------------------------- what pruners see


def by_hand(model: Any, pixels: Tensor, needs: Needs) -> dict[str, Tensor]:
    """Everything that a pruner may see of the tiles [T, N, ...], from the eager tower."""
    states, attentions = tower_states(model, pixels)
    found = {"features": features(model, pixels), "projected": projected(model, pixels)}
    found |= {f"hidden {i}": units(states[i][:, 1:]).mean(dim=2) for i in needs.hidden}
    for block, kind in needs.attention:
        weights = attentions[block].mean(dim=1)
        rows = weights[:, int(needs.patch_queries) :]
        mean = {"cls": weights[:, 0, 1:], "received": rows.mean(dim=1)[:, 1:]}
        mean["given"] = weights[:, 1:, 1:].mean(dim=2)
        heads = attentions[block][:, :, 0, 1:]
        sharpest = heads.log().std(dim=2).argmax(dim=1)
        mean["cls_sharpest"] = heads[torch.arange(len(heads)), sharpest]
        found[f"{kind} {block}"] = units(mean[kind]).mean(dim=2)
    for block in needs.keys:
        layer = model.model.vision_tower.encoder.layer[block]
        normed = layer.layernorm_before(states[block - (block < 0)])  # the block's input
        keys = layer.attention.k_norm(layer.attention.k_proj(normed))
        queries = layer.attention.q_norm(layer.attention.q_proj(normed))
        found[f"keys {block}"] = units(keys[:, 1:]).mean(dim=2)
        found |= {f"cls_keys {block}": keys[:, 0], f"cls_queries {block}": queries[:, 0]}
    cls = selected(model, pixels)[:, 0]
    return found | {"cls": torch.cat([cls] * 4, dim=1)}


def shown(tokens: VisualTokens) -> dict[str, Tensor | None]:
    found = {"features": tokens.features, "projected": tokens.projected, "cls": tokens.cls}
    for name in ("hidden", "keys", "cls_keys", "cls_queries"):
        found |= {f"{name} {i}": value for i, value in getattr(tokens, name).items()}
    return found | {f"{kind} {b}": value for (b, kind), value in tokens.attention.items()}


@budgets
@pytest.mark.parametrize("name", ["internvl", "plain", "inner"])
@torch.no_grad()
def test_tokens_are_those_of_the_tiles(
    request: pytest.FixtureRequest, name: str, budget: Any
) -> None:
    model, inputs = request.getfixturevalue(name), make_internvl(BATCH)
    kinds = ("received", "given", "cls", "cls_sharpest")
    needs = Needs(
        hidden=(0, 3, -1),
        attention=tuple((block, kind) for block in (1, -2) for kind in kinds),
        keys=(2,),
        cls_queries=(2,),
        cls=True,
        projected=True,
    )
    pruner = Scripted(wants=needs)
    with pruner(model, budget=budget):
        model(**inputs)
    tokens, expected = pruner.seen[0], by_hand(model, inputs["pixel_values"], needs)
    seen, looks = shown(tokens), views(inputs, budget)
    assert seen.keys() >= expected.keys()
    assert tokens.grid_hw == (4, 4)
    assert tokens.num_heads == 4
    assert tokens.batch_size == len(looks)
    assert (tokens.valid is None) == (budget == "per_tile")
    for number, view in enumerate(looks):
        real = torch.arange(tokens.num_tokens) < len(view)
        assert tokens.real[number].equal(real)
        for key in expected:
            value = seen[key]
            assert value is not None
            if key.startswith("cls") and not key.endswith((" 1", " -2")):
                assert_close(value[number], expected[key][view[-1][0]])  # of the thumbnail
            else:
                by_cell = torch.stack([expected[key][cell] for cell in view])
                assert_close(value[number][real], by_cell, 1e-6)


def test_images_of_one_size_are_not_padded(internvl: Any) -> None:
    pruner = Scripted()
    with torch.no_grad(), pruner(internvl):
        internvl(**make_internvl(SEVERAL, tiles=[3]))
    assert pruner.seen[0].valid is None
    assert pruner.seen[0].features.shape == (3, 48, 128)


def test_shown_tokens_are_finite(internvl: Any) -> None:
    """Padding too: methods multiply it with 0."""
    needs = Needs(projected=True, cls=True, attention=((-2, "cls"),), hidden=(1,))
    pruner = Scripted(wants=needs)
    with torch.no_grad(), pruner(internvl):
        internvl(**make_internvl(BATCH))
    tokens = pruner.seen[0]
    tokens.map(lambda t: t.isfinite().all() or pytest.fail("not finite"))


# ----------------------------------------------------------------------------------------- logits


@torch.no_grad()
@budgets
@pytest.mark.parametrize("rows", [ONE, SEVERAL, BATCH], ids=["one", "several", "batch"])
@pytest.mark.parametrize("name", ["internvl", "plain", "inner"])
def test_keeping_all_is_bit_exact(
    request: pytest.FixtureRequest, name: str, rows: Any, budget: Any
) -> None:
    model, inputs = request.getfixturevalue(name), make_internvl(rows)
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    logits, answer = model(**inputs).logits, model.generate(**inputs, **settings)
    with build_pruner("none")(model, budget=budget):
        assert torch.equal(model(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **settings), answer)


@torch.no_grad()
@budgets
@sides
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_logits_are_those_of_prompts_made_by_hand(
    internvl: Any, pruner: Pruner, budget: Any, side: Any, positions: Any
) -> None:
    inputs = make_internvl(BATCH, side)
    kept = best_cells(internvl, inputs, 7, budget)
    short = shorten_internvl(internvl, inputs, kept, side)
    with pruner(internvl, budget=budget, positions=positions):
        logits = internvl(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits(short.positions(positions))[real], 1e-5)


@torch.no_grad()
@budgets
@sides
def test_a_batch_equals_single_calls(internvl: Any, pruner: Pruner, budget: Any, side: Any) -> None:
    inputs, prompts = make_internvl(BATCH, side), list[Any]()
    with pruner(internvl, budget=budget, on_prune=prompts.append):
        together = internvl(**inputs).logits
        for row in range(3):
            alone = internvl(**single_internvl(inputs, row)).logits[0]
            assert_close(together[row, prompts[0].short_mask[row]], alone, 1e-5)


@torch.no_grad()
@budgets
@sides
def test_mixed_tokens_stand_in_the_places_of_their_anchors(
    internvl: Any, budget: Any, side: Any
) -> None:
    """Rows of any weights, some of them padding."""
    inputs = make_internvl(BATCH, side)
    looks, num = views(inputs, budget), 3
    most = max(map(len, looks))
    states = features(internvl, inputs["pixel_values"])
    cls = selected(internvl, inputs["pixel_values"])[:, 0].repeat(1, 4)
    rows = projected(internvl, inputs["pixel_values"])
    random = torch.Generator().manual_seed(1)
    merge = torch.rand(len(looks), num, 1 + most, generator=random)
    valid = torch.ones(len(looks), num, dtype=torch.bool)
    valid[::2, -1] = False
    anchors, kept = torch.zeros_like(valid).long(), []
    for number, view in enumerate(looks):
        anchors[number] = torch.randperm(len(view), generator=random)[:num]
        merge[number, :, 1 + len(view) :] = 0
        for row in range(int(valid[number].sum())):
            mixed = merge[number, row, 0] * cls[view[-1][0]]
            for k, cell in enumerate(view):
                mixed = mixed + merge[number, row, 1 + k] * states[cell]
            cell = view[int(anchors[number, row])]
            rows[cell] = internvl.model.multi_modal_projector(mixed)
            kept.append(cell)
    late = anchors + most * ~valid
    selection = Selection(late.sort(dim=1).values % most, valid, merge, anchors)
    short = shorten_internvl(internvl, inputs, kept, side, rows)
    pruner = Scripted(wants=Needs(cls=True), choose=lambda tokens: selection)
    with pruner(internvl, budget=budget):
        logits = internvl(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


@pytest.mark.parametrize(
    ("rows", "side"),
    [([(3, IMG, IMG, 2)], "left"), ([(2, IMG, 40), (34, IMG)], "right")],
    ids=["side_by_side", "where_another_row_stopped"],
)
def test_images_next_to_each_other_are_told_apart(internvl: Any, rows: Any, side: Any) -> None:
    inputs, pruner = make_internvl(rows, side, tiles=[2, 3]), Scripted()
    with torch.no_grad(), pruner(internvl):
        internvl(**inputs)
    assert pruner.seen[0].real.sum(dim=1).tolist() == [32, 48]


# -------------------------------------------------------------------------- attaching and refusals


def test_removing_leaves_the_model_as_it_was(internvl: Any, pruner: Pruner) -> None:
    inputs = make_internvl(BATCH)
    settings = {"max_new_tokens": 2, "do_sample": False}
    before = fingerprint(internvl)
    with torch.no_grad():
        logits = internvl(**inputs).logits
        handle = ocvtp.attach(internvl, pruner, budget="per_tile")
        assert not torch.equal(internvl(**inputs).logits[:, -1], logits[:, -1])
        internvl.generate(**inputs, **settings)
        handle.remove()
        assert fingerprint(internvl) == before
        assert torch.equal(internvl(**inputs).logits, logits)


def cut(inputs: Any, columns: slice) -> Any:
    ids = inputs["input_ids"][:, columns]
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a placeholder short": (lambda i: cut(i, slice(8, None)), "47 image placeholders, .* give 48"),
    "not whole tiles": (
        lambda i: (
            i
            | {
                "input_ids": torch.cat(
                    [i["input_ids"][:, 1:11], i["input_ids"][:, :1], i["input_ids"][:, 11:]], dim=1
                )
            }
        ),
        r"has \[4, 44\] image placeholders in a row, but each tile .* gives 16 tokens; make both",
    ),
    "with the CLS": (
        lambda i: i | {"vision_feature_select_strategy": "full"},
        "strategy='full' does not .*; pass 'default'",
    ),
    "oblong tiles": (
        lambda i: i | {"pixel_values": torch.zeros(3, 3, 28, 112)},
        "a tile of 4 x 16 patches is no square of units of 2 x 2",
    ),
    "odd tiles": (
        lambda i: i | {"pixel_values": torch.zeros(3, 3, 63, 63)},
        "a tile of 9 x 9 patches is no square of units of 2 x 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_are_refused(internvl: Any, pruner: Pruner, name: str) -> None:
    change, message = REFUSED[name]
    with torch.no_grad(), pruner(internvl), pytest.raises(ValueError, match=message):
        internvl(**change(make_internvl(ONE)))


def test_pruners_that_are_refused(internvl: Any) -> None:
    with pytest.raises(ValueError, match="InternVL are not; use a pruner that reads the language"):
        ocvtp.attach(internvl, Scripted(wants=Needs(clip=True)))
    for needs in (Needs(hidden=(5,)), Needs(keys=(4,)), Needs(attention=((-5, "cls"),))):
        with pytest.raises(ValueError, match="does not exist in this tower; pass -"):
            ocvtp.attach(internvl, Scripted(wants=needs))


def test_other_towers_are_refused(internvl: Any) -> None:
    model = deepcopy(internvl)
    model.model.vision_tower.config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match="siglip_vision_model tower; .* after internvl_vision"):
        find_host(model)


def test_the_host_describes_itself(internvl: Any) -> None:
    found = find_host(internvl).describe()
    assert found["budget"] == "per_image"
    assert "separators" not in found  # there are none


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 3, 4, 6, 12])
def test_tiles_of_a_blank_image_are_drawn_nearest_to_a_square(internvl: Any, count: int) -> None:
    inputs = make_internvl([(2, IMG, 3)], tiles=[count + 1])
    inputs["pixel_values"][:] = 0.3
    host = find_host(internvl)
    hooks = host.install(Needs())
    encoded = look(host, Needs(), inputs).encoded
    for hook in hooks:
        hook.remove()
    rows, columns = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 12: (3, 4)}[count]
    assert host.grids(encoded) == ((4, 4), (rows * 4, columns * 4))


@torch.no_grad()
@budgets
def test_tiles_of_one_arrangement_are_drawn(internvl: Any, budget: Any) -> None:
    """Cells of the thumbnail come first, then those of all tiles put together."""
    random = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (2, 1), (1, 3), (2, 3), (3, 2)):
        whole = torch.rand(3, rows * 56, columns * 56, generator=random).cumsum(dim=1)
        tiles = [part for line in whole.split(56, dim=1) for part in line.split(56, dim=2)]
        if len(tiles) > 1:
            tiles.append(torch.nn.functional.interpolate(whole[None], (56, 56), mode="area")[0])
        inputs = make_internvl([(2, IMG, IMG, 3)], tiles=[len(tiles), 2])
        inputs["pixel_values"][: len(tiles)] = torch.stack(tiles)
        host = find_host(internvl, Tiling(budget))
        hooks = host.install(Needs())
        encoded = look(host, Needs(), inputs).encoded
        for hook in hooks:
            hook.remove()
        grids = ((4, 4),) if len(tiles) == 1 else ((4, 4), (rows * 4, columns * 4))
        assert host.grids(encoded) == grids
        cells = host.cells(encoded)
        found = dict[int, Tensor]()
        for view, own in zip(views(inputs, budget), cells, strict=True):
            for (tile, token), cell in zip(view, own.tolist(), strict=False):
                assert (cell == -1) == (tile >= len(tiles))
                y, x = divmod(token, 4)
                found[cell] = inputs["pixel_values"][tile][:, y * 14 : y * 14 + 14, x * 14 :][
                    ..., :14
                ]
        drawn = [tiles[-1]] if len(tiles) == 1 else [tiles[-1], whole]
        number = 0
        for picture in drawn:
            for line in picture.split(14, dim=1):
                for part in line.split(14, dim=2):
                    assert part.equal(found[number])
                    number += 1
        assert (cells >= 0).sum() == number
        alone = {"pixel_values": inputs["pixel_values"][: len(tiles)]}
        assert host.picture(alone).equal(tiles[-1])
