"""LLaVA-OneVision: token maps, what pruners see, logits and answers of prompts pruned by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import Scripted, answer_of, assert_close, fingerprint, tower_states
from reference_onevision import (
    BATCH,
    EITHER,
    EXACT,
    NUM_TOKENS,
    ONE,
    RESIZED,
    SEVERAL,
    SINGLES,
    arguments,
    best_rows,
    images_of,
    is_resized,
    make_onevision,
    num_tiles,
    read,
    rows_of,
    shorten_onevision,
    single_onevision,
    split_tiles,
    tiles_of,
    tower_features,
    views,
)
from tiny_models import IMAGE_TOKEN
from tiny_onevision import tiny_onevision, tiny_onevision_processor
from torch import Tensor

import ocvtp
from ocvtp import Needs, Pruner, Selection, VisualTokens, build_pruner
from ocvtp.hosts import find_host

NUM_NEW = 5
SEPARATORS = ["rows", "all", "none"]
GREEDY = {"max_new_tokens": NUM_NEW, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
PROMPTS = {  # rows, and sizes of their images
    "one": (ONE, EXACT),
    "several": (SEVERAL, EXACT),
    "exact": (SINGLES, EXACT),
    "batch": (BATCH, EXACT),
    "one_resized": (ONE, RESIZED),
    "resized": (SINGLES, RESIZED),
    "either": (BATCH, EITHER),
}
prompts = pytest.mark.parametrize("prompt", PROMPTS)
both = pytest.mark.parametrize("prompt", ["batch", "either"])
budgets = pytest.mark.parametrize(
    ("prompt", "budget"),
    [
        ("exact", "per_image"),
        ("batch", "per_tile"),
        ("resized", "per_image"),
        ("either", "per_image"),
    ],
)
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(1)]


@pytest.fixture(scope="module")
def onevision() -> Any:
    """The model after a first call, in which transformers installs hooks of its own."""
    model = tiny_onevision()
    model.generate(**make_onevision([(4,)]), max_new_tokens=1)
    model.model.vision_tower(torch.zeros(1, 3, 56, 56), output_hidden_states=True)
    return model


@pytest.fixture
def untouched(onevision: Any) -> Iterator[None]:
    before = fingerprint(onevision)
    yield
    assert dict(fingerprint(onevision).items() ^ before.items()) == {}


def keep_best(tokens: VisualTokens, scores: Tensor, num_keep: int) -> Selection:
    """Those of the highest scores; fewer where there are fewer."""
    if tokens.valid is not None:
        scores = scores.masked_fill(~tokens.valid, -torch.inf)
    best = scores.topk(num_keep)
    late = torch.where(best.values.isfinite(), best.indices, tokens.num_tokens).sort().values
    return Selection(late.clamp(max=tokens.num_tokens - 1), late < tokens.num_tokens)


@pytest.fixture
def pruner() -> Scripted:
    """Keeps the seven tokens whose projections have the largest sums."""
    return Scripted(
        wants=Needs(projected=True),
        choose=lambda tokens: keep_best(tokens, tokens.projected.sum(dim=-1), 7),
    )


def make(prompt: str, side: Any = "left") -> Any:
    rows, sizes = PROMPTS[prompt]
    return make_onevision(rows, side, sizes)


def by_hand(model: Any, inputs: Any, budget: str = "per_image", **options: Any) -> Any:
    return shorten_onevision(model, inputs, best_rows(model, inputs, 7, budget), **options)


# ----------------------------------------------------------------------------------- the token map


def check_map(model: Any, inputs: Any) -> None:
    images = arguments(inputs)
    with torch.no_grad():
        packed = model.model.get_image_features(**images, return_dict=True).pooler_output
    found = find_host(model)._token_map(images, NUM_TOKENS)
    assert found.num_tiles == [num_tiles(image) for image in images_of(inputs)]
    assert found.lengths == [len(image) for image in packed]
    assert found.mixed == any(map(is_resized, images_of(inputs)))
    for rows, expected in zip(packed, rows_of(model, inputs), strict=True):
        assert_close(rows, expected, 1e-5)
    first_tile = first_line = 0
    source, line = [], []
    for image in images_of(inputs):
        for number, mean in read(image):
            line.append(-1 if number < 0 else first_line + number)
            cell = min(mean, default=None)
            source.append(-1 if cell is None else (first_tile + cell[0]) * NUM_TOKENS + cell[1])
        first_tile += num_tiles(image)
        first_line = max(line) + 1
    assert found.line.tolist() == line
    assert (found.source < 0).tolist() == [number < 0 for number in source]
    if not found.mixed:
        assert found.source.tolist() == source


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "size", [*EXACT, *RESIZED, (7, 300), (300, 7), (97, 89), (113, 57), (336, 335)], ids=str
)
def test_the_map_is_the_models_packing(onevision: Any, size: tuple[int, int]) -> None:
    check_map(onevision, make_onevision(ONE, sizes=[size]))


@prompts
def test_maps_of_several_images_lie_side_by_side(onevision: Any, prompt: str) -> None:
    check_map(onevision, make(prompt))


def test_without_numbers_of_images_each_is_tiled(onevision: Any) -> None:
    inputs = make("exact")
    images = arguments(inputs) | {"batch_num_images": None}
    host = find_host(onevision)
    found, expected = (host._token_map(i, NUM_TOKENS) for i in (images, arguments(inputs)))
    assert found.source.equal(expected.source)
    as_list = images | {"batch_num_images": [1, 0, 1]}
    assert host._token_map(as_list, NUM_TOKENS).source.equal(expected.source)


def test_means_that_are_whole_numbers_are_noticed() -> None:
    """Tiles of 3 x 3, of which the means of 2 x 2 tokens have unique whole numbers."""
    model = tiny_onevision(
        image_size=42, image_grid_pinpoints=[[84, 84]], vision_aspect_ratio="anyres_max_1"
    )
    found = find_host(model)._token_map({"image_sizes": torch.tensor([[56, 84]])}, 9)
    assert found.source.tolist() == [*range(9), 14, 19, 24, -1, 29, 34, 39, -1]
    assert found.mixed


# ------------------------------------------------------------------------------- what pruners see


@torch.no_grad()
@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
def test_tokens_are_those_of_the_tiles(onevision: Any, budget: Any) -> None:
    needs = Needs(hidden=(0, -1), attention=((-2, "received"),), keys=(1,), projected=True)
    pruner = Scripted(wants=needs, choose=lambda t: keep_best(t, t.features[..., 0], 1))
    inputs = make("batch")
    with pruner(onevision, budget=budget):
        onevision(**inputs)
    tokens = pruner.seen[0]
    states, attentions = tower_states(onevision, tiles_of(inputs))
    layer = onevision.model.vision_tower.encoder.layers[1]
    keys = layer.self_attn.k_proj(layer.layer_norm1(states[1]))
    pairs = [
        (tokens.features, states[-1]),
        (tokens.hidden[0], states[0]),
        (tokens.hidden[-1], states[-1]),
        (tokens.attention[-2, "received"], attentions[-2].mean(dim=1).mean(dim=1)),
        (tokens.keys[1], keys),
        (tokens.projected, onevision.model.multi_modal_projector(states[-1])),
    ]
    assert tokens.grid_hw == (4, 4)
    for shown, tiled in pairs:
        by_image, number = split_tiles(tiled, inputs), 0
        for image, of_tiles in zip(images_of(inputs), by_image, strict=True):
            rows = read(image)
            for view in views(image, budget):
                real = torch.ones(tokens.num_tokens).bool()
                if tokens.valid is not None:
                    real = tokens.valid[number]
                expected = torch.stack([of_tiles[min(rows[k][1])] for k in view])
                assert_close(shown[number][real], expected, 5e-5)
                number += 1
        assert number == tokens.batch_size


@pytest.mark.parametrize("prompt", ["resized", "either"])
@torch.no_grad()
def test_resized_tokens_are_shown_as_they_are_read(
    onevision: Any, pruner: Scripted, prompt: str
) -> None:
    inputs = make(prompt)
    with pruner(onevision):
        onevision(**inputs)
    tokens = pruner.seen[0]
    assert tokens.grid_hw == (4, 4)
    assert tokens.features.isfinite().all()
    assert tokens.projected.isfinite().all()
    for number, rows in enumerate(rows_of(onevision, inputs)):
        (view,) = views(images_of(inputs)[number])
        for shown in (tokens.features, tokens.projected):
            assert_close(shown[number][tokens.valid[number]], rows[view], 1e-5)


@torch.no_grad()
def test_grids(onevision: Any, pruner: Scripted) -> None:
    expected = {
        "one": ((4, 4), (4, 8)),
        "several": ((4, 4),),
        "one_resized": ((4, 4), (10, 13)),
    }
    for prompt, grids in expected.items():
        prompts: list[Any] = []
        with pruner(onevision, on_prune=prompts.append):
            onevision(**make(prompt))
        host = find_host(onevision)
        assert host.grids(prompts[0].encoded) == grids


# ----------------------------------------------------------------------------------------- logits


@pytest.mark.sampled(2)
@torch.no_grad()
@prompts
def test_keeping_all_is_bit_exact(onevision: Any, prompt: str) -> None:
    inputs = make(prompt)
    logits, answer = onevision(**inputs).logits, onevision.generate(**inputs, **GREEDY)
    for separators in ("rows", "all"):
        with build_pruner("none")(onevision, separators=separators):
            assert torch.equal(onevision(**inputs).logits, logits)
            assert torch.equal(onevision.generate(**inputs, **GREEDY), answer)


@torch.no_grad()
@budgets
@pytest.mark.parametrize("separators", SEPARATORS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_logits_are_those_of_prompts_made_by_hand(
    onevision: Any,
    pruner: Pruner,
    prompt: str,
    budget: Any,
    separators: Any,
    side: Any,
    positions: Any,
) -> None:
    inputs = make(prompt, side)
    short = by_hand(onevision, inputs, budget, separators=separators, side=side)
    options = {"budget": budget, "separators": separators, "positions": positions}
    with pruner(onevision, **options):
        logits = onevision(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits(short.positions(positions))[real], 1e-5)


@torch.no_grad()
@budgets
def test_a_batch_equals_single_calls(
    onevision: Any, pruner: Pruner, prompt: str, budget: Any
) -> None:
    inputs = make(prompt)
    with pruner(onevision, budget=budget):
        together, said = onevision(**inputs).logits, answer_of(onevision, inputs, **GREEDY)
        for row in range(3):
            alone = single_onevision(inputs, row)
            logits = onevision(**alone).logits[0]
            assert_close(together[row, -len(logits) :], logits, 1e-5)
            assert torch.equal(said[row : row + 1], answer_of(onevision, alone, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("separators", SEPARATORS)
@pytest.mark.parametrize("prompt", ["exact", "batch"])
def test_mixed_tokens_stand_in_the_places_of_their_anchors(
    onevision: Any, prompt: str, separators: Any
) -> None:
    inputs = make(prompt)
    images, rows = images_of(inputs), rows_of(onevision, inputs)
    most, random = max(len(views(i)[0]) for i in images), torch.Generator().manual_seed(1)
    merge, anchors = torch.rand(len(images), 3, 1 + most, generator=random), []
    merge[:, :, 0] = 0
    kept = []
    features = tower_features(onevision, inputs)
    for number, (image, tiles) in enumerate(zip(images, features, strict=True)):
        (view,) = views(image)
        merge[number, :, 1 + len(view) :] = 0
        anchors.append(torch.randperm(len(view), generator=random)[:3])
        kept.append([view[k] for k in anchors[-1]])
        seen = torch.stack([tiles[min(read(image)[k][1])] for k in view])
        mixed = merge[number, :, 1 : 1 + len(view)] @ seen
        rows[number][kept[-1]] = onevision.model.multi_modal_projector(mixed)
    places = torch.stack(anchors)
    selection = Selection(places.sort(dim=1).values, None, merge, places)
    short = shorten_onevision(onevision, inputs, kept, separators, rows_read=rows)
    with Scripted(choose=lambda tokens: selection)(onevision, separators=separators):
        logits = onevision(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


@torch.no_grad()
def test_the_aspect_ratio_is_that_of_the_config(onevision: Any, pruner: Scripted) -> None:
    """What a call says is ignored, by the model itself too."""
    inputs = make("resized")
    logits = onevision(**inputs).logits
    inputs["vision_aspect_ratio"] = "anyres_max_16"
    assert torch.equal(onevision(**inputs).logits, logits)
    with build_pruner("none")(onevision):
        assert torch.equal(onevision(**inputs).logits, logits)
    short = by_hand(onevision, inputs)
    with pruner(onevision):
        assert torch.equal(answer_of(onevision, inputs, **GREEDY), short.greedy(NUM_NEW))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [EXACT[:3], RESIZED[:3]], ids=["exact", "resized"])
def test_a_processor_and_a_prompt(onevision: Any, sizes: list[tuple[int, int]]) -> None:
    """The processor's own tiles, sizes and placeholders."""
    from PIL import Image

    images = [Image.linear_gradient("L").convert("RGB").resize((w, h)) for h, w in sizes]
    text = ["USER: <image>\nwhat? ASSISTANT:", "USER: <image>\n<image>\nand? ASSISTANT:"]
    inputs = dict(
        tiny_onevision_processor()(images=images, text=text, padding=True, return_tensors="pt")
    )
    inputs.pop("token_type_ids", None)
    # Flat pictures have tokens of nearly equal scores: keep what is seen first.
    kept = [views(image)[0][:7] for image in images_of(inputs)]
    first = Scripted(choose=lambda t: Selection(torch.arange(7).repeat(t.batch_size, 1)))
    short = shorten_onevision(onevision, inputs, kept)
    with first(onevision):
        logits = onevision(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


# ---------------------------------------------------------------------------------------- answers


@both
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_greedy_equals_a_hand_written_loop(
    onevision: Any, pruner: Pruner, prompt: str, positions: Any
) -> None:
    inputs = make(prompt)
    expected = by_hand(onevision, inputs).greedy(NUM_NEW, positions)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
    with pruner(onevision, positions=positions):
        assert torch.equal(answer_of(onevision, inputs, **settings), expected)


# ------------------------------------------------------------------------ pruners of the registry


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["exact", "resized"])
@pytest.mark.parametrize("name", ["uniform", "fps", "kmeans", "divprune", "greedyprune"])
def test_registered_pruners(onevision: Any, name: str, prompt: str) -> None:
    prompts: list[Any] = []
    processor = tiny_onevision_processor()
    with build_pruner(name, num_keep=8)(onevision, processor=processor, on_prune=prompts.append):
        onevision(**make(prompt))
    assert prompts[0].summary()["visual_tokens_kept"] == [8, 8]


# -------------------------------------------------------------------------- attaching and refusals


def test_removing_leaves_the_model_as_it_was(onevision: Any, pruner: Pruner) -> None:
    inputs = make("either")
    onevision.generate(**inputs, **GREEDY)
    before = fingerprint(onevision)
    with torch.no_grad():
        logits = onevision(**inputs).logits
        handle = ocvtp.attach(onevision, pruner, separators="all")
        assert not torch.equal(onevision(**inputs).logits[:, -1], logits[:, -1])
        onevision.generate(**inputs, **GREEDY)
        handle.remove()
        assert fingerprint(onevision) == before
        assert torch.equal(onevision(**inputs).logits, logits)


def test_the_host_describes_itself(onevision: Any) -> None:
    assert find_host(onevision).describe() == {
        "model_type": "llava_onevision",
        "stages": ["pixels", "encoder", "llm_input", "llm_layers"],
        "budget": "per_image",
        "separators": "rows",
        "savings": {"cut_tower": False, "project_kept": True, "compile_select": False},
    }


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Needs(hidden=(-1,)), "hidden"),
        (Needs(attention=((-2, "received"),), keys=(1,)), "attention, keys"),
    ],
    ids=["hidden", "attention"],
)
def test_what_is_inside_the_tower_is_refused_of_resized_images(
    onevision: Any, needs: Needs, words: str
) -> None:
    pruner = Scripted(wants=needs)
    message = f"reads {words}, but the model resized .*; use a pruner that reads .*ocvtp list"
    with pruner(onevision):
        for prompt in ("one_resized", "either"):
            with pytest.raises(ValueError, match=message):
                onevision(**make(prompt))
        assert not pruner.seen
        onevision(**make("batch"))


def test_refusals(onevision: Any, pruner: Pruner) -> None:
    with pytest.raises(ValueError, match="CLS token, which a siglip_vision_model has not"):
        ocvtp.attach(onevision, build_pruner("fastervlm", num_keep=4))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("one", {"image_sizes": None}, "image_sizes are missing.*pass all that the processor"),
        ("one", {"vision_feature_select_strategy": "default"}, "strategy='default' .*pass 'full'"),
        ("one", {"batch_num_images": torch.tensor([2])}, r"\[2\] do not add up to the 1 images"),
        ("one", {"batch_num_images": [1, 1]}, r"\[1, 1\] do not add up to the 1 images"),
        ("several", {"batch_num_images": None}, "placeholders, but the images give"),
        ("one", {"pixel_values_videos": torch.zeros(1, 2, 3, 56, 56)}, "videos are not pruned"),
    ]
    with pruner(onevision), torch.no_grad():
        for prompt, change, message in cases:
            inputs = make(prompt)
            if "batch_num_images" in change and change["batch_num_images"] is None:
                inputs["pixel_values"] = inputs["pixel_values"].expand(-1, 13, -1, -1, -1)
            with pytest.raises(ValueError, match=message):
                onevision(**inputs | change)
            with pytest.raises(ValueError, match=message):
                onevision.generate(**inputs | change, **GREEDY)
        videos = {"pixel_values_videos": torch.zeros(1, 2, 3, 56, 56)}
        with pytest.raises(ValueError, match="videos are not pruned"):
            onevision(input_ids=torch.tensor([[1, 101, 5]]), **videos)
    with (
        pruner(onevision, budget="per_tile"),
        pytest.raises(ValueError, match="resized the tokens .*; pass budget='per_image'"),
    ):
        onevision(**make("either"))


def test_resized_tokens_are_not_merged(onevision: Any) -> None:
    def merged(tokens: VisualTokens) -> Selection:
        keep = torch.arange(2).repeat(tokens.batch_size, 1)
        return Selection(
            keep, None, torch.eye(1 + tokens.num_tokens)[None, 1:3].repeat(len(keep), 1, 1)
        )

    pruner: Scripted = Scripted(choose=merged)
    message: Callable[[str], str] = "merges tokens before the projector, but the model {}".format
    with pruner(onevision), torch.no_grad():
        onevision(**make("exact"))
        with pytest.raises(ValueError, match=message("resized .*; use a pruner that reads")):
            onevision(**make("either"))
