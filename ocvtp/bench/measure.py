"""One cell: every row once in every round, in random order.

Before the rounds, every row runs once while `ocvtp.bench.memory` watches it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocvtp.bench import samples
from ocvtp.bench import timeline as spans
from ocvtp.bench.memory import (
    CudaPeaks,
    Watch,
    cache_bytes,
    tensors_of,
    weight_bytes,
)
from ocvtp.bench.timeline import Marks, Tokens, watching
from ocvtp.bench.variants import Variant
from ocvtp.bench.workload import Request
from ocvtp.evaluation.runner import Subject, visual_token_counts
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host
from ocvtp.transformers_names import cache_of

Peaks = dict[str, tuple[int, int | None]]
"""Bytes allocated in every stage, and reserved by CUDA's allocator."""


@dataclass(eq=False)
class Bench:
    """Runs requests of one model.

    Args:
        subject: the model.
        new_tokens: of every answer; none ends earlier.
    """

    subject: Subject
    new_tokens: int
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.subject.model.device)
        self.host = find_host(self.subject.model)

    def rounds(
        self,
        request: Request,
        variants: Sequence[Variant],
        warmup: int,
        repetitions: int,
        tick: Callable[[str], None],
    ) -> dict[str, dict[str, list[float]]]:
        """Milliseconds of every row's `samples.PARTS` in every round after the warm-up.

        Args:
            request: what is asked. Its images are prepared once in a round, for all rows.
            variants: the rows.
            warmup: rounds that are not noted. repetitions: rounds that are.
            tick: called with a row's name when it has run.
        """
        order = np.random.default_rng(0)
        found: dict[str, dict[str, list[float]]] = {
            variant.key: {part: [] for part in samples.PARTS} for variant in variants
        }
        gc.collect()
        gc.freeze()  # so that collecting between rounds is quick
        gc.disable()
        try:
            for number in range(warmup + repetitions):
                prepared: list[float] = []
                with spans.wall_clock(self.device, prepared):
                    inputs = request.prepare(self.subject.processor, self.subject.model)
                for index in order.permutation(len(variants)):
                    variant = variants[index]
                    sample = self._time(variant, inputs, prepared[0])
                    if number >= warmup:
                        for part, value in sample.items():
                            found[variant.key][part].append(round(1e3 * value, 4))
                    tick(variant.key)
                gc.collect()
        finally:
            gc.enable()
            gc.unfreeze()
        return found

    @torch.no_grad()
    def look(self, variant: Variant, inputs: Any) -> dict[str, Any]:
        """What a row keeps, and where its memory goes; not timed.

        Returns:
            `kept`: counts of tokens; `savings` that have an effect; `kernels` of attention and
            `operations` by stage; `memory` in bytes.

        Raises:
            ValueError: if the pruner does not fit the model.
        """
        prompts: list[Prompt] = []
        with variant.installed(self.subject, on_prune=prompts.append) as handle:
            found = self._watch(variant, inputs)
            active = None if handle is None else handle.savings
        return {
            "kept": self._kept(prompts[0]) if prompts else None,
            "savings": None if active is None else vars(active),
            **found,
        }

    def _kept(self, prompt: Prompt) -> dict[str, Any]:
        """Counts of a prompt, and what is left of each image on average over the layers."""
        counts = visual_token_counts(prompt, self.host)
        return prompt.summary() | {"visual_tokens_average": [one["kept"] for one in counts]}

    @torch.no_grad()
    def _time(self, variant: Variant, inputs: Any, prepared: float) -> dict[str, float]:
        marks, whole = Marks(spans.clock(self.device)), list[float]()
        with variant.installed(self.subject), watching(self.host, variant.parts, marks):
            with spans.wall_clock(self.device, whole):
                self._answer(inputs, marks)
        took = spans.seconds(marks)
        return {
            "preprocess": prepared,
            "tower": took[samples.TOWER],
            "select": took[samples.SELECT],
            "project": took[samples.PROJECT],
            "prefill": took[samples.MODEL] + took[samples.AROUND],
            "around": took[samples.AROUND],
            "decode": took[samples.DECODE],
            "after": took[samples.AFTER],
            "whole": prepared + whole[0],
        }

    def _answer(self, inputs: Any, marks: Marks) -> None:
        """One request: `new_tokens` tokens for every prompt, greedily."""
        model, batch = self.subject.model, len(inputs["input_ids"])
        tokens = Tokens(marks, self.new_tokens, batch, self.device)
        marks.start()
        model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            stopping_criteria=[tokens],
        )
        marks.stop()
        assert tokens.count == self.new_tokens, (tokens.count, self.new_tokens)

    def _watch(self, variant: Variant, inputs: Any) -> dict[str, Any]:
        """Attention kernels and operations by stage, and memory."""
        model = self.subject.model
        given = [value for value in inputs.values() if isinstance(value, Tensor)]
        known = [*tensors_of(model, *variant.modules), *given]
        weights, pruner_weights = weight_bytes(model), weight_bytes(*variant.modules)
        caches: list[int] = []

        def note(module: Any, args: Any, output: Any) -> None:
            caches.append(cache_bytes(cache_of(output)))

        marks: Marks
        eagerly = torch.compiler.set_stance("force_eager")  # graphs would hide what they do
        with eagerly, Watch(known, lambda: marks.stage) as watch:
            marks = Marks(watch.take_peak)
            with watching(self.host, variant.parts, marks):
                hook = self.host.language_model.register_forward_hook(note)
                try:
                    self._answer(inputs, marks)
                finally:
                    hook.remove()
        above: Peaks = {stage: (peak, None) for stage, peak in spans.peaks(marks).items()}
        base = weights + pruner_weights + sum(value.nbytes for value in given)
        if self.device.type == "cuda":
            above, base = self._cuda_peaks(variant, inputs)
        memory = _by_kind(above, base, caches[0], caches[-1])
        return {
            "kernels": {stage: sorted(names) for stage, names in watch.kernels.items()},
            "operations": watch.operations,
            "memory": {"weights": weights, "pruner_weights": pruner_weights, **memory},
        }

    def _cuda_peaks(self, variant: Variant, inputs: Any) -> tuple[Peaks, int]:
        """The allocator's peaks above what was there, and that."""
        allocator = CudaPeaks(self.device)
        gc.collect()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated(self.device)
        marks = Marks(allocator.take_peak)
        with watching(self.host, variant.parts, marks):
            self._answer(inputs, marks)
        found: Peaks = dict.fromkeys(samples.SPANS, (0, None))
        for stage, (allocated, reserved) in marks.readings:
            before = found[stage]
            found[stage] = (max(before[0], allocated - base), max(before[1] or 0, reserved))
        return found, base


def _by_kind(above: Peaks, base: int, cache: int, last_cache: int) -> dict[str, Any]:
    """Bytes by kind.

    Args:
        above: peak of every stage above `base`, and what the allocator had reserved.
        base: allocated before the request.
        cache: keys and values after the prompt. last_cache: after the answer.
    """
    held = {samples.MODEL: cache, samples.DECODE: last_cache}
    activations = {stage: peak - held.get(stage, 0) for stage, (peak, _) in above.items() if peak}
    memory: dict[str, Any] = {
        "kv_cache_prompt": cache,
        "kv_cache": last_cache,
        "activations": max(0, *activations.values()),
        "peak": base + max(peak for peak, _ in above.values()),
        "peak_of_stage": {stage: base + peak for stage, (peak, _) in above.items() if peak},
    }
    if any(reserved is not None for _, reserved in above.values()):
        memory["reserved"] = max(reserved or 0 for _, reserved in above.values())
        memory["reserved_of_stage"] = {s: r for s, (_, r) in above.items() if r is not None}
    return memory
