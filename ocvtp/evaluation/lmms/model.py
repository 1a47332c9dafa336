"""The model `ocvtp` of lmms-eval: any supported VLM with a pruner in it, batched.

Imports lmms-eval, so only lmms-eval imports it (see `lmms.py`). What goes wrong while it answers is
raised, not scored.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from tqdm import tqdm

from ocvtp.evaluation.lmms.prompts import Asked, ask
from ocvtp.evaluation.lmms.settings import GenerationArgs, ModelArgs
from ocvtp.evaluation.runner import visual_token_counts
from ocvtp.hosts.attach import attached
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.checks import refuse_beyond_all
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Pruner


@dataclass
class PrunedTokenCounts(TokenCounts):  # type: ignore[misc]
    """Tokens of one request; lmms-eval writes them into its log of samples.

    Args:
        input_tokens: of the prompt that enters the language model, after pruning.
        output_tokens: of the answer.
        visual_tokens: of the request's images before pruning.
        visual_tokens_kept: after, on average over the layers of the language model.
    """

    visual_tokens: float = 0
    visual_tokens_kept: float = 0

    def to_dict(self) -> dict[str, float]:
        kept = {name: getattr(self, name) for name in ("visual_tokens", "visual_tokens_kept")}
        return {**super().to_dict(), **kept}


class PrunedVLM(lmms):  # type: ignore[misc]
    """A vision-language model that reads the tokens which a pruner leaves it.

    Args:
        model_args: see `ModelArgs`, which lists them and their defaults.

    Raises:
        ValueError: for wrong arguments, or a model that is not supported.
    """

    is_simple = False

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        model_args.pop("max_batch_size", None)  # of lmms-eval's `auto`, which is refused
        self.args = ModelArgs.read(model_args)
        self._make_pruner = self.args.pruner_maker()  # refuses what is wrong, before the model
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        several = self._world_size > 1
        device = None if several else self.args.device
        self.device = torch.device(device or self.accelerator.device)
        self._model, self.processor = load_model(
            self.args.pretrained, self.args.dtype, str(self.device)
        )
        find_host(self._model)
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.padding_side = "left"

    @property
    def batch_size(self) -> int:
        """Requests at a time."""
        return self.args.batch_size

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests.

        Requests of one task and the same `generation_kwargs` are answered together, `batch_size`
        at a time.

        Raises:
            ValueError: for media that are no images, and what pruners and hosts refuse.
        """
        results: dict[int, GenerationResult] = {}
        started = time.perf_counter()
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="ocvtp")
        for settings, numbers in self._batches(requests):
            batch = [requests[number] for number in numbers]
            pruner = self._make_pruner(batch[0].args[3])
            try:
                asked = [self._asked(request) for request in batch]
                found = self._answer(asked, settings, pruner)
            except Exception as error:
                docs = ", ".join(f"{request.args[4]} {request.args[3]}" for request in batch)
                error.add_note(f"while pruner {self.args.pruner!r} answered {docs} (task, doc_id)")
                raise
            for number, request, result in zip(numbers, batch, found, strict=True):
                results[number] = result
                logger.debug(f"{request.args[4]} {request.args[3]}: {result}")
            bar.update(len(batch))
        bar.close()
        self._log(list(results.values()), time.perf_counter() - started)
        return [results[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval's chat models only generate.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "the model 'ocvtp' generates answers; pass tasks of output_type generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "the model 'ocvtp' answers in one round; pass tasks of output_type generate_until."
        )

    def _batches(
        self, requests: Sequence[Instance]
    ) -> Iterator[tuple[GenerationArgs, Sequence[int]]]:
        """Numbers of requests that are answered together: of one task, in their order."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            _, _, given, _, task, split = request.args
            key = json.dumps([task, split, given], sort_keys=True)
            groups.setdefault(key, []).append(number)
        for numbers in groups.values():
            settings = GenerationArgs.read(requests[numbers[0]].args[2])
            if settings.unused:
                logger.warning(f"generation_kwargs not used: {', '.join(settings.unused)}")
            starts = [*range(0, len(numbers), self.batch_size), len(numbers)]
            for start, end in pairwise(starts):
                yield settings, numbers[start:end]

    def _asked(self, request: Instance) -> Asked:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return ask(self.processor, doc_to_messages(self.task_dict[task][split][doc_id]))

    def _answer(
        self, asked: Sequence[Asked], settings: GenerationArgs, pruner: Pruner
    ) -> list[GenerationResult]:
        """One batch; requests with images are padded together, those without apart."""
        results: dict[int, GenerationResult] = {}
        for with_images in (True, False):
            rows = [row for row, one in enumerate(asked) if bool(one.images) == with_images]
            if rows:
                found = self._generate([asked[row] for row in rows], settings, pruner)
                results |= zip(rows, found, strict=True)
        return [results[row] for row in range(len(asked))]

    @torch.no_grad()
    def _generate(
        self, asked: Sequence[Asked], settings: GenerationArgs, pruner: Pruner
    ) -> list[GenerationResult]:
        """Answers to requests that all have images, or none of which has."""
        images = [one.images for one in asked]
        made = self.processor(
            text=[one.text for one in asked],
            return_tensors="pt",
            padding=True,
            **({"images": images} if images[0] else {}),
        )
        inputs = made.to(self.device, self._model.dtype)
        prompts: list[Prompt] = []
        refuse_beyond_all(find_host(self._model), pruner)
        with attached(
            self._model,
            pruner,
            processor=self.processor,
            text_tower=self.args.text_tower,
            on_prune=prompts.append,
        ):
            output = self._model.generate(**inputs, **settings.passed)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        padding = self._model.generation_config.pad_token_id
        spoken = torch.ones_like(new) if padding is None else new != padding
        counts = [
            PrunedTokenCounts(output_tokens=length, **read)
            for length, read in zip(
                spoken.sum(dim=1).tolist(), self._read(inputs, images, prompts), strict=True
            )
        ]
        return [
            GenerationResult(settings.cut(text).strip(), count)
            for text, count in zip(texts, counts, strict=True)
        ]

    def _read(
        self, inputs: Any, images: Sequence[list[Image.Image]], prompts: Sequence[Prompt]
    ) -> list[dict[str, float]]:
        """Tokens of each row that the language model reads; those of its images summed up."""
        if not images[0]:
            return [{"input_tokens": n} for n in inputs["attention_mask"].sum(dim=1).tolist()]
        (prompt,) = prompts
        each = iter(visual_token_counts(prompt, find_host(self._model)))
        rows = [list(islice(each, len(some))) for some in images]
        return [
            {
                "input_tokens": length,
                "visual_tokens": sum(count["given"] for count in row),
                "visual_tokens_kept": sum(count["kept"] for count in row),
            }
            for length, row in zip(prompt.keep.sum(dim=1).tolist(), rows, strict=True)
        ]

    def _log(self, results: Sequence[GenerationResult], seconds: float) -> None:
        """Say how many visual tokens were left; lmms-eval keeps the means in its results."""
        counts = [result.token_counts for result in results]
        given = np.array([count.visual_tokens for count in counts])
        kept = np.array([count.visual_tokens_kept for count in counts])
        output_tokens = sum(count.output_tokens for count in counts)
        logger.info(
            f"pruner {self.args.pruner!r} kept {kept.mean():.2f} of {given.mean():.2f} visual"
            f" tokens per request ({kept.min():g} to {kept.max():g} of {given.min():g} to"
            f" {given.max():g}; {len(counts)} requests, batch size {self.batch_size})"
        )
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=output_tokens,
            avg_speed=output_tokens / seconds,
            additional_metrics={
                "visual_tokens": float(given.mean()),
                "visual_tokens_kept": float(kept.mean()),
                "total_requests": len(counts),
            },
        )
