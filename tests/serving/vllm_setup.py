"""vLLM's configurations, models and engines for tests; who imports this is skipped without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from served import DEMO

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm import LLM, SamplingParams
from vllm import ModelRegistry as ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError as VLLMValidationError
from vllm.model_executor.model_loader import get_model
from vllm.multimodal import MULTIMODAL_REGISTRY as MULTIMODAL_REGISTRY
from vllm.multimodal.parse import MultiModalUUIDItems as MultiModalUUIDItems
from vllm.platforms import current_platform

from ocvtp.serving.plan import Plan
from ocvtp.serving.vllm_plugin import register

if not current_platform.device_type:
    reason = "vLLM found no device; VLLM_TARGET_DEVICE=cpu, which make test-vllm sets, names one"
    pytest.skip(reason, allow_module_level=True)
register()


def skip_without_kernels() -> None:
    """Skip a module of tests that run whole engines."""
    if not (current_platform.is_cuda() or (current_platform.is_cpu() and find_spec("vllm._C"))):
        reason = "this build of vLLM has no kernels for this machine"
        pytest.skip(reason, allow_module_level=True)


def arguments(folder: Any, spec: str = "divprune", num_keep: int = 5, **more: Any) -> EngineArgs:
    """Of an engine in fp32 with a pruner; `more` goes first."""
    given = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True} | more
    given = {"hf_overrides": {"ocvtp": {"pruner": spec, "num_keep": num_keep}}} | given
    return EngineArgs(model=str(folder), limit_mm_per_prompt={"image": 3}, **given)


@contextmanager
def process_groups(store: Path) -> Iterator[None]:
    """vLLM's, of this process alone.

    Args:
        store: a file that is not there yet.
    """
    with set_current_vllm_config(arguments(DEMO).create_engine_config()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()


def build(given: EngineArgs) -> tuple[Any, Any]:
    """A model by vLLM's loader, inside of `process_groups`, and its processor."""
    config = given.create_engine_config()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config).eval()
    return model, MULTIMODAL_REGISTRY.create_processor(config.model_config)


@contextmanager
def under(plan: Plan, *holders: Any) -> Iterator[None]:
    """Another plan than that with which models and infos of processors were made."""
    before = [holder.plan for holder in holders]
    for holder in holders:
        holder.plan = plan
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.plan = own


def check_equal(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Within a share of the largest value."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


def ask(
    folder: Any,
    settings: dict[str, Any],
    requests: Sequence[tuple[str, list[Any], int | None]],
    new_tokens: int,
) -> list[list[Any]]:
    """vLLM's outputs, greedy, all requests at once: twice, so that what is cached is read.

    Args:
        folder: of the model. settings: of `ocvtp`.
        requests: texts, images, and K where the request has its own.
        new_tokens: of every answer.
    """
    engine = LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=1024,
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
        hf_overrides={"ocvtp": settings},
    )
    prompts: list[Any] = []
    for text, images, num_keep in requests:
        prompts.append({"prompt": text})
        if images:
            prompts[-1]["multi_modal_data"] = {"image": images}
        if num_keep is not None:
            prompts[-1]["mm_processor_kwargs"] = {"ocvtp": {"num_keep": num_keep}}
    greedy = SamplingParams(max_tokens=new_tokens, temperature=0, logprobs=1, ignore_eos=True)
    try:
        return [engine.generate(prompts, greedy, use_tqdm=False) for _ in range(2)]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def answer(output: Any) -> tuple[list[int], float]:
    """Tokens of an output of `ask`, and the logarithm of the first one's probability."""
    (made,) = output.outputs
    ids = list(made.token_ids)
    return ids, made.logprobs[0][ids[0]].logprob
