"""vLLM's whole engine answers about images as transformers does with the pruner attached: Qwen-VL.

Runs where vLLM has kernels for the device: not with its CUDA build on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
from served import built
from served_qwen import NEW_TOKENS, answered, drawn, load, prompt, save
from vllm_setup import answer, ask, skip_without_kernels

skip_without_kernels()
MOST = 16  # what the engine keeps where a request says nothing
SERVED = {
    "qwen2-vl": "fopru",
    "qwen2.5-vl": "divprune",
    "qwen3-vl": "visionzip:guidance=received",
}


def requests(processor: Any) -> list[tuple[str, list[Any], int | None]]:
    """Prompts, their images, and K where the request has its own."""
    wide, tall = drawn(300, 200, "white"), drawn(120, 330, "blue")
    small, square = drawn(60, 40, "gray"), drawn(200, 200, "red")
    asked = [
        ([wide], None),
        ([tall], 9),
        ([wide], 9),
        ([small], None),
        ([square, wide], 12),
        ([wide], 1),
        ([tall], 30),
        ([], 8),
    ]
    return [
        (prompt(processor, len(images), f"what is it, number {n}?"), images, num_keep)
        for n, (images, num_keep) in enumerate(asked)
    ]


@pytest.fixture(scope="module", params=SERVED)
def answers(request, tmp_path_factory):
    """Of transformers, and of the engine: all requests at once, twice."""
    folder, spec = save(request.param, tmp_path_factory.mktemp("qwen")), SERVED[request.param]
    model, processor = load(folder)
    asked = requests(processor)
    expected = [
        answered(model, processor, built(spec, num_keep or MOST), text, images)
        for text, images, num_keep in asked
    ]
    turns = ask(folder, {"pruner": spec, "num_keep": MOST}, asked, NEW_TOKENS)
    whole = [
        len(processor(text=text, images=images or None)["input_ids"][0])
        for text, images, _ in asked
    ]
    return expected, turns, whole


@pytest.mark.slow
def test_the_engine_answers_as_transformers_does(answers):
    expected, turns, _ = answers
    for outputs in turns:
        for output, (wanted, likely) in zip(outputs, expected, strict=True):
            assert answer(output) == (wanted, pytest.approx(likely, abs=1e-3))


@pytest.mark.slow
def test_prompts_are_shorter_and_their_blocks_are_used_again(answers):
    _, (first, second), whole = answers
    lengths = [len(output.prompt_token_ids) for output in first]
    assert lengths[3] == whole[3]  # an image of fewer tokens stays as it is
    assert lengths[7] == whole[7]
    for number in (0, 1, 2, 4, 5, 6):
        assert lengths[number] < whole[number]
    assert lengths[0] - lengths[2] == MOST - 9
    assert [output.num_cached_tokens for output in second] == [
        (length - 1) // 32 * 32 for length in lengths
    ]
