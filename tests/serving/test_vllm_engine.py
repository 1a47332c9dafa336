"""vLLM's whole engine answers as transformers does with the pruner attached.

Runs where vLLM has kernels for the device: not with its CUDA build on a machine without a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from served import DEMO, NETWORK, built, load, overrides

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform

if not (current_platform.is_cuda() or (current_platform.is_cpu() and find_spec("vllm._C"))):
    pytest.skip("this build of vLLM has no kernels for this machine", allow_module_level=True)

NUM_KEEP = 12
QUESTIONS = ("how many circles are there in the image?", "is there a red square in the image?")


def images() -> list[Any]:
    """Three drawings of a square and a circle."""
    from PIL import Image, ImageDraw

    drawn = []
    for number, colour in enumerate(("red", "blue", "green")):
        image = Image.new("RGB", (96 + 40 * number, 96), "white")
        pen = ImageDraw.Draw(image)
        pen.rectangle((10, 10, 35 + 8 * number, 35 + 8 * number), fill=colour)
        pen.ellipse((55, 50, 85, 80), fill="blue")
        drawn.append(image)
    return drawn


def requests() -> list[tuple[str, list[Any]]]:
    """Texts and images: each question of each image, and two images in one prompt."""
    first, second, third = images()
    asked = [(f"<image>\n{q}", [image]) for image in (first, second, third) for q in QUESTIONS]
    return [*asked, (f"<image>\n<image>\n{QUESTIONS[0]}", [first, third])]


@torch.inference_mode()
def by_transformers(spec: str) -> list[tuple[list[int], float]]:
    """Answers, token by token, and the logarithm of the first one's probability."""
    from transformers import AutoProcessor

    model, processor = load(DEMO), AutoProcessor.from_pretrained(DEMO)
    answers = []
    with built(spec, NUM_KEEP)(model):
        for text, pictures in requests():
            inputs = processor(images=pictures, text=text, return_tensors="pt")
            output = model.generate(
                **inputs,
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            answers.append((ids, output.logits[0][0].log_softmax(-1)[ids[0]].item()))
    return answers


def by_vllm(spec: str) -> tuple[list[tuple[list[int], float]], list[int]]:
    """The same of vLLM, all requests at once; and how many tokens its prompts had."""
    engine = LLM(
        model=str(DEMO),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        gpu_memory_utilization=0.2,
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": 2},
        disable_log_stats=True,
        hf_overrides=overrides(spec, NUM_KEEP),
    )
    try:
        prompts: Any = [
            {"prompt": text, "multi_modal_data": {"image": pictures}}
            for text, pictures in requests()
        ]
        settings = SamplingParams(max_tokens=6, temperature=0, logprobs=1)
        outputs = engine.generate(prompts, settings, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
    answers, lengths = [], []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        answers.append((ids, output.outputs[0].logprobs[0][ids[0]].logprob))
        lengths.append(len(output.prompt_token_ids))
    return answers, lengths


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["visionzip", "divprune", f"ocvtp:checkpoint={NETWORK}"])
def test_the_engine_answers_as_transformers_does(spec):
    answers, lengths = by_vllm(spec)
    expected = by_transformers(spec)
    assert [ids for ids, _ in answers] == [ids for ids, _ in expected]
    for (_, found), (_, wanted) in zip(answers, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)
    bare = whole_lengths()
    assert lengths == [length - count * (144 - NUM_KEEP) for length, count in bare]


def whole_lengths() -> list[tuple[int, int]]:
    """Of each request: tokens of its prompt with all visual tokens, and images."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(DEMO)
    return [
        (len(processor(images=pictures, text=text)["input_ids"][0]), len(pictures))
        for text, pictures in requests()
    ]
