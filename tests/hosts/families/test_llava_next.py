"""LLaVA-NeXT: the map of its tokens, what pruners see, and logits of prompts pruned by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import IMG, Scripted, assert_close, fingerprint, tower_states
from reference_next import (
    BATCH,
    NUM_TOKENS,
    ONE,
    SEVERAL,
    SIZES,
    best_cells,
    cells,
    lines,
    make_next,
    num_tiles,
    projected_tiles,
    shorten_next,
    single_next,
    sizes_of,
    split_tiles,
    tiles_of,
    views,
)
from reference_tower import queries_and_keys
from tiny_models import IMAGE_TOKEN
from tiny_next import tiny_next, tiny_next_processor

import ocvtp
from ocvtp import Needs, Pruner, Selection, VisualTokens, build_pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.base import Tiling

BUDGETS = ["per_image", "per_tile"]
SEPARATORS = ["rows", "all", "none"]
pytestmark = [pytest.mark.usefixtures("untouched_next"), pytest.mark.sampled(1)]
ODD = [(1, 1), (7, 300), (300, 7), (56, 112), (97, 89), (113, 57), (336, 335), (31, 64)]


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=7)


def first_real(tokens: VisualTokens) -> Selection:
    if tokens.valid is None:
        return Selection(torch.zeros(tokens.batch_size, 1).long())
    return Selection(tokens.valid.int().argmax(dim=1, keepdim=True))


# ----------------------------------------------------------------------------------- the token map


@pytest.mark.sampled(4)
@torch.no_grad()
@pytest.mark.parametrize("size", [*SIZES, *ODD], ids=str)
def test_every_row_is_the_token_that_the_map_says(llava_next: Any, size: tuple[int, int]) -> None:
    inputs = make_next([(3, IMG, 2)], sizes=[size])
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    packed = llava_next.model.get_image_features(**images, return_dict=True).pooler_output[0]
    token_map = find_host(llava_next)._token_map(images, NUM_TOKENS)
    assert token_map.num_tiles == [num_tiles(size)]
    assert token_map.lengths == [len(packed)]
    tokens = projected_tiles(llava_next, inputs)[0].flatten(0, 1)
    for row, number, line in zip(packed, token_map.source, token_map.line, strict=True):
        if number < 0:
            assert torch.equal(row, llava_next.model.image_newline)
        else:
            assert_close(row, tokens[number])
        assert (line == -1) == (0 <= number < NUM_TOKENS)
    by_hand = [tile * NUM_TOKENS + token for tile, token in cells(size)]
    assert token_map.source[token_map.source >= 0].tolist() == by_hand
    ends = (token_map.source < 0).nonzero()[:, 0]
    assert token_map.line[ends].tolist() == list(range(len(lines(size))))
    for number, line in enumerate(lines(size)):
        where = (token_map.line == number).nonzero()[:, 0]
        assert len(where) == len(line) + 1
        assert where[-1] == ends[number]


def test_maps_of_several_images_lie_side_by_side(llava_next: Any) -> None:
    inputs = make_next(SEVERAL)
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    host = find_host(llava_next)
    together, shift, line = host._token_map(images, NUM_TOKENS), 0, 0
    sources, numbers = [], []
    for i in range(3):
        alone = host._token_map({name: value[i : i + 1] for name, value in images.items()}, 16)
        sources.append(torch.where(alone.source < 0, -1, alone.source + shift))
        numbers.append(torch.where(alone.line < 0, -1, alone.line + line))
        shift += alone.num_tiles[0] * NUM_TOKENS
        line += int(alone.line.max()) + 1
    assert together.source.equal(torch.cat(sources))
    assert together.line.equal(torch.cat(numbers))


def test_a_tile_of_padding_only_is_not_shown() -> None:
    """A wide image on a tall grid: the first and the last tile are unpadded away."""
    model = tiny_next(image_grid_pinpoints=[[168, 56]])
    random = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 5] + [IMAGE_TOKEN] * (16 + 2 * 5) + [7]])
    inputs = {"input_ids": ids, "image_sizes": torch.tensor([[50, 100]])}
    inputs["pixel_values"] = torch.randn(1, 4, 3, 56, 56, generator=random)
    pruner = Scripted(choose=lambda tokens: Selection(torch.tensor([[2], [4]])))
    with torch.no_grad(), pruner(model, budget="per_tile"):
        model(**inputs)
    assert pruner.seen[0].valid.tolist() == [
        [True] * 16,
        [False] * 4 + [True] * 8 + [False] * 4,
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 112), (97, 89), (31, 64), (300, 7)], ids=str)
def test_tiles_are_drawn_where_the_whole_image_is(llava_next: Any, size: tuple[int, int]) -> None:
    """A token's cell is the same whether its tile is shown alone or with the others."""
    inputs = make_next([(3, IMG, 2), (IMG, 5)], sizes=[size, (64, 64)])
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    found = {}
    for budget in BUDGETS:
        host = find_host(llava_next, Tiling(budget))
        hooks = host.install(Needs(projected=True))
        encoded = host.encode(images, Needs(projected=True))
        for hook in hooks:
            hook.remove()
        cells = host.cells(encoded)
        mine = cells >= 0
        found[budget] = dict(zip(cells[mine].tolist(), encoded.tokens.projected[mine], strict=True))
        assert len(found[budget]) == sum(h * w for h, w in host.grids(encoded))
    whole, tiles = found["per_image"], found["per_tile"]
    assert sorted(whole) == sorted(tiles) == list(range(len(whole)))
    assert all(whole[cell].equal(tiles[cell]) for cell in whole)


# ------------------------------------------------------------------------------- what pruners see


@pytest.fixture(scope="module", params=["clip", "siglip", "dinov2", "dinov3_vit"])
def model(request: pytest.FixtureRequest) -> Any:
    names = {"clip": "llava_next", "siglip": "llava_next_siglip"}
    if (name := names.get(request.param)) is not None:
        return request.getfixturevalue(name)
    return tiny_next(request.param, registers=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("budget", BUDGETS)
@torch.no_grad()
def test_tokens_are_those_of_the_tiles(model: Any, budget: Any) -> None:
    first = int(model.config.vision_feature_select_strategy == "default")
    kinds = ("received", "given", "cls")[: 2 + first]
    needs = Needs(
        hidden=(0, 3, -1),
        attention=tuple((block, kind) for block in (1, -2) for kind in kinds),
        keys=(2,),
        cls=bool(first),
        projected=True,
    )
    pruner, inputs = Scripted(wants=needs, choose=first_real), make_next(BATCH)
    with pruner(model, budget=budget):
        model(**inputs)
    tokens = pruner.seen[0]
    _, attentions = tower_states(model, tiles_of(inputs))
    states = model.model.vision_tower(tiles_of(inputs), output_hidden_states=True).hidden_states
    _, keys = queries_and_keys(model.model.vision_tower, 2, states[2])
    tiled = {"features": states[-2], "keys": keys}
    tiled |= {f"hidden {i}": states[i] for i in needs.hidden}
    shown = {"features": tokens.features, "keys": tokens.keys[2]}
    shown |= {f"hidden {i}": tokens.hidden[i] for i in needs.hidden}
    for block, kind in needs.attention:
        weights = attentions[block].mean(dim=1)
        mean = {"received": weights.mean(1), "given": weights[:, :, first:].mean(2)}
        tiled[f"{kind} {block}"] = mean[kind] if kind != "cls" else weights[:, 0]
        shown[f"{kind} {block}"] = tokens.attention[block, kind]
    assert tokens.grid_hw == (4, 4)
    by_image = {name: split_tiles(value[:, first:], inputs) for name, value in tiled.items()}
    by_image["projected"] = projected_tiles(model, inputs)
    shown["projected"] = tokens.projected
    number = 0
    for image, size in enumerate(sizes_of(inputs)):
        for view in views(size, budget):
            assert tokens.valid is not None
            real = tokens.valid[number]
            where = [cell[1] for cell in view] if budget == "per_tile" else list(range(len(view)))
            assert real.nonzero()[:, 0].tolist() == where
            for name, value in shown.items():
                expected = torch.stack([by_image[name][image][cell] for cell in view])
                assert_close(value[number][real], expected, 5e-5)
            number += 1
    assert number == tokens.batch_size
    if first:
        tiles = []
        for image, size in enumerate(sizes_of(inputs)):
            tiles += [(image, view[0][0]) for view in views(size, budget)]
        own = {"cls": (tokens.cls, states[-2]), "keys": (tokens.cls_keys[2], keys)}
        for value, expected in own.values():
            by_tile = split_tiles(expected[:, 0], inputs)
            assert_close(value, torch.stack([by_tile[i][tile] for i, tile in tiles]), 1e-5)


def test_images_of_one_size_are_not_padded(llava_next: Any) -> None:
    pruner = Scripted()
    with torch.no_grad(), pruner(llava_next):
        llava_next(**make_next(SEVERAL, sizes=[(112, 112)]))
    assert pruner.seen[0].valid is None
    assert pruner.seen[0].features.shape == (3, 16 + 64, 32)


# ----------------------------------------------------------------------------------------- logits


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rows", [ONE, SEVERAL, BATCH], ids=["one", "several", "batch"])
def test_keeping_all_is_bit_exact(llava_next: Any, rows: Any, budget: Any) -> None:
    inputs = make_next(rows)
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
    logits, answer = llava_next(**inputs).logits, llava_next.generate(**inputs, **settings)
    for separators in ("rows", "all"):
        with build_pruner("none")(llava_next, budget=budget, separators=separators):
            assert torch.equal(llava_next(**inputs).logits, logits)
            assert torch.equal(llava_next.generate(**inputs, **settings), answer)


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("separators", SEPARATORS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_logits_are_those_of_prompts_made_by_hand(
    llava_next: Any, pruner: Pruner, budget: Any, separators: Any, side: Any, positions: Any
) -> None:
    inputs = make_next(BATCH, side)
    kept = best_cells(llava_next, inputs, 7, budget)
    short = shorten_next(llava_next, inputs, kept, separators, side)
    options = {"budget": budget, "separators": separators, "positions": positions}
    with pruner(llava_next, **options):
        logits = llava_next(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits(short.positions(positions))[real], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["dinov2", "dinov3_vit"])
def test_dino_towers_without_registers(tower: str) -> None:
    model, inputs = tiny_next(tower, registers=0), make_next(BATCH)
    bare = model(**inputs).logits
    for name in ("none", "fastervlm"):
        with build_pruner(name, keep_ratio=1.0)(model):
            assert torch.equal(model(**inputs).logits, bare)
    kept = best_cells(model, inputs, 7, "per_image")
    short = shorten_next(model, inputs, kept, "rows", "left")
    with build_pruner("fastervlm", num_keep=7)(model):
        logits = model(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits(short.positions("contiguous"))[real], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_batch_equals_single_calls(llava_next: Any, pruner: Pruner, budget: Any) -> None:
    inputs = make_next(BATCH)
    with pruner(llava_next, budget=budget):
        together = llava_next(**inputs).logits
        for row in range(3):
            alone = llava_next(**single_next(inputs, row)).logits[0]
            assert_close(together[row, -len(alone) :], alone, 1e-5)


def test_newlines_of_rows_without_tokens_go(llava_next: Any) -> None:
    """Tokens of the base view have no row: they keep no newline."""
    inputs = make_next(ONE, sizes=[(112, 112)])
    length = inputs["input_ids"].shape[1]
    for keep, num_newlines in (([0, 15], 0), ([16], 1), ([3, 16, 23, 24], 2), ([78, 79], 1)):
        chosen = Selection(torch.tensor([keep]))
        prompts: list[Any] = []
        pruner = Scripted(choose=lambda tokens, chosen=chosen: chosen)
        with torch.no_grad(), pruner(llava_next, on_prune=prompts.append):
            llava_next(**inputs)
        assert int(prompts[0].keep.sum()) == length - 88 + len(keep) + num_newlines


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("separators", SEPARATORS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_tokens_stand_in_the_places_of_their_anchors(
    llava_next: Any, budget: Any, separators: Any, side: Any
) -> None:
    """Rows of any weights, some of them padding."""
    inputs = make_next(BATCH, side)
    shown = [(i, v) for i, s in enumerate(sizes_of(inputs)) for v in views(s, budget)]
    most = max(len(view) for _, view in shown) if budget == "per_image" else NUM_TOKENS
    states = llava_next.model.vision_tower(tiles_of(inputs), output_hidden_states=True)
    by_image = split_tiles(states.hidden_states[-2], inputs)
    tokens = [list(part) for part in projected_tiles(llava_next, inputs)]
    projected = [torch.stack(part) for part in tokens]
    random = torch.Generator().manual_seed(1)
    num = 3
    merge = torch.rand(len(shown), num, 1 + most, generator=random)
    valid = torch.ones(len(shown), num, dtype=torch.bool)
    valid[::2, -1] = False
    anchors, kept = torch.zeros_like(valid).long(), [[] for _ in sizes_of(inputs)]
    for number, (image, view) in enumerate(shown):
        tile = view[0][0]
        index = [cell[1] if budget == "per_tile" else k for k, cell in enumerate(view)]
        picks = torch.randperm(len(view), generator=random)[:num].tolist()
        anchors[number] = torch.tensor([index[pick] for pick in picks])
        real = torch.zeros(most).bool()
        real[index] = True
        merge[number, :, 1:] *= real
        state = by_image[image]
        for row in range(int(valid[number].sum())):
            mixed = merge[number, row, 0] * state[tile, 0]
            for k, (t, token) in zip(index, view, strict=True):
                mixed = mixed + merge[number, row, 1 + k] * state[t, 1 + token]
            cell = view[picks[row]]
            projected[image][cell] = llava_next.model.multi_modal_projector(mixed)
            kept[image].append(cell)
    late = anchors + most * ~valid
    selection = Selection(late.sort(dim=1).values % most, valid, merge, anchors)
    short = shorten_next(llava_next, inputs, kept, separators, side, projected)
    pruner = Scripted(wants=Needs(cls=True), choose=lambda tokens: selection)
    with pruner(llava_next, budget=budget, separators=separators):
        logits = llava_next(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


# -------------------------------------------------------------------------- attaching and refusals


def test_removing_leaves_the_model_as_it_was(llava_next: Any, pruner: Pruner) -> None:
    inputs = make_next(BATCH)
    settings = {"max_new_tokens": 2, "do_sample": False}
    llava_next.generate(**inputs, **settings)
    before = fingerprint(llava_next)
    with torch.no_grad():
        logits = llava_next(**inputs).logits
        handle = ocvtp.attach(llava_next, pruner, budget="per_tile", separators="all")
        assert not torch.equal(llava_next(**inputs).logits[:, -1], logits[:, -1])
        llava_next.generate(**inputs, **settings)
        handle.remove()
        assert fingerprint(llava_next) == before
        assert torch.equal(llava_next(**inputs).logits, logits)


def test_refusals(llava_next: Any, llava_next_siglip: Any, pruner: Pruner) -> None:
    inputs = make_next(ONE)
    with pytest.raises(ValueError, match="budget='tile'; pass one of 'per_image', 'per_tile'"):
        ocvtp.attach(llava_next, pruner, budget="tile")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="separators='some'; pass one of 'rows', 'all', 'none'"):
        ocvtp.attach(llava_next, pruner, separators="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CLS token, which a siglip_vision_model has not"):
        ocvtp.attach(llava_next_siglip, pruner)
    for change, message in (
        ({"image_sizes": None}, "image_sizes are missing.*pass all that the processor returned"),
        ({"input_ids": inputs["input_ids"][:, 1:]}, None),
        ({"vision_feature_select_strategy": "full"}, "strategy='full' does not .*; pass 'default'"),
        ({"input_ids": inputs["input_ids"][:, 9:]}, "placeholders, but the images give"),
    ):
        given = inputs | change
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        with pruner(llava_next), torch.no_grad():
            if message is None:
                llava_next(**given)
                continue
            with pytest.raises(ValueError, match=message):
                llava_next(**given)


def test_tokens_that_are_not_read_cannot_be_kept(llava_next: Any) -> None:
    pruner = Scripted(choose=lambda t: Selection(torch.zeros(t.batch_size, 1).long()))
    inputs = make_next(ONE, sizes=[(90, 140)])  # the first row of each tile is padding
    with (
        pruner(llava_next, budget="per_tile"),
        pytest.raises(ValueError, match="'scripted' returned keep_indices"),
    ):
        llava_next(**inputs)


def test_tiling_means_nothing_to_hosts_without_tiles(llava: Any) -> None:
    from reference import make_batch

    inputs, pruner = make_batch([(5, "image", 4)]), build_pruner("uniform", num_keep=5)
    with torch.no_grad():
        with pruner(llava):
            expected = llava(**inputs).logits
        with pruner(llava, budget="per_tile", separators="none"):
            assert torch.equal(llava(**inputs).logits, expected)


def test_the_host_describes_itself(llava_next: Any) -> None:
    assert find_host(llava_next).describe() == {
        "model_type": "llava_next",
        "stages": ["pixels", "encoder", "llm_input", "llm_layers"],
        "budget": "per_image",
        "separators": "rows",
        "savings": {"cut_tower": True, "project_kept": True, "compile_select": False},
    }


def test_a_processor_and_a_prompt(llava_next: Any, pruner: Pruner) -> None:
    """The processor's own tiles, sizes and placeholders."""
    from PIL import Image

    processor = tiny_next_processor()
    images = [Image.linear_gradient("L").convert("RGB").resize((w, h)) for h, w in SIZES[:3]]
    text = ["USER: <image>\nwhat? ASSISTANT:", "USER: <image>\n<image>\nand? ASSISTANT:"]
    inputs = dict(processor(images=images, text=text, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    kept = best_cells(llava_next, inputs, 7, "per_image")
    short = shorten_next(llava_next, inputs, kept)
    with pruner(llava_next), torch.no_grad():
        logits = llava_next(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


def test_half_precision_and_offloading(llava_next: Any) -> None:
    from accelerate import cpu_offload

    inputs, pruner = make_next(BATCH), build_pruner("uniform", num_keep=7)
    model = deepcopy(llava_next).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad(), pruner(model):
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    offloaded = cpu_offload(deepcopy(model), execution_device="cpu")
    with torch.no_grad(), pruner(offloaded):
        assert torch.equal(offloaded(**inputs).logits, logits)


def test_shown_tokens_are_finite(llava_next: Any) -> None:
    """Padding too: methods multiply it with 0."""
    needs = Needs(projected=True, cls=True, attention=((-2, "cls"),))
    pruner = Scripted(wants=needs, choose=first_real)
    seen: list[VisualTokens] = pruner.seen
    for budget in BUDGETS:
        with torch.no_grad(), pruner(llava_next, budget=budget):  # type: ignore[arg-type]
            llava_next(**make_next(BATCH))
    for tokens in seen:
        tokens.map(lambda t: t.isfinite().all() or pytest.fail("not finite"))
