"""Learned selectors that read the prompt, on a model of every family: rows of a batch are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import selector
from torch import Tensor
from torch.testing import assert_close

import ocvtp
from ocvtp.hosts.asking import Asker, before_layer
from ocvtp.hosts.loading import RANDOM_MODELS, load_model
from ocvtp.ops.selection import top_k
from ocvtp.pruners.selector_pruner import at_layer
from ocvtp.structures import Needs

pytestmark = pytest.mark.sampled(4)

WORDS = ["what is it?", "how many are there, and where?"]
VIP = {"block": 1, "hidden": [2, 1], "dim": 8, "condition": 8, "blocks": 1, "heads": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "before": ("learned", "prompted", {}),
    "inside": ("learned_layers", "prompted", {}),
    "inside, by the tower": ("learned_layers", "vip", VIP),
    "inside, by every head": ("learned_layers", "vip", VIP | {"kind": "last_heads"}),
    "inside, by a column of its own": ("learned_layers", "vip", VIP | {"learnt": True}),
}


@pytest.fixture(scope="module", params=RANDOM_MODELS)
def subject(request: pytest.FixtureRequest) -> Any:
    return load_model(request.param)


def asked(processor: Any, words: list[str]) -> Any:
    """All about one image."""
    unit = 28 if "Qwen2" in type(processor).__name__ else 32
    pixels = np.random.default_rng(0).integers(0, 256, (4 * unit, 4 * unit, 3), dtype=np.uint8)
    talks = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one}]}]
        for one in words
    ]
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    images = [[pixels] for _ in words]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


def build(model: Any, case: str, num_keep: int = 6) -> Any:
    """Before the first layer where tokens may be dropped; prompts weigh more than at random."""
    name, scorer, sizes = CASES[case]
    text, vision = model.config.get_text_config(), model.config.vision_config
    tower = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL says its own
    layer = 2 if "qwen3" in model.config.model_type else 1  # which adds to tokens until there
    config: dict[str, Any] = {"sizes": sizes} if sizes else {}
    budget: dict[str, Any] = {"num_keep": num_keep}
    if name == "learned_layers":
        budget = {"stages": ((layer, num_keep),)}
        config |= {"layer": layer, "heads": text.num_attention_heads}
    network = selector(
        "llm_layers" if config.get("layer") else "llm_input",
        tower,
        scorer,
        text.hidden_size,
        **config,
    )
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 3
    return ocvtp.build_pruner(name, network=network, **budget)


@pytest.mark.parametrize("case", [case for case in CASES if case != "before"])
def test_training_and_inference_read_the_same(subject: Any, case: str) -> None:
    model, processor = subject
    pruner = build(model, case)
    found: list[Tensor] = []
    pruner.network.register_forward_hook(lambda *call: found.append(call[2].values))
    inputs, needs = asked(processor, WORDS[:1]), pruner.network.scorer.needs
    with pruner(model, processor=processor):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    read = Needs(hidden=needs.hidden)
    with Asker(model, processor, read) as asker, torch.no_grad():
        questions = asker.ask(inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool))
        reads = needs.attention, needs.column
        inside = before_layer(asker.host, questions, pruner.layer, *reads)
        scores = pruner.network(at_layer(inside.tokens, needs)).values
    assert_close(scores[inside.tokens.real], found[0].flatten(), rtol=1e-4, atol=1e-5)


def scored(subject: Any, case: str, words: list[str]) -> tuple[Tensor, Tensor]:
    """Scores [B, N] and tokens [B, K] of the image under each of the questions."""
    model, processor = subject
    pruner = build(model, case)
    found: list[Tensor] = []
    pruner.network.register_forward_hook(lambda *call: found.append(call[2].values))
    with pruner(model, processor=processor):
        model.generate(**asked(processor, words), max_new_tokens=1, do_sample=False)
    scores = torch.cat(found)
    return scores, top_k(scores, 6).keep_indices


@pytest.mark.parametrize("case", CASES)
def test_questions_are_answered_apart(subject: Any, case: str) -> None:
    scores, kept = scored(subject, case, WORDS)
    assert len(scores) == 2
    for row, words in enumerate(WORDS):
        alone = scored(subject, case, [words])
        # networks of random weights enlarge what processors round otherwise in another batch
        assert_close(alone[0][0], scores[row], atol=5e-3, rtol=1e-4)
        assert alone[1][0].equal(kept[row])
    assert not torch.allclose(scores[0], scores[1], atol=0.1), "the question changes nothing"


def test_nothing_sees_a_column_of_its_own(subject: Any) -> None:
    """Where all tokens stay, answers are bit for bit those under a scorer without one."""
    model, processor = subject
    inputs, found = asked(processor, WORDS), []
    for case in ("inside, by every head", "inside, by a column of its own"):
        with build(model, case, num_keep=1000)(model, processor=processor), torch.no_grad():
            made = model.generate(
                **inputs,
                max_new_tokens=3,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        found.append((made.sequences, torch.stack(made.scores)))
    for without, beside in zip(*found, strict=True):
        assert beside.equal(without)


def test_positions_are_those_of_the_training() -> None:
    model, processor = load_model("random:tiny-llava")
    inputs = asked(processor, WORDS[:1])
    found = {}
    for trained in ("contiguous", "original"):
        text, vision = model.config.text_config, model.config.vision_config
        sizes = (vision.hidden_size, "pointwise", text.hidden_size)
        pruner = ocvtp.build_pruner(
            "learned", network=selector("llm_input", *sizes, positions=trained), num_keep=6
        )
        for asked_for in (None, "contiguous", "original"):
            seen: list[Any] = []
            with pruner(model, positions=asked_for, on_prune=seen.append):
                model(**inputs)
            gaps = seen[0].positions is not None
            found[trained, asked_for] = gaps
    assert found == {
        (trained, asked_for): (asked_for or trained) == "original"
        for trained in ("contiguous", "original")
        for asked_for in (None, "contiguous", "original")
    }
