"""vLLM's whole engine answers about images as transformers does with the pruner attached: Qwen-VL.

Runs where vLLM has kernels for the device: not with its CUDA build on a machine without a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from served_qwen import answer, built, drawn, load, prompt, save

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

if not (current_platform.is_cuda() or (current_platform.is_cpu() and find_spec("vllm._C"))):
    pytest.skip("this build of vLLM has no kernels for this machine", allow_module_level=True)

MOST = 16  # what the engine keeps where a request says nothing
SERVED = {
    "qwen2-vl": "fopru",
    "qwen2.5-vl": "divprune",
    "qwen3-vl": "visionzip:guidance=received",
}


def requests(processor: Any) -> list[tuple[str, list[Any], int]]:
    """Prompts, their images, and how many tokens of each are to stay."""
    wide, tall = drawn(300, 200, "white"), drawn(120, 330, "blue")
    small, square = drawn(60, 40, "gray"), drawn(200, 200, "red")
    asked = [
        ([wide], MOST),
        ([tall], 9),
        ([wide], 9),
        ([small], MOST),
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
        answer(model, processor, built(spec, num_keep), text, images)
        for text, images, num_keep in asked
    ]
    engine = LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=16,  # parts of a prompt that split images
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": 2},
        disable_log_stats=True,
        hf_overrides={"ocvtp": {"pruner": spec, "num_keep": MOST}},
    )
    prompts: list[Any] = []
    for text, images, num_keep in asked:
        own: dict[str, Any] = {"prompt": text}
        if images:
            own["multi_modal_data"] = {"image": images}
        if num_keep != MOST:
            own["mm_processor_kwargs"] = {"ocvtp": {"num_keep": num_keep}}
        prompts.append(own)
    settings = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    try:
        turns = [engine.generate(prompts, settings, use_tqdm=False) for _ in range(2)]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
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
            ids = list(output.outputs[0].token_ids)
            assert ids == wanted
            assert output.outputs[0].logprobs[0][ids[0]].logprob == pytest.approx(likely, abs=1e-3)


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
