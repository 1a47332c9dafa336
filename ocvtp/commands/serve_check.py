"""`ocvtp serve-check`: whether an engine with a pruner answers as transformers does."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ocvtp.commands import options, output
from ocvtp.commands.serve import check_vllm, served
from ocvtp.serving.vllm_check import Found, check


def run(arguments: argparse.Namespace) -> int:
    """Compare and say; the exit status is 1 if anything differs."""
    options.check_counts(arguments, "max_new_tokens", "chunk")
    model, settings, plan = served(arguments)
    check_vllm()
    with output.kept_for_results():  # vLLM writes its log there
        found = check(
            model,
            plan.pruner,
            settings,
            new_tokens=arguments.max_new_tokens,
            chunk=arguments.chunk,
            dtype=arguments.dtype,
            memory=arguments.gpu_memory_utilization,
        )
    equal = not any(one.differs for one in found)
    facts = {"pruner": settings["pruner"], "equal": equal, "requests": [asdict(f) for f in found]}
    output.emit(facts, _text(found, arguments.chunk), arguments.json)
    return 0 if equal else 1


def _text(found: list[Found], chunk: int) -> str:
    lines = [line for one in found for line in one.differs]
    tokens = ", ".join(
        f"{'+'.join(map(str, one.visual_tokens))} -> {'+'.join(map(str, one.visual_tokens_kept))}"
        for one in found
    )
    new = sum(len(one.answer) for one in found)
    counts = f"visual tokens {tokens}; {new} new tokens in {len(found)} answers"
    if lines:
        return "\n".join([*lines, f"differs ({counts})"])
    if all(one.visual_tokens_kept == one.visual_tokens for one in found):
        return f"equal, but nothing was pruned ({counts}); pass a budget below these numbers"
    return f"pruned, equal ({counts}; prompts whole and in chunks of {chunk})"
