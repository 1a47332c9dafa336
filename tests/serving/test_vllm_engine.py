"""vLLM's whole engine answers as transformers does with the pruner attached.

Runs where vLLM has kernels for the device: not with its CUDA build on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served import FAMILIES, NETWORK, PLACEHOLDER, built, image, load, save
from vllm_setup import answer, ask, skip_without_kernels

import ocvtp

skip_without_kernels()
NUM_KEEP, NEW_TOKENS = 12, 6
QUESTIONS = ("how many circles are there in the image?", "is there a red square in the image?")
SIZES = {family: ((96, 96), (136, 96), (96, 176)) for family in FAMILIES}
SIZES["onevision"] = ((96, 96), (200, 100), (100, 210))  # larger ones are resized
CASES = [
    ("clip", "visionzip", {}),
    ("clip", "divprune", {}),
    ("clip", f"ocvtp:checkpoint={NETWORK}", {}),
    ("siglip", "divprune", {}),
    ("next", "visionzip", {"separators": "all"}),
    ("next", "fopru", {"separators": "none", "budget": "per_tile"}),
    ("onevision", "visiondrop", {"separators": "all"}),
    ("internvl", "visionzip", {}),
    ("internvl", "divprune", {"budget": "per_tile"}),
]


def requests(family: str) -> list[tuple[str, list[Any], int | None]]:
    """Texts, images, and K where the request has its own: the same images at several K."""
    first, second, third = (image(number, size) for number, size in enumerate(SIZES[family]))
    one = f"{PLACEHOLDER[family]}\n"
    asked: list[tuple[str, list[Any], int | None]] = []
    for picture in (first, second, third):
        asked += [(one + question, [picture], None) for question in QUESTIONS]
    asked += [
        (one + QUESTIONS[0], [picture], num_keep)
        for picture, num_keep in ((first, 4), (second, 30), (third, 5000))
    ]
    return [*asked, (one + one + QUESTIONS[0], [first, third], None)]


@torch.inference_mode()
def by_transformers(folder: Any, family: str, spec: str, tiling: Any) -> list[Any]:
    """Answers, token by token, the logarithm of the first one's probability, and prompt lengths."""
    from transformers import AutoProcessor

    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # vLLM would stop at the tokenizer's
    answers = []
    for text, pictures, num_keep in requests(family):
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        seen: list[Any] = []
        pruner = built(spec, num_keep or NUM_KEEP)
        handle = ocvtp.attach(model, pruner, on_prune=seen.append, **tiling)
        try:
            output = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        finally:
            handle.remove()
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        first = output.logits[0][0].log_softmax(-1)[ids[0]].item()
        answers.append((ids, first, seen[0].short_length))
    return answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec", "tiling"), CASES)
def test_the_engine_answers_as_transformers_does(folders, family, spec, tiling):
    tiling = {"separators": "all", **tiling}
    expected = by_transformers(folders[family], family, spec, tiling)
    settings = {"pruner": spec, "num_keep": NUM_KEEP, **tiling}
    turns = ask(folders[family], settings, requests(family), NEW_TOKENS)
    for outputs in turns:
        for output, (ids, likely, length) in zip(outputs, expected, strict=True):
            assert len(output.prompt_token_ids) == length
            assert answer(output) == (ids, pytest.approx(likely, abs=1e-3))
    assert any(output.num_cached_tokens for output in turns[1])
