"""Arguments of generate() that count or read the prompt mean the caller's prompt."""

from __future__ import annotations

from copy import deepcopy
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image
from reference import BATCH, ONE, SEVERAL, best_by_cls, make_batch, shorten
from tiny_models import PAD
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ocvtp import Pruner, build_pruner
from ocvtp.hosts.loading import load_model

LENGTH = make_batch(ONE)["input_ids"].shape[1]
ANY_TOKEN_ENDS = list(range(3, 128))
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]


@pytest.fixture
def pruner() -> Pruner:
    return build_pruner("fastervlm", num_keep=5)


def config(**settings: Any) -> dict[str, Any]:
    return {"generation_config": GenerationConfig(pad_token_id=PAD, **settings)}


LENGTHS: dict[str, dict[str, Any]] = {
    "default": {},
    "max": {"max_length": LENGTH + 6},
    "new": {"max_new_tokens": 6},
    "both": {"max_length": LENGTH + 3, "max_new_tokens": 6},
    "min": {"max_length": LENGTH + 9, "min_length": LENGTH + 3, "eos_token_id": ANY_TOKEN_ENDS},
    "min_new": {"max_new_tokens": 9, "min_new_tokens": 3, "eos_token_id": ANY_TOKEN_ENDS},
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("settings", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("where", ["arguments", "config", "mixed"])
def test_lengths_are_those_without_a_pruner(
    llava: Any, pruner: Pruner, settings: Any, where: str
) -> None:
    inputs = make_batch(ONE)
    if where == "config":
        settings = config(**settings)
    elif where == "mixed":
        settings = config(max_length=LENGTH + 9) | settings
    before = deepcopy(settings)
    expected = llava.generate(**inputs, do_sample=False, **settings).shape
    with pruner(llava):
        assert llava.generate(**inputs, do_sample=False, **settings).shape == expected
    assert settings == before


def test_the_models_own_lengths_count_too(
    llava: Any, pruner: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_batch(ONE)
    monkeypatch.setattr(llava.generation_config, "max_length", LENGTH + 4)
    with pruner(llava):
        assert llava.generate(**inputs).shape[1] == LENGTH + 4
        assert llava.generate(**inputs, **config(do_sample=False)).shape[1] == LENGTH + 4
        assert llava.generate(**inputs, max_new_tokens=2).shape[1] == LENGTH + 2


class Recorder(LogitsProcessor):
    """Sees the ids, changes nothing; also a stopping criterion and a prefix function."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        self.seen.append(input_ids.clone())
        return scores


class Stop(Recorder):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        super().__call__(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("rows", [SEVERAL, BATCH], ids=["several", "batch"])
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("positional", [False, True])
def test_processors_and_criteria_see_the_callers_prompt(
    llava: Any, pruner: Pruner, rows: Any, num_beams: int, positional: bool
) -> None:
    inputs = make_batch(rows)
    ids = inputs["input_ids"]
    processor, stop, prefixes = Recorder(), Stop(), []

    def allowed(row: int, prefix: torch.Tensor) -> list[int]:
        prefixes.append((row, prefix.clone()))
        return [7, 8, 9]

    settings = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": 3}
    lists = (LogitsProcessorList([processor]), StoppingCriteriaList([stop]), allowed)
    with pruner(llava):
        if positional:
            pixels, mask = inputs["pixel_values"], inputs["attention_mask"]
            images = {"pixel_values": pixels, "attention_mask": mask}
            given = GenerationConfig(pad_token_id=PAD, **settings)
            output = llava.generate(ids, given, *lists, **images)
        else:
            names = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
            output = llava.generate(**inputs, **settings, **dict(zip(names, lists, strict=True)))
    repeated = ids.repeat_interleave(num_beams, dim=0)
    assert len(processor.seen) == 3
    assert len(stop.seen) >= 3
    for step, seen in enumerate(processor.seen):
        assert torch.equal(seen[:, : ids.shape[1]], repeated)
        assert seen.shape[1] == ids.shape[1] + step
    assert all(torch.equal(seen[0, : ids.shape[1]], ids[0]) for seen in stop.seen)
    assert all(torch.equal(prefix[: ids.shape[1]], ids[row]) for row, prefix in prefixes)
    assert torch.isin(output[:, ids.shape[1] :], torch.tensor([7, 8, 9])).all()


def test_ready_made_processors_and_criteria_count_the_prompt(llava: Any, pruner: Pruner) -> None:
    inputs = make_batch(ONE)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": ANY_TOKEN_ENDS}
    shortest = MinLengthLogitsProcessor(LENGTH + 4, ANY_TOKEN_ENDS, device="cpu")
    longest = MaxLengthCriteria(LENGTH + 3)
    with pruner(llava):
        assert llava.generate(**inputs, **settings).shape[1] == LENGTH + 1
        longer = llava.generate(**inputs, **settings, logits_processor=[shortest])
        assert longer.shape[1] == LENGTH + 5
        settings["eos_token_id"] = None
        assert (
            llava.generate(**inputs, **settings, stopping_criteria=[longest]).shape[1] == LENGTH + 3
        )


class QueueStreamer:
    """What TextIteratorStreamer is, without a tokenizer."""

    def __init__(self) -> None:
        self.queue: Queue[Any] = Queue()

    def put(self, value: torch.Tensor) -> None:
        self.queue.put(value)

    def end(self) -> None:
        self.queue.put(None)


def test_streamers_get_the_callers_prompt_then_the_answer(llava: Any, pruner: Pruner) -> None:
    inputs, streamer = make_batch(ONE), QueueStreamer()
    short = shorten(llava, inputs, best_by_cls(llava, inputs["pixel_values"], 5))
    settings = {"max_new_tokens": 4, "do_sample": False, "streamer": streamer}
    with pruner(llava):
        thread = Thread(target=llava.generate, kwargs={**inputs, **settings})
        thread.start()
        pieces = list(iter(lambda: streamer.queue.get(timeout=60), None))
        thread.join()
    assert torch.equal(pieces[0], inputs["input_ids"])
    assert torch.equal(torch.stack(pieces[1:], dim=1), short.greedy(4))


@pytest.fixture
def tiny() -> Any:
    """A model with a tokenizer, its processor, and a prompt."""
    model, processor = load_model("random:tiny-llava")
    image = Image.linear_gradient("L").convert("RGB")
    return model, processor, processor(images=image, text="<image>\nwhat?", return_tensors="pt")


def test_text_streams_as_it_is_decoded(tiny: Any) -> None:
    model, processor, inputs = tiny
    settings = {"max_new_tokens": 6, "do_sample": False}
    with build_pruner("fastervlm", num_keep=5)(model):
        expected = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
        settings["streamer"] = streamer
        thread = Thread(target=model.generate, kwargs={**inputs, **settings})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == processor.tokenizer.decode(expected)


def test_a_rewritten_prompt_is_refused(tiny: Any) -> None:
    model, processor, inputs = tiny
    settings = {"token_healing": True, "tokenizer": processor.tokenizer, "max_new_tokens": 2}
    with (
        build_pruner("fastervlm", num_keep=5)(model),
        pytest.raises(ValueError, match="did not read the prompt.*token_healing"),
    ):
        model.generate(**inputs, **settings)
