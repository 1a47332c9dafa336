"""What the demo VLM learns with: packed questions, dropped tokens, standardised projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from PIL import Image
from tiny_demo_vlm import MODEL, generator, tiny_batch, tiny_learner, tiny_settings

from ocvtp import Needs, Pruner, Selection
from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.scenes import draw_scene
from tools.demo_vlm.batches import to_pixels
from tools.demo_vlm.learner import align_loss, names_of_patches
from tools.demo_vlm.model import build_model, orthogonal_attention
from tools.demo_vlm.packing import random_subset, read_packed
from tools.demo_vlm.processor import build_processor, word_tokenizer
from tools.demo_vlm.settings import StageSettings
from tools.demo_vlm.training import _step, build_optimizer

TOWER = StageSettings("tower", 2, dense=1.0, tower_learning_rate=1e-3)
READ = StageSettings("read", 2, align=0.4, answer=1.0, questions=5)
ENGLISH = replace(READ, prompts="english")
NUM_TOKENS = MODEL.side**2


@pytest.fixture(scope="module")
def learner():
    learner = tiny_learner().eval()
    orthogonal_attention(learner.model, generator())
    learner.begin(READ, tiny_batch(READ), generator())
    learner.fold()
    return learner


@dataclass(kw_only=True, eq=False)
class Given(Pruner):
    """Keeps the tokens that it is told to."""

    keep: torch.Tensor
    stage: ClassVar[str] = "llm_input"
    needs: ClassVar[Needs] = Needs()

    def _select(self, tokens, num_keep):
        return Selection(self.keep[: len(tokens.features)])


def packed_logits(learner, pixels, words, keep, positions="contiguous"):
    features, _ = learner.encode(pixels)
    visual = learner.project(features)
    if keep is not None:
        visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[2]))
    places = (keep, NUM_TOKENS) if positions == "original" else None
    hidden = read_packed(learner.model, learner.before, visual, words, places)
    return learner.model.lm_head(hidden)


@pytest.mark.parametrize("dropped", ["", "contiguous", "original"])
@torch.no_grad()
def test_packed_questions_are_read_as_the_model_reads_each_alone(learner, dropped):
    """With dropped tokens: as the model reads it with a pruner that keeps the others."""
    images = [draw_scene(3, index, 48).image for index in range(2)]
    texts = [
        ["Is there a red star in the image?", "How many circles are there in the image?"],
        ["What colour is the small circle?", "What shape is the large red object?"],
    ]
    processor = build_processor(MODEL)
    tokenizer = processor.tokenizer
    rows = [
        [tokenizer(f"{t} ASSISTANT: yes", add_special_tokens=False)["input_ids"] for t in two]
        for two in texts
    ]
    width = max(len(row) for two in rows for row in two)
    words = torch.tensor([[row + [0] * (width - len(row)) for row in two] for two in rows])
    pixels = torch.stack([to_pixels(image) for image in images])
    keep = None
    if dropped:
        features, _ = learner.encode(pixels)
        keep = random_subset(learner.standardise(features), generator(4))
        assert 1 < keep.shape[1] < NUM_TOKENS
    found = packed_logits(learner, pixels, words, keep, dropped)
    for image in range(2):
        for number in range(2):
            prompt = f"USER: <image>\n{texts[image][number]} ASSISTANT: yes"
            inputs = processor(
                images=Image.fromarray(images[image]), text=prompt, return_tensors="pt"
            )
            if keep is None:
                alone = learner.model(**inputs).logits[0]
            else:
                pruner = Given(keep=keep[image][None], num_keep=keep.shape[1])
                with pruner(learner.model, positions=dropped):
                    alone = learner.model(**inputs).logits[0]
            length = len(rows[image][number])
            torch.testing.assert_close(
                found[image, number, :length], alone[-length:], atol=2e-4, rtol=1e-4
            )


@torch.no_grad()
def test_questions_do_not_see_each_other(learner):
    batch = tiny_batch(READ, 2)
    before = packed_logits(learner, batch.pixel_values, batch.words, None)
    changed = batch.words.clone()
    changed[:, 1] = 7
    after = packed_logits(learner, batch.pixel_values, changed, None)
    others = [0, 2, 3, 4]
    torch.testing.assert_close(before[:, others], after[:, others], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 1], after[:, 1], atol=1e-2)


def test_subsets_are_of_many_sizes_and_ascending():
    features = torch.randn(3, 144, 16, generator=generator())
    sizes = set()
    for seed in range(60):
        keep = random_subset(features, generator(seed))
        assert (keep.diff(dim=1) > 0).all()
        assert not torch.equal(keep[0], keep[1]) or keep.shape[1] == 1
        sizes.add(keep.shape[1])
    assert 6 <= min(sizes) < 9
    assert 90 < max(sizes) <= 108


def test_subsets_are_drawn_towards_a_direction():
    """Tokens in two clusters: many subsets are one-sided, some are even."""
    side = torch.arange(144) % 2 * 2.0 - 1
    features = side[None, :, None] * torch.ones(1, 1, 8)
    shares = []
    for seed in range(80):
        keep = random_subset(features, generator(seed))
        shares.append((side[keep] > 0).float().mean().item())
    assert sum(share > 0.8 for share in shares) > 10
    assert sum(share < 0.2 for share in shares) > 10
    assert sum(0.35 < share < 0.65 for share in shares) > 4


@torch.no_grad()
def test_folded_projector_is_the_models_own():
    learner = tiny_learner()
    batch = tiny_batch(READ)
    features, _ = learner.encode(batch.pixel_values)
    learner.begin(READ, batch, generator())
    standard = learner.standardise(features)
    assert standard.mean((0, 1)).abs().max() < 1e-3
    assert (standard.std((0, 1)) - 1).abs().max() < 0.05
    expected = learner.project(features)
    projector = learner.model.model.multi_modal_projector
    assert not torch.allclose(projector(features), expected, atol=1e-2)
    learner.fold()
    torch.testing.assert_close(projector(features), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_later_stage_keeps_what_the_projector_does():
    learner = tiny_learner()
    learner.begin(READ, tiny_batch(READ), generator())
    other = replace(READ, num_objects=(1, 1))
    features, _ = learner.encode(tiny_batch(READ).pixel_values)
    before, mean = learner.project(features), learner.mean.clone()
    learner.begin(other, tiny_batch(other), generator())
    assert not torch.equal(learner.mean, mean)
    torch.testing.assert_close(learner.project(features), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_fresh_attention_is_equal_and_orthogonal():
    learner = tiny_learner()
    learner.begin(replace(READ, fresh_attention=True), tiny_batch(READ), generator())
    for layer in learner.model.model.language_model.layers:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        assert torch.equal(query, key)
        torch.testing.assert_close(query @ key.T, 1.44 * torch.eye(32), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stage", "tower", "reader"), [(TOWER, True, False), (READ, False, True)], ids=["tower", "read"]
)
def test_a_stage_trains_its_part_alone(stage, tower, reader):
    learner = tiny_learner()
    batch = tiny_batch(stage)
    learner.begin(stage, batch, generator())
    before = {name: p.detach().clone() for name, p in learner.named_parameters()}
    optimizer = build_optimizer(learner, stage)
    sum(learner.loss(stage, batch, generator()).values()).backward()
    optimizer.step()
    changed = {n for n, p in learner.named_parameters() if not torch.equal(p, before[n])}
    in_tower = {n for n in changed if "vision_tower" in n or n.startswith("heads.")}
    assert bool(in_tower) == tower
    assert bool(changed - in_tower) == reader
    assert not any("linear_1" in name for name in changed)
    if reader:
        assert {"weight", "bias", "model.model.language_model.embed_tokens.weight"} <= changed
        assert any("q_proj" in name for name in changed)


def test_the_towers_loss_is_least_for_the_right_labels():
    learner = tiny_learner()
    batch = tiny_batch(TOWER)
    labels = batch.shape
    heads = learner.heads
    features = torch.zeros(*labels.shape, MODEL.tower_dim)
    patch = torch.full((*labels.shape, 13), -20.0)
    patch.scatter_(2, labels[..., None], 20.0)
    patch.scatter_(2, 6 + batch.colour.clamp(min=0)[..., None], 20.0)
    patch = torch.cat([patch[..., :12], patch.new_full((*labels.shape, 2), -20.0)], dim=2)
    patch.scatter_(2, 12 + batch.size.clamp(min=0)[..., None], 20.0)
    kinds = 40 * batch.kinds - 20
    counts = torch.full((len(labels), 5, 5), -20.0)
    counts.scatter_(2, batch.counts[..., None], 20.0)
    outputs = {heads.patch: patch, heads.kinds: kinds, heads.counts: counts.flatten(1)}
    hooks = [
        module.register_forward_hook(lambda m, i, o, v=value: v)
        for module, value in outputs.items()
    ]
    pooled = torch.zeros(len(labels), MODEL.tower_dim)
    assert heads.loss(features, pooled, batch) < 1e-6
    wrong = replace(batch, shape=(labels + 1) % 6)
    assert heads.loss(features, pooled, wrong) > 1
    wrong = replace(batch, counts=(batch.counts + 1) % 5)
    assert heads.loss(features, pooled, wrong) > 1
    for hook in hooks:
        hook.remove()


def test_alignment_is_least_where_patches_are_their_words():
    learner = tiny_learner()
    batch = tiny_batch(READ)
    shown = (batch.shape > 0)[..., None]
    embeddings = learner.model.get_input_embeddings().weight
    with torch.no_grad():  # embeddings of words far apart
        noise = torch.randn(len(embeddings), 32, generator=generator())
        embeddings.copy_(4 * noise / noise.norm(dim=1, keepdim=True))
    numbers = names_of_patches(word_tokenizer())

    def of(names, labels):
        table = torch.stack([embeddings[numbers[name]] for name in names])
        return table[labels.clamp(min=0)]

    object_word = embeddings[numbers["object"]]
    right = of(SHAPES, batch.shape - 1) + of(tuple(COLOURS), batch.colour)
    right = right + of(("small", "large"), batch.size) + object_word
    visual = torch.where(shown, right, -object_word)
    with torch.no_grad():
        good = align_loss(visual, batch, embeddings, numbers)
        for name, number in (("shape", 5), ("colour", 6), ("size", 2)):
            labels, first = getattr(batch, name), int(name == "shape")
            for value in range(number):  # each label alone, taken for the next one
                wrong = torch.where(labels == value + first, (value + 1) % number + first, labels)
                changed = replace(batch, **{name: wrong})
                bad = align_loss(visual, changed, embeddings, numbers)
                assert good + 0.05 < bad, (name, value)


def test_dropping_changes_what_is_read(learner):
    batch = tiny_batch(READ)
    whole = learner.loss(READ, batch, generator())["answer"]
    never = learner.loss(replace(READ, drop=0.0), batch, generator(1))["answer"]
    always = learner.loss(replace(READ, drop=1.0), batch, generator())["answer"]
    assert torch.equal(whole, never)
    assert not torch.equal(whole, always)


def test_answer_loss_is_that_of_the_words(learner):
    """By hand, from the logits before the answer and at it."""
    batch = collate_two()
    with torch.no_grad():
        logits = packed_logits(learner, batch.pixel_values, batch.words, None).log_softmax(-1)
        found = learner.loss(READ, batch, generator())["answer"]
    total = 0.0
    for b in range(2):
        for q in range(READ.questions):
            at, answer = int(batch.answer_at[b, q]), int(batch.answer[b, q])
            total -= float(logits[b, q, at - 1, answer]) + 0.05 * float(logits[b, q, at, 2])
    assert float(found) == pytest.approx(total / (2 * READ.questions), rel=1e-4)


def collate_two():
    return tiny_batch(ENGLISH, 2)


def test_models_of_one_seed_are_equal_and_leave_torch_alone():
    tokenizer = word_tokenizer()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (build_model(MODEL, tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert first.lm_head.weight is first.get_input_embeddings().weight


def test_a_step_weighs_clips_and_follows_the_rate(tmp_path):
    """Against the same step by hand."""
    settings = tiny_settings(tmp_path, steps=10)
    stage = replace(READ, align=3.0, answer=0.5, steps=10, warmup=5, learning_rate=1e-2)
    batch = tiny_batch(stage)
    found, expected = tiny_learner(), tiny_learner()
    for learner in (found, expected):
        learner.begin(stage, batch, generator())
    _step(found, settings, stage, build_optimizer(found, stage), 2, batch, generator())
    terms = expected.loss(stage, batch, generator())
    (3.0 * terms["align"] + 0.5 * terms["answer"]).backward()
    assert all(p.grad is None for p in expected.model.model.vision_tower.parameters())
    optimizer = build_optimizer(expected, stage)
    parameters = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    assert norm > 1.5, "nothing to clip"
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= norm
            torch.testing.assert_close(
                dict(zip(parameters, _parameters(found), strict=True))[parameter].grad,
                parameter.grad,
                atol=1e-5,
                rtol=1e-4,
            )
    optimizer.param_groups[0]["lr"] = 1e-2 * 3 / 5
    optimizer.step()
    for a, b in zip(_parameters(found), parameters, strict=True):
        assert (a - b).abs().mean() < 1e-5  # Adam's first step turns on the sign of a gradient


def _parameters(learner):
    return build_optimizer(learner, READ).param_groups[0]["params"]
