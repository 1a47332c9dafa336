"""vLLM's whole engine answers as transformers does with the pruner attached.

Runs where vLLM has kernels for the device: not with its CUDA build on a machine without a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from served import FAMILIES, NETWORK, PLACEHOLDER, built, image, load, save

import ocvtp

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

if not (current_platform.is_cuda() or (current_platform.is_cpu() and find_spec("vllm._C"))):
    pytest.skip("this build of vLLM has no kernels for this machine", allow_module_level=True)

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


def by_vllm(folder: Any, family: str, spec: str, tiling: Any) -> list[list[Any]]:
    """The same of vLLM, all requests at once: twice, so that what is cached is read."""
    engine = LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        block_size=32,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": 2},
        disable_log_stats=True,
        hf_overrides={"ocvtp": {"pruner": spec, "num_keep": NUM_KEEP, **tiling}},
    )
    try:
        prompts: Any = []
        for text, pictures, num_keep in requests(family):
            prompts.append({"prompt": text, "multi_modal_data": {"image": pictures}})
            if num_keep is not None:
                prompts[-1]["mm_processor_kwargs"] = {"ocvtp": {"num_keep": num_keep}}
        settings = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logprobs=1, ignore_eos=True)
        runs = [engine.generate(prompts, settings, use_tqdm=False) for _ in range(2)]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
    answers = []
    for outputs in runs:
        answers.append([])
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            first = output.outputs[0].logprobs[0][ids[0]].logprob
            answers[-1].append((ids, first, len(output.prompt_token_ids)))
    assert any(output.num_cached_tokens for output in runs[1])
    return answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec", "tiling"), CASES)
def test_the_engine_answers_as_transformers_does(folders, family, spec, tiling):
    tiling = {"separators": "all", **tiling}
    expected = by_transformers(folders[family], family, spec, tiling)
    for found in by_vllm(folders[family], family, spec, tiling):
        assert [length for _, _, length in found] == [length for _, _, length in expected]
        assert [ids for ids, _, _ in found] == [ids for ids, _, _ in expected]
        for (_, first, _), (_, wanted, _) in zip(found, expected, strict=True):
            assert first == pytest.approx(wanted, abs=1e-3)
