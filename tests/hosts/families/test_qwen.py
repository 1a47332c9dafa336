"""Qwen-VL models: what pruners see, and forward(), against tokens and prompts made by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from qwen_reference import by_unit, look_at_all, shorten
from reference import Scripted, assert_close
from tiny_models import IMAGE_TOKEN
from tiny_qwen import BATCH, ONE, SEVERAL, make_batch, single

import ocvtp
from ocvtp import Needs, Selection, VisualTokens, build_pruner
from ocvtp.towers.windows import window_order

PROMPTS = {"one": ONE, "several": SEVERAL, "batch": BATCH}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
EVERYTHING = Needs(
    hidden=(0, 2, -1),
    attention=tuple((block, kind) for block in (0, 1, -2, -1) for kind in ("received", "given")),  # type: ignore[misc]
    keys=(0, -1),
    projected=True,
)


pytestmark = [pytest.mark.usefixtures("untouched_qwen"), pytest.mark.sampled(2)]


def shown(model: Any, inputs: Any, needs: Needs = EVERYTHING) -> VisualTokens:
    pruner = Scripted(num_keep=3, wants=needs)
    with pruner(model), torch.no_grad():
        model(**inputs)
    return pruner.seen[0]


def some(tokens: VisualTokens) -> Selection:
    """A different number of tokens of every image."""
    keep = torch.arange(1, 6).repeat(tokens.batch_size, 1)
    counts = torch.arange(tokens.batch_size) % 3 + 3
    return Selection(keep, torch.arange(5) < counts[:, None])


def places_of(tokens_of: list[Any]) -> list[list[int]]:
    return [list(range(1, 1 + i % 3 + 3)) for i in range(len(tokens_of))]


def test_the_tower_made_by_hand_is_the_tower(qwen: Any) -> None:
    inputs = make_batch(SEVERAL)
    images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        expected = qwen.model.get_image_features(**images, return_dict=True).pooler_output
    for image, rows in zip(look_at_all(qwen, inputs), expected, strict=True):
        assert_close(image.projected, rows, 1e-5)


def test_units_are_put_in_the_order_of_windows() -> None:
    expected = [0, 1, 3, 4, 2, 5, 6, 7, 8]  # of a grid of 3 x 3, and then a single row of 2
    assert window_order([(3, 3), (1, 2)], 2).tolist() == [*expected, 9, 10]


@prompts
def test_tokens_are_those_of_the_images_alone(qwen: Any, rows: Any) -> None:
    inputs = make_batch(rows)
    tokens, images = shown(qwen, inputs), look_at_all(qwen, inputs)
    most = max(len(image.projected) for image in images)
    assert tokens.num_tokens == most
    assert tokens.num_heads == 4
    for i, image in enumerate(images):
        size = len(image.projected)
        if tokens.valid is not None:
            assert tokens.valid[i].tolist() == [True] * size + [False] * (most - size)
        pairs = [(tokens.features, image.projected), (tokens.projected, image.projected)]
        for layer in (0, 2, -1):
            pairs.append((tokens.hidden[layer], by_unit(image.hidden[layer])))
        for block in (0, -1):
            pairs.append((tokens.keys[block], by_unit(image.keys[block])))
        for found, expected in pairs:
            assert found is not None
            assert_close(found[i, :size], expected, 1e-5)
            assert not found[i, size:].any()


@prompts
def test_attention_is_that_of_the_eager_blocks(qwen: Any, rows: Any) -> None:
    """Qwen2.5-VL's blocks 0 and 2 attend inside windows, others inside images."""
    inputs = make_batch(rows)
    tokens, images = shown(qwen, inputs), look_at_all(qwen, inputs)
    for block in (0, 1, -2, -1):
        for i, image in enumerate(images):
            size = len(image.projected)
            received = tokens.attention[block, "received"][i, :size]
            assert received.dtype == torch.float32
            torch.testing.assert_close(received, image.received(block), atol=1e-6, rtol=0)
            given = tokens.attention[block, "given"][i, :size]
            torch.testing.assert_close(given, image.given(block), atol=1e-6, rtol=0)
        if block in (1, -1):
            sums = tokens.attention[block, "received"].sum(dim=1)
            torch.testing.assert_close(4 * sums, torch.ones(len(images)))


@pytest.mark.parametrize(
    ("rows", "grid", "has_padding"),
    [
        (ONE, (4, 4), False),
        ([(2, (3, 5), 1), (3, (3, 5), 4)], (3, 5), False),
        ([(2, (3, 5), (5, 3), 1)], (0, 0), False),
        (SEVERAL, (0, 0), True),
    ],
)
def test_grids(qwen: Any, rows: Any, grid: Any, has_padding: bool) -> None:
    tokens = shown(qwen, make_batch(rows), Needs())
    assert tokens.grid_hw == grid
    assert (tokens.valid is not None) == has_padding


def test_bfloat16_towers_supply_fp32_attention(qwen: Any) -> None:
    inputs = make_batch(SEVERAL)
    exact = shown(qwen, inputs)
    tokens = shown(deepcopy(qwen).bfloat16(), inputs)
    for key, attention in tokens.attention.items():
        assert attention.dtype == torch.float32
        assert (attention - exact.attention[key]).abs().max() < 0.1
    assert tokens.hidden[2].dtype == tokens.features.dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
@prompts
@torch.no_grad()
def test_keeping_all_is_bit_exact(qwen: Any, rows: Any, side: Any) -> None:
    inputs = make_batch(rows, side)
    expected = qwen(**inputs).logits
    with build_pruner("none")(qwen):
        assert qwen(**inputs).logits.equal(expected)
    assert qwen(**inputs).logits.equal(expected)


@pytest.mark.parametrize("side", ["left", "right"])
@prompts
@torch.no_grad()
def test_pruned_logits_are_those_of_a_prompt_made_by_hand(qwen: Any, rows: Any, side: Any) -> None:
    inputs = make_batch(rows, side)
    short = shorten(qwen, inputs, places_of(look_at_all(qwen, inputs)), side)
    reported: list[Any] = []
    with Scripted(choose=some)(qwen, on_prune=reported.append):
        logits = qwen(**inputs).logits
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)
    positions = reported[0].positions
    assert positions[:, real].equal(short.positions()[:, real])
    whole, _ = qwen.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    kept = [whole[:, row, keep] for row, keep in enumerate(reported[0].keep)]
    assert torch.cat(kept, dim=1).equal(positions[1:, real])
    assert reported[0].summary()["prompt_tokens_kept"] == short.mask.sum(dim=1).tolist()


@torch.no_grad()
def test_a_batch_equals_single_calls(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    with build_pruner("divprune", num_keep=5)(qwen):
        together = qwen(**inputs).logits
        for row in range(3):
            alone = qwen(**single(inputs, row)).logits
            assert_close(together[row, -alone.shape[1] :], alone[0], 1e-5)


@torch.no_grad()
def test_the_option_for_plain_positions_means_nothing(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    logits = []
    for positions in ("contiguous", "original"):
        with Scripted(choose=some)(qwen, positions=positions):
            logits.append(qwen(**inputs).logits)
    assert logits[0].equal(logits[1])


@torch.no_grad()
def test_without_token_types_images_are_found_by_their_placeholder(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    bare = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with Scripted(choose=some)(qwen):
        assert qwen(**bare).logits.equal(qwen(**inputs).logits)


@pytest.mark.parametrize("leading", [(), (3,), (4,)])
@torch.no_grad()
def test_positions_of_the_callers_are_kept(qwen: Any, leading: tuple[int, ...]) -> None:
    inputs = make_batch(ONE)
    given = torch.arange(inputs["input_ids"].shape[1]).expand(*leading, 1, -1) * 2
    reported: list[Any] = []
    with Scripted(choose=some)(qwen, on_prune=reported.append):
        qwen(**inputs, position_ids=given)
    prompt = reported[0]
    kept = (prompt.keep[0].nonzero()[:, 0] * 2).expand(3, 1, -1)
    assert prompt.positions[1:].equal(kept)
    assert prompt.positions[0].tolist() == [list(range(prompt.short_length))]


def test_labels_give_the_loss_of_the_short_prompt(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    with Scripted(choose=some)(qwen):
        output = qwen(**inputs, labels=labels)
    short = shorten(qwen, inputs, places_of(look_at_all(qwen, inputs)))
    expected = short.ids.masked_fill((short.ids % 100 == 0) | (short.mask == 0), -100)
    loss = torch.nn.functional.cross_entropy(
        short.logits()[:, :-1].flatten(0, 1), expected[:, 1:].flatten()
    )
    assert_close(output.loss, loss, 1e-5)


@torch.no_grad()
def test_hand_written_loops_go_on_from_the_coordinates(qwen: Any) -> None:
    """Also where other prompts come between, and behind the block."""
    short = {}
    caches, answers = {}, {}
    with Scripted(choose=some)(qwen):
        for name, rows in (("one", ONE), ("several", SEVERAL)):
            inputs = make_batch(rows)
            short[name] = shorten(qwen, inputs, places_of(look_at_all(qwen, inputs)))
            output = qwen(**inputs, use_cache=True)
            caches[name] = output.past_key_values
            answers[name] = [output.logits[:, -1:].argmax(dim=-1)]
        for name in ("one", "several", "one", "several"):
            output = qwen(answers[name][-1], past_key_values=caches[name])
            answers[name].append(output.logits[:, -1:].argmax(dim=-1))
    output = qwen(answers["several"][-1], past_key_values=caches["several"])  # still the last one
    answers["several"].append(output.logits[:, -1:].argmax(dim=-1))
    for name, answer in answers.items():
        assert torch.cat(answer, dim=1).equal(short[name].greedy(len(answer)))


@torch.no_grad()
def test_loops_over_batches_with_a_mask(qwen: Any) -> None:
    inputs = make_batch(BATCH)
    reported: list[Any] = []
    with Scripted(choose=some)(qwen, on_prune=reported.append):
        output = qwen(**inputs, use_cache=True)
        mask, answer = reported[0].short_mask.long(), []
        for _ in range(4):
            answer.append(output.logits[:, -1:].argmax(dim=-1))
            mask = torch.cat([mask, torch.ones_like(answer[-1])], dim=1)
            output = qwen(answer[-1], past_key_values=output.past_key_values, attention_mask=mask)
    short = shorten(qwen, inputs, places_of(look_at_all(qwen, inputs)))
    assert torch.cat(answer, dim=1).equal(short.greedy(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_thw": None}, "pixel_values and image_grid_thw together"),
        ({"image_grid_thw": torch.tensor([[4, 4, 4]])}, "several frames"),
        ({"pixel_values_videos": torch.zeros(4, 1176)}, "videos are not pruned"),
        ({"input_ids": torch.full((1, 12), IMAGE_TOKEN)}, "placeholders"),
    ],
)
def test_refusals(qwen: Any, change: Any, message: str) -> None:
    inputs = make_batch(ONE) | change
    if "input_ids" in change:
        del inputs["attention_mask"], inputs["mm_token_type_ids"]
    with build_pruner("none")(qwen), pytest.raises(ValueError, match=message):
        qwen(**inputs)


@torch.no_grad()
def test_numbers_that_do_not_count_may_be_anything(qwen: Any) -> None:
    def choose(tokens: VisualTokens) -> Selection:
        selection = some(tokens)
        keep = selection.keep_indices.masked_fill(~selection.valid, 999)
        return Selection(keep, selection.valid)

    inputs, logits = make_batch(SEVERAL), []
    for choice in (some, choose):
        with Scripted(choose=choice)(qwen):
            logits.append(qwen(**inputs).logits)
    assert logits[0].equal(logits[1])


def test_padding_is_no_choice(qwen: Any) -> None:
    def choose(tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(tokens.num_tokens).repeat(tokens.batch_size, 1))

    with Scripted(choose=choose)(qwen), pytest.raises(ValueError, match="real tokens"):
        qwen(**make_batch(SEVERAL))


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (Needs(cls=True), "received"),
        (Needs(keys=(-1,), cls_queries=(-1,)), "received"),
        (Needs(attention=((-1, "cls"),)), "received"),
        (Needs(clip=True), "`text`"),
        (Needs(hidden=(5,)), "hidden_states"),
        (Needs(keys=(4,)), "blocks"),
    ],
)
def test_what_cannot_be_supplied_is_refused(qwen: Any, needs: Needs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ocvtp.attach(qwen, Scripted(wants=needs))
