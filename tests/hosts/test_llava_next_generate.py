"""generate() of a pruned LLaVA-NeXT, in every mode, against prompts pruned by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import ask, assert_close, fingerprint
from reference_next import BATCH, ONE, SEVERAL, best_cells, make_next, shorten_next, single_next
from tiny_models import IMAGE_TOKEN
from transformers import CompileConfig

from ocvtp import Pruner, build_pruner
from ocvtp.hosts.loading import load_model

NUM_NEW = 5
pytestmark = pytest.mark.usefixtures("untouched_next")
PROMPTS = {"several": SEVERAL, "batch": BATCH}
prompts = pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
budgets = pytest.mark.parametrize("budget", ["per_image", "per_tile"])
GREEDY = {  # ways to the same answer
    "plain": {},
    "no_cache": {"use_cache": False},
    "static_cache": {"cache_implementation": "static"},
    "chunks_of_7": {"prefill_chunk_size": 7},
}
SPECULATIVE = {"prompt_lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {}}
OTHER = {
    "beams": {"num_beams": 3, "do_sample": False},
    "several_beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "several_samples": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
}


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


def by_hand(model: Any, inputs: Any, budget: str = "per_image", separators: str = "rows") -> Any:
    return shorten_next(model, inputs, best_cells(model, inputs, 5, budget), separators)


def answer_of(model: Any, inputs: Any, **settings: Any) -> torch.Tensor:
    """The answer; checks that the caller's prompt stands in front of it."""
    sequences = model.generate(**inputs, max_new_tokens=NUM_NEW, **settings)
    ids = inputs["input_ids"]
    repeats = len(sequences) // len(ids)
    assert torch.equal(sequences[:, : ids.shape[1]], ids.repeat_interleave(repeats, dim=0))
    return sequences[:, ids.shape[1] :]


@prompts
@budgets
@pytest.mark.parametrize("mode", GREEDY)
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_greedy_equals_a_hand_written_loop(
    llava_next: Any, pruner: Pruner, rows: Any, budget: Any, mode: str, positions: Any
) -> None:
    inputs = make_next(rows)
    model = deepcopy(llava_next) if mode == "static_cache" else llava_next
    expected = by_hand(llava_next, inputs, budget).greedy(NUM_NEW, positions)
    with pruner(model, budget=budget, positions=positions):
        actual = answer_of(model, inputs, do_sample=False, **GREEDY[mode])
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("separators", ["all", "none"])
@budgets
def test_other_separators(llava_next: Any, pruner: Pruner, budget: Any, separators: Any) -> None:
    inputs = make_next(BATCH)
    expected = by_hand(llava_next, inputs, budget, separators).greedy(NUM_NEW)
    with pruner(llava_next, budget=budget, separators=separators):
        assert torch.equal(answer_of(llava_next, inputs, do_sample=False), expected)


@pytest.mark.parametrize("rows", [ONE, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("mode", SPECULATIVE)
def test_speculative_decoding_changes_nothing(
    llava_next: Any, pruner: Pruner, rows: Any, mode: str
) -> None:
    inputs, settings = make_next(rows), dict(SPECULATIVE[mode])
    model = deepcopy(llava_next)  # assisted decoding leaves settings on the model
    if mode == "assistant":
        settings["assistant_model"] = assistant = deepcopy(llava_next)
        assistant.lm_head.weight.data.mul_(torch.rand(assistant.lm_head.weight.shape) + 0.5)
    with pruner(model):
        actual = answer_of(model, inputs, do_sample=False, **settings)
    assert torch.equal(actual, by_hand(llava_next, inputs).greedy(NUM_NEW))


@prompts
@budgets
@pytest.mark.parametrize("mode", OTHER)
def test_beams_and_samples_equal_the_reference(
    llava_next: Any, pruner: Pruner, rows: Any, budget: Any, mode: str
) -> None:
    inputs, settings = make_next(rows), OTHER[mode]
    short = by_hand(llava_next, inputs, budget)
    torch.manual_seed(3)
    expected = short.generate(max_new_tokens=NUM_NEW, **settings)
    torch.manual_seed(3)
    with pruner(llava_next, budget=budget):
        assert torch.equal(answer_of(llava_next, inputs, **settings), expected)


def test_a_batch_equals_single_calls(llava_next: Any, pruner: Pruner) -> None:
    inputs = make_next(BATCH)
    with pruner(llava_next):
        batched = answer_of(llava_next, inputs, do_sample=False)
        for row in range(3):
            alone = answer_of(llava_next, single_next(inputs, row), do_sample=False)
            assert torch.equal(batched[row : row + 1], alone)


def test_lengths_are_those_without_a_pruner(llava_next: Any, pruner: Pruner) -> None:
    inputs = make_next(BATCH)
    length = inputs["input_ids"].shape[1]
    with pruner(llava_next):
        assert llava_next.generate(**inputs, max_length=length + 3).shape[1] == length + 3


def test_labels_are_shortened_with_the_prompt(llava_next: Any, pruner: Pruner) -> None:
    inputs = make_next(BATCH)
    short = by_hand(llava_next, inputs)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    with pruner(llava_next), torch.no_grad():
        loss = llava_next(**inputs, labels=labels).loss
    expected = llava_next.loss_function(short.logits(), short.gather(labels, -100), 128)
    assert_close(loss, expected, 1e-5)


@budgets
@pytest.mark.parametrize("images_again", [False, True])
def test_later_turns_equal_recomputing_everything(
    llava_next: Any, pruner: Pruner, budget: Any, images_again: bool
) -> None:
    inputs = make_next(BATCH)
    short, length = by_hand(llava_next, inputs, budget), inputs["input_ids"].shape[1]
    settings = {"do_sample": False, "suppress_tokens": [IMAGE_TOKEN], "max_new_tokens": NUM_NEW}
    with pruner(llava_next, budget=budget):
        first = llava_next.generate(**inputs, **settings, return_dict_in_generate=True)
        question = torch.randint(3, 99, (3, 4), generator=torch.Generator().manual_seed(5))
        ids = torch.cat([first.sequences, question], dim=1)
        more = torch.ones(3, ids.shape[1] - length, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], more], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        turn = inputs | turn if images_again else turn
        said = llava_next.generate(**turn, **settings, past_key_values=first.past_key_values)
    expected = short.greedy(NUM_NEW, after=ids[:, length:])
    assert torch.equal(said[:, ids.shape[1] :], expected)


def test_bfloat16_and_siglip(llava_next: Any, llava_next_siglip: Any) -> None:
    pruner, inputs = build_pruner("uniform", num_keep=9), make_next(BATCH)
    with pruner(llava_next_siglip):
        assert answer_of(llava_next_siglip, inputs, do_sample=False).shape == (3, NUM_NEW)
    model = deepcopy(llava_next).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with pruner(model), torch.no_grad():
        logits, answer = model(**inputs).logits, answer_of(model, inputs, do_sample=False)
    assert torch.equal(answer[:, 0], logits[:, -1].argmax(dim=-1))


def test_adapters(llava_next: Any, pruner: Pruner) -> None:
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(deepcopy(llava_next), config)
    inner, inputs = model.get_base_model(), make_next(BATCH)
    ask(model, inputs)  # PEFT leaves an attribute behind
    before = fingerprint(model)
    short = by_hand(inner, inputs)
    with pruner(model):
        assert torch.equal(ask(model, inputs), short.greedy(5))
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert all(grad.abs().max() > 0 for grad in grads)
    model.zero_grad(set_to_none=True)
    assert fingerprint(model) == before


def test_compiled_decoding(llava_next: Any, pruner: Pruner) -> None:
    model, inputs = deepcopy(llava_next), make_next(BATCH)
    torch.compiler.reset()
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compiling}
    with pruner(model):
        said = ask(model, inputs, **settings)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(said, by_hand(llava_next, inputs).greedy(5))


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_compiled_parts(llava_next: Any, pruner: Pruner, part: str) -> None:
    model, inputs = deepcopy(llava_next), make_next(ONE)
    torch.compiler.reset()
    getattr(model.model, part).compile(backend="eager")
    with pruner(model):
        assert torch.equal(ask(model, inputs), by_hand(llava_next, inputs).greedy(5))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models(llava_next: Any, pruner: Pruner) -> None:
    model, inputs = deepcopy(llava_next), make_next(BATCH)
    torch.compiler.reset()
    with pruner(model):
        logits = torch.compile(model, backend="eager")(**inputs).logits
    short = by_hand(llava_next, inputs)
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


def test_a_pipeline(pruner: Pruner) -> None:
    from PIL import Image
    from transformers import pipeline

    model, processor = load_model("random:tiny-llava-next")
    image = Image.linear_gradient("L").convert("RGB").resize((120, 70))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    talk = [{"role": "user", "content": content}]
    settings = {"max_new_tokens": 4, "do_sample": False}
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    prompts: list[Any] = []
    with pruner(model, on_prune=prompts.append):
        said = pipe(text=talk, generate_kwargs=settings, return_full_text=False)
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert prompts[0].summary()["visual_tokens_kept"] == [5]
    assert said[0]["generated_text"] == processor.decode(expected, skip_special_tokens=True)
