"""What all pruned models in vLLM share; an adapter of a family adds what its tower and tiles are.

Nothing here is imported before vLLM builds an architecture that `vllm_plugin` registers. I images
of a call.

Three classes stand before vLLM's own in the bases of an adapter's: `PrunedInfo` reads the plan and
the most that an image may take; `PrunedProcessor` counts the places of every image, and puts what
decides about them into the hash of the image; `PrunedModel` hands the tower's tokens to the pruner.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    InputProcessingContext,
    PromptReplacement,
    PromptUpdateDetails,
)

from ocvtp.serving.layouts import Shape
from ocvtp.serving.plan import KEY, Plan, read_plan

ASKED = "ocvtp_asked"
"""Of an image's tensors: [V] K of each view."""
COUNTS = "ocvtp_counts"
"""Of an image's tensors: [3] rows that it takes, how many of them end lines, and its visual tokens
before it was pruned."""
logger = init_logger("vllm.ocvtp")  # below vLLM's own, so that it is printed


def plan_of(model_config: Any) -> Plan:
    """The plan of an engine: `ocvtp` of hf_overrides, and of mm_processor_kwargs.

    Raises:
        ValueError: see `read_plan`.
    """
    own = getattr(model_config.hf_config, KEY, None)
    further = (model_config.multimodal_config.mm_processor_kwargs or {}).get(KEY)
    given = [settings for settings in (own, further) if settings is not None]
    settings: Any = given[0] if len(given) == 1 else None
    if len(given) == 2 and all(isinstance(one, Mapping) for one in given):
        settings = {**given[0], **given[1]}
    with _as_saved():
        return read_plan(model_config.hf_config, settings)


class PrunedContext(InputProcessingContext):
    """Keeps `ocvtp` from the processors of transformers."""

    def get_merged_mm_kwargs(self, kwargs: Any, **more: Any) -> dict[str, Any]:
        merged: dict[str, Any] = super().get_merged_mm_kwargs(kwargs, **more)
        merged.pop(KEY, None)
        return merged


class PrunedInfo:
    """Before a family's `ProcessingInfo`: refuses in the first process what others could not do.

    Raises:
        ValueError: see `read_plan`; and for embeddings in place of images.
    """

    ctx: Any
    plan: Plan

    def __init__(self, ctx: Any) -> None:
        parent: Any = super()
        parent.__init__(PrunedContext(ctx.model_config, ctx.tokenizer))
        self.plan = plan_of(ctx.model_config)
        if ctx.get_mm_config().enable_mm_embeds:
            raise ValueError(
                "enable_mm_embeds lets callers pass image embeddings, which no pruner sees; leave"
                " it out, and pass images."
            )

    @abstractmethod
    def largest_shape(self) -> Shape:
        """Of the image with most tokens that the pruner can choose from."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images alone: videos would be read unpruned."""
        parent: Any = super()
        limits = parent.get_supported_mm_limits()
        return {"image": limits["image"]}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """The most that an image takes, whatever its request asks for."""
        del seq_len, mm_counts
        shape, most = self.largest_shape(), self.plan.most
        return {"image": shape.num_rows([v if most is None else most for v in shape.views])}


@dataclass
class PrunedPlaces(PromptUpdateDetails):
    """The places of an image in the prompt.

    Args:
        rows: that it takes. ends: how many of them end lines.
        given: its visual tokens before it was pruned.
    """

    rows: int = 0
    ends: int = 0
    given: int = 0


class PrunedProcessor:
    """Before a family's `MultiModalProcessor`: K places an image, the prompt else unchanged.

    What an image is given is decided here, once: the model is told it with the image's tensors.
    """

    info: Any

    @abstractmethod
    def shapes(self, mm_items: Any, processed: Mapping[str, Any]) -> list[Shape]:
        """The rows of each image, before anything is pruned.

        Args:
            mm_items: of the call, images among them.
            processed: what transformers' processor made of them.
        """

    def image_token_id(self) -> int:
        """The placeholder in a prompt."""
        return int(self.info.ctx.get_hf_config().image_token_id)

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        plan: Plan = self.info.plan
        budget = plan.of_request(hf_kwargs.get(KEY))
        parent: Any = super()
        processed = parent._apply_hf_processor_main(mm_items, _without(hf_kwargs))
        if mm_items.get_all_counts().get("image"):
            shapes = self.shapes(mm_items, processed)
            asked = [plan.asked(shape, budget) for shape in shapes]
            pairs = zip(shapes, asked, strict=True)
            counts = [[s.num_rows(own), s.ends, s.num_tokens] for s, own in pairs]
            processed[ASKED] = [torch.tensor(own) for own in asked]
            processed[COUNTS] = torch.tensor(counts)
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        parent: Any = super()
        fields = parent._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))
        own = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return {**fields, ASKED: own, COUNTS: own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> list[Any]:
        parent: Any = super()
        updates = parent._get_prompt_updates(
            mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs
        )
        images = out_mm_kwargs.get("image", [])
        counts = [tuple(image[COUNTS].data.tolist()) for image in images]
        return [self._pruned(update, counts) for update in updates if update.modality == "image"]

    def _pruned(self, update: Any, counts: Sequence[tuple[int, ...]]) -> Any:
        assert isinstance(update, PromptReplacement), update
        token = self.image_token_id()

        def places(item_idx: int) -> PrunedPlaces:
            whole = update.replacement
            whole = whole(item_idx) if callable(whole) else whole
            whole = whole if isinstance(whole, PromptUpdateDetails) else PromptUpdateDetails(whole)
            rows, *others = counts[item_idx]
            first = whole.full.index(token)
            last = len(whole.full) - whole.full[::-1].index(token)
            full = [*whole.full[:first], *[token] * rows, *whole.full[last:]]
            return PrunedPlaces(full, whole.is_embed, rows, *others)

        return replace(update, replacement=places)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Those of other budgets, pruners and artifacts differ, whatever names the image."""
        plan: Plan = self.info.plan
        given = inputs.hf_processor_mm_kwargs
        mark = {"plan": plan.identity, **vars(plan.of_request(given.get(KEY)))}
        parent: Any = super()
        return parent._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs={**given, KEY: mark}))

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        parent: Any = super()
        applied = parent._maybe_apply_prompt_updates(mm_items, mm_res)
        images = [updates[0].content for updates in mm_res.prompt_updates.get("image", ())]
        if images:
            given = " + ".join(str(image.given) for image in images)
            kept = " + ".join(str(image.rows - image.ends) for image in images)
            ends = sum(image.ends for image in images)
            newlines = f" and {ends} newlines" if ends else ""
            name = self.info.plan.pruner.name
            logger.info("visual tokens: %s in, %s%s out (%s)", given, kept, newlines, name)
        return applied


class PrunedModel:
    """Before a family's model: the language model reads what the pruner keeps of every image.

    Raises:
        ValueError: for models and pruners that cannot be served, see `read_plan`.
    """

    # towers read all tokens where vLLM would count those that are kept
    supports_tower_connector_lora = False
    plan: Plan

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        parent: Any = super()
        parent.__init__(vllm_config=vllm_config, prefix=prefix)
        self.plan = plan_of(vllm_config.model_config)

    @abstractmethod
    def image_rows(self, asked: list[tuple[int, ...]], **images: Any) -> Sequence[Tensor]:
        """The rows [R', D'] of each of I images.

        Args:
            asked: K of each view of every image.
            images: the tensors that vLLM's processor made of them.
        """

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """See vLLM's `SupportsMultiModal`.

        Raises:
            RuntimeError: if an image's rows are not as many as its places.
        """
        asked, counts = kwargs.pop(ASKED, None), kwargs.pop(COUNTS, None)
        if asked is None or counts is None:
            if kwargs:
                raise RuntimeError(
                    f"images came without {ASKED}, which this engine's processor adds to each, so"
                    " that they cannot be pruned."
                )
            return []
        rows = self.image_rows([tuple(own.tolist()) for own in asked], **kwargs)
        expected = [int(own[0]) for own in counts]
        if (found := [len(own) for own in rows]) != expected:
            raise RuntimeError(f"{found} rows of images for {expected} places in prompts.")
        return tuple(rows)


def whole_heads(is_shared: bool) -> Callable[[Tensor], Tensor]:
    """What puts the heads of all ranks side by side, where ranks share them."""
    return _all_heads if is_shared else torch.Tensor.contiguous


def _all_heads(states: Tensor) -> Tensor:
    """[B, T, D / R] of every rank -> [B, T, D]; ranks hold consecutive heads."""
    from vllm.distributed import tensor_model_parallel_all_gather

    heads: Tensor = tensor_model_parallel_all_gather(states.contiguous())
    return heads


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != KEY}


@contextmanager
def _as_saved() -> Iterator[None]:
    """Load a pruner's network as it was saved: vLLM builds models in the type of its weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
