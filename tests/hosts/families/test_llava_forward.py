"""model(**inputs) under a pruner, against prompts pruned by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    IMG,
    NUM_TOKENS,
    ONE,
    SEVERAL,
    Scripted,
    assert_close,
    best_by_cls,
    make_batch,
    project,
    shorten,
    single,
    tower_states,
)
from tiny_models import IMAGE_TOKEN
from torch.nn.functional import cross_entropy, pad

from ocvtp import Needs, Pruner, Selection, build_pruner

EDGES = [(IMG, IMG, 2), (3, IMG)]
LONG_TEXT = [(2, IMG, 3), (40,)]  # as long after pruning
PROMPTS = {"one": ONE, "several": SEVERAL, "batch": BATCH, "edges": EDGES, "text": LONG_TEXT}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
sides = pytest.mark.parametrize("side", ["left", "right"])
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


@prompts
@sides
@torch.no_grad()
def test_keeping_all_is_bit_exact(llava: Any, rows: Any, side: Any) -> None:
    inputs = make_batch(rows, side)
    expected = llava(**inputs).logits
    for positions in ("contiguous", "original"):
        with build_pruner("none")(llava, positions=positions):
            assert torch.equal(llava(**inputs).logits, expected)


@sides
@torch.no_grad()
def test_keeping_all_leaves_the_callers_padding(llava: Any, side: Any) -> None:
    inputs = make_batch(BATCH, side)
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7
    columns = (3, 0) if side == "left" else (0, 3)  # padded to a multiple of something
    inputs["input_ids"] = pad(inputs["input_ids"], columns, value=7)
    inputs["attention_mask"] = pad(inputs["attention_mask"], columns)
    expected = llava(**inputs).logits
    with build_pruner("none")(llava):
        assert torch.equal(llava(**inputs).logits, expected)


@torch.no_grad()
def test_masked_placeholders_are_padding(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(BATCH)
    with pruner(llava):
        real = inputs["attention_mask"].sum(dim=1) - torch.tensor([11, 0, 22])
        expected = llava(**inputs).logits
        inputs["input_ids"][inputs["attention_mask"] == 0] = IMAGE_TOKEN
        actual = llava(**inputs).logits
    for row, length in enumerate(real):
        assert torch.equal(actual[row, -length:], expected[row, -length:])


@prompts
@sides
@torch.no_grad()
def test_logits_equal_the_reference(llava: Any, pruner: Pruner, rows: Any, side: Any) -> None:
    inputs = make_batch(rows, side)
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5), side)
    real = short.mask.bool()
    with pruner(llava):
        assert_close(llava(**inputs).logits[real], short.logits()[real])
        last = llava(**inputs, logits_to_keep=2, return_dict=False)[0]
        positional = llava(*(inputs[k] for k in ("input_ids", "pixel_values", "attention_mask")))
    assert_close(last[real[:, -2:]], short.logits()[:, -2:][real[:, -2:]])
    assert_close(positional.logits[real], short.logits()[real])


@prompts
@sides
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_original_positions_leave_gaps(
    llava: Any, pruner: Pruner, rows: Any, side: Any, use_cache: bool
) -> None:
    inputs = make_batch(rows, side)
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5), side)
    expected = short.logits(short.positions("original"))[short.mask.bool()]
    if len(rows) == 1:
        del inputs["attention_mask"]
    with pruner(llava, positions="original"):
        actual = llava(**inputs, use_cache=use_cache).logits[short.mask.bool()]
    assert_close(actual, expected)
    assert (expected - short.logits()[short.mask.bool()]).abs().max() > 0.01


@torch.no_grad()
def test_position_ids_of_the_caller_are_gathered(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch([(5, IMG, 4), (2, IMG, 7)])
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
    numbers = torch.arange(inputs["input_ids"].shape[1])[None] * 2 + 3
    expected = short.logits(short.gather(numbers.expand(2, -1)))
    for positions in ("contiguous", "original"):
        with pruner(llava, positions=positions):
            for given in (numbers, numbers.expand(2, -1)):
                actual = llava(**inputs, position_ids=given, use_cache=False).logits
                assert_close(actual[short.mask.bool()], expected[short.mask.bool()])


@sides
@torch.no_grad()
def test_a_batch_equals_single_calls(llava: Any, pruner: Pruner, side: Any) -> None:
    inputs = make_batch(BATCH, side)
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5), side)
    with pruner(llava):
        batched = llava(**inputs).logits
        for row in range(3):
            alone = llava(**single(inputs, row)).logits[0]
            assert_close(batched[row][short.mask[row].bool()], alone)


@torch.no_grad()
def test_calls_without_images_pass_untouched(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch([(7,), (4,)])
    answer = {"max_new_tokens": 4, "do_sample": False}
    expected, expected_answer = llava(**inputs).logits, llava.generate(**inputs, **answer)
    embeddings = llava.get_input_embeddings()(inputs["input_ids"])
    pruned: list[Any] = []
    with pruner(llava, on_prune=pruned.append):
        assert torch.equal(llava(**inputs).logits, expected)
        assert torch.equal(llava.generate(**inputs, **answer), expected_answer)
        assert torch.equal(llava.generate(inputs["input_ids"][:1], **answer), expected_answer[:1])
        by_embeddings = llava(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
        assert torch.equal(by_embeddings.logits, expected)
    assert pruned == []


@torch.no_grad()
def test_without_a_mask_all_columns_count(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch([(5, IMG, 4), (25,)])
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
    del inputs["attention_mask"]
    with pruner(llava):
        actual = llava(**inputs).logits
    assert_close(actual[short.mask.bool()], short.logits()[short.mask.bool()])


@torch.no_grad()
def test_images_may_keep_different_numbers(llava: Any) -> None:
    inputs = make_batch(BATCH)
    kept = [[1, 4, 5], [0, 2, 3, 9, 15], [7]]
    indices = torch.tensor([k + [15] * (5 - len(k)) for k in kept])
    valid = torch.tensor([[i < len(k) for i in range(5)] for k in kept])
    short = shorten(llava, inputs, kept)
    with Scripted(choose=lambda tokens: Selection(indices, valid=valid))(llava):
        actual = llava(**inputs).logits
        answer = llava.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert_close(actual[short.mask.bool()], short.logits()[short.mask.bool()])
    assert torch.equal(answer[:, inputs["input_ids"].shape[1] :], short.greedy(6))


@pytest.mark.parametrize("with_cls", [False, True])
@torch.no_grad()
def test_merged_tokens_are_mixed_before_the_projector(llava: Any, with_cls: bool) -> None:
    inputs = make_batch(BATCH)
    kept = [[1, 4, 5], [0, 2, 3], [7, 8, 15]]
    weights = torch.rand(3, 3, 1 + NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    weights[:, :, 0] *= with_cls
    tower = llava.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    mixed = llava.model.multi_modal_projector(weights @ tower.hidden_states[-2])  # row 0: the CLS
    projected = project(llava, inputs["pixel_values"])
    for image, keep in enumerate(kept):
        projected[image, keep] = mixed[image]
    short = shorten(llava, inputs, kept, projected=projected)
    pruner = Scripted(
        wants=Needs(cls=with_cls),
        choose=lambda tokens: Selection(torch.tensor(kept), merge=weights),
    )
    with pruner(llava):
        assert_close(llava(**inputs).logits[short.mask.bool()], short.logits()[short.mask.bool()])


@sides
def test_labels_lose_the_dropped_tokens(llava: Any, pruner: Pruner, side: Any) -> None:
    inputs = make_batch(BATCH, side)
    image = inputs["input_ids"] == IMAGE_TOKEN
    labels = inputs["input_ids"].masked_fill(image | ~inputs["attention_mask"].bool(), -100)
    model = deepcopy(llava).train()
    short = shorten(model, inputs, best_by_cls(llava, inputs["pixel_values"], 5), side)
    targets = short.gather(labels, fill=-100)[:, 1:]
    expected = cross_entropy(short.logits()[:, :-1].flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(
        expected, list(model.model.language_model.parameters())
    )
    with pruner(model):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert_close(loss, expected)
    for parameter, gradient in zip(
        model.model.language_model.parameters(), expected_gradients, strict=True
    ):
        assert_close(parameter.grad, gradient, 1e-5)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0


@torch.no_grad()
def test_half_precision(llava: Any) -> None:
    model, inputs = deepcopy(llava).bfloat16(), make_batch(BATCH)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    kept: list[Any] = []
    with build_pruner("fastervlm", num_keep=5)(model, on_prune=kept.append):
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    tokens, chosen = kept[0].encoded.tokens, kept[0].selection.keep_indices
    assert tokens.features.dtype == torch.bfloat16
    assert tokens.attention[-2, "cls"].dtype == torch.float32
    short = shorten(model, inputs, chosen.tolist())
    assert logits.dtype == torch.bfloat16
    assert_close(logits[short.mask.bool()], short.logits()[short.mask.bool()], 0.02)
    assert answer.shape == (3, inputs["input_ids"].shape[1] + 4)
    scores = tower_states(model, inputs["pixel_values"])[1][-2].float().mean(dim=1)[:, 0, 1:]
    assert_close(tokens.attention[-2, "cls"], scores, 0.05)


@torch.no_grad()
def test_a_hand_written_loop_decodes(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(BATCH)
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
    prompts: list[Any] = []
    answer = []
    with pruner(llava, on_prune=prompts.append):
        output = llava(**inputs, use_cache=True)
        mask = prompts[0].short_mask.long()
        for _ in range(5):
            answer.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(answer[-1])], dim=1)
            output = llava(
                input_ids=answer[-1], attention_mask=mask, past_key_values=output.past_key_values
            )
    assert torch.equal(torch.cat(answer, dim=1), short.greedy(5))


@torch.no_grad()
def test_every_shortened_prompt_is_reported(llava: Any, pruner: Pruner) -> None:
    inputs, prompts = make_batch(BATCH), []
    with pruner(llava, on_prune=prompts.append):
        llava(**inputs)
        llava.generate(**inputs, max_new_tokens=2)
    assert len(prompts) == 2
    lengths = inputs["attention_mask"].sum(dim=1)
    assert prompts[0].summary() == {
        "visual_tokens": [16, 16, 16],
        "visual_tokens_encoded": [16, 16, 16],
        "visual_tokens_kept": [5, 5, 5],
        "prompt_tokens": inputs["input_ids"].shape[1],
        "prompt_tokens_kept": (lengths - torch.tensor([11, 0, 22])).tolist(),
        "layers": [],
    }


@torch.no_grad()
def test_a_siglip_tower_prunes_the_same_way(llava_siglip: Any) -> None:
    inputs = make_batch(BATCH)
    received = tower_states(llava_siglip, inputs["pixel_values"])[1][-2].mean(dim=(1, 2))
    kept = [sorted(image.topk(5).indices.tolist()) for image in received]
    pruner = Scripted(
        wants=Needs(attention=((-2, "received"),)),
        choose=lambda t: Selection(t.attention[-2, "received"].topk(5).indices.sort().values),
    )
    short = shorten(llava_siglip, inputs, kept)
    expected = llava_siglip(**inputs).logits
    with build_pruner("none")(llava_siglip):
        assert torch.equal(llava_siglip(**inputs).logits, expected)
    with pruner(llava_siglip):
        actual = llava_siglip(**inputs).logits
    assert_close(actual[short.mask.bool()], short.logits()[short.mask.bool()])
