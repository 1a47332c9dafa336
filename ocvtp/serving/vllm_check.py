"""Questions about drawn images, asked of vLLM with a pruner and of transformers with the same one.

vLLM is imported when its engine is started.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ocvtp.data.scenes import draw_scene
from ocvtp.hosts.attach import attached
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.pruners import Pruner
from ocvtp.serving.plan import KEY

_QUESTIONS = ("how many circles are there in the image?", "is there a red square in the image?")
_SIZES = ((112, 96), (160, 96), (96, 200))
"""Widths and heights. None is square: where one tile repeats the base view token by token, the last
bit of a sum decides which of two equal tokens stays."""
_LONGEST = 4096  # of a prompt with its answer


@dataclass
class Found:
    """One request.

    Args:
        question: without the template.
        visual_tokens: of each image before pruning. visual_tokens_kept: after.
        prompt_tokens: that the language model reads.
        answer: tokens of transformers.
        differs: what vLLM did otherwise, in words.
    """

    question: str
    visual_tokens: list[int]
    visual_tokens_kept: list[int]
    prompt_tokens: int
    answer: list[int]
    differs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """A prompt in the model's template, and its images."""

    question: str
    prompt: str
    images: list[Image.Image]


def check(
    model: str,
    pruner: Pruner,
    settings: Mapping[str, Any],
    new_tokens: int,
    chunk: int,
    dtype: str,
    memory: float,
) -> list[Found]:
    """Ask both, vLLM twice: prompts at once, and in chunks.

    Args:
        model: folder or hub id. pruner: of transformers' side.
        settings: of the engine, which names the same pruner.
        new_tokens: of an answer; none ends before.
        chunk: tokens of prompts that the engine reads in a step, the second time.
        dtype: see `load_model`. memory: share of a GPU's that the engine may take.

    Raises:
        ValueError: if the model cannot be loaded, or not with this pruner.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vlm, processor = load_model(model, dtype, device)
    requests = requests_of(processor)
    tiling = {name: settings.get(name, plain) for name, plain in _TILING.items()}
    found = by_transformers(vlm, processor, pruner, requests, new_tokens, tiling)
    longest = min(vlm.config.get_text_config().max_position_embeddings, _LONGEST)
    precision = str(vlm.dtype).removeprefix("torch.")
    del vlm
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    shared = {
        "model": model,
        "dtype": precision,
        "max_model_len": longest,
        "max_num_seqs": min(len(requests), chunk),
        "enforce_eager": True,
        "gpu_memory_utilization": memory,
        "limit_mm_per_prompt": {"image": 2},
        "hf_overrides": {KEY: dict(settings)},
    }
    for name, chunks in (("prompts at once", {}), (f"in chunks of {chunk}", _chunks(chunk))):
        compare(found, by_vllm({**shared, **chunks}, requests, new_tokens), name)
    return found


_TILING = {"budget": "per_image", "separators": "all"}


def _chunks(size: int) -> dict[str, Any]:
    return {"enable_chunked_prefill": True, "max_num_batched_tokens": size}


def requests_of(processor: Any) -> list[Request]:
    """Every question about images of several shapes, and one about two images."""
    images = []
    for number, size in enumerate(_SIZES):
        images.append(Image.fromarray(draw_scene(seed=11, index=number).image).resize(size))
    asked = [(question, [image]) for image in images for question in _QUESTIONS]
    asked.append((_QUESTIONS[0], [images[0], images[2]]))
    return [Request(q, with_template(processor, q, len(some)), some) for q, some in asked]


@torch.inference_mode()
def by_transformers(
    vlm: Any,
    processor: Any,
    pruner: Pruner,
    requests: Sequence[Request],
    new_tokens: int,
    tiling: Mapping[str, Any],
) -> list[Found]:
    """Greedy answers with the pruner attached, each request alone."""
    prompts: list[Prompt] = []
    found = []
    pruned = attached(vlm, pruner, processor=processor, on_prune=prompts.append, **tiling)
    with pruned, _without_defaults(vlm):
        for one in requests:
            inputs = processor(images=one.images, text=[one.prompt], return_tensors="pt")
            inputs = inputs.to(vlm.device, vlm.dtype)
            made = vlm.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            counts = prompts.pop().summary()
            found.append(
                Found(
                    one.question,
                    counts["visual_tokens"],
                    counts["visual_tokens_kept"],
                    counts["prompt_tokens_kept"][0],
                    made[0, inputs["input_ids"].shape[1] :].tolist(),
                )
            )
    return found


@contextmanager
def _without_defaults(vlm: Any) -> Iterator[None]:
    """Leave out what the model's generation config adds, as `by_vllm` does.

    Engines read other places: where an answer ends, and what a repeated word costs, would differ.
    """
    before = vlm.generation_config
    vlm.generation_config = type(before)(pad_token_id=before.pad_token_id)
    try:
        yield
    finally:
        vlm.generation_config = before


def by_vllm(
    engine: Mapping[str, Any], requests: Sequence[Request], new_tokens: int
) -> list[tuple[int, list[int]]]:
    """Tokens of each prompt and its answer, greedy, all requests at once."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**engine)
    try:
        prompts = [
            {"prompt": one.prompt, "multi_modal_data": {"image": one.images}} for one in requests
        ]
        settings = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        outputs = llm.generate(prompts, settings, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    return [(len(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]


def compare(found: Sequence[Found], other: Sequence[tuple[int, list[int]]], how: str) -> None:
    """Note of every request what vLLM did otherwise.

    Args:
        found: of transformers. other: of vLLM, see `by_vllm`.
        how: vLLM read the prompts.
    """
    for number, (own, (length, answer)) in enumerate(zip(found, other, strict=True)):
        which = f"request {number} ({how})"
        if length != own.prompt_tokens:
            own.differs.append(
                f"{which}: its prompt has {length} tokens in vLLM, and {own.prompt_tokens} in"
                " transformers"
            )
        elif answer != own.answer:
            own.differs.append(
                f"{which}: vLLM answers {answer}, and transformers {own.answer} (tokens)"
            )
