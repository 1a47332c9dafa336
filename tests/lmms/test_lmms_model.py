"""The model in lmms-eval's hands, without its command line."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make test-lmms` has it")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

LENGTHS = ("one?", "a question that is longer than others?", "two words?", "x", "what is it?")
SETTINGS = {"max_new_tokens": 3, "do_sample": False}


def make(pretrained="random:tiny-llava", **args):
    args = {"pruner": "divprune", "num_keep": 4, "device": "cpu", "batch_size": 2} | args
    return get_model("ocvtp")(pretrained=pretrained, dtype="float32", **args)


def messages(doc):
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def asked(model, docs, settings=SETTINGS, to_messages=messages):
    """Requests for these documents, as lmms-eval makes them."""
    model.task_dict["t"] = {"test": docs}
    each = settings if isinstance(settings, list) else [settings] * len(docs)
    return [
        Instance(
            request_type="generate_until",
            arguments=("", to_messages, dict(one), n, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": n, "repeats": 1},
        )
        for n, one in enumerate(each)
    ]


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


DOCS = [{"images": [picture(n)], "question": text} for n, text in enumerate(LENGTHS)]


def texts(results):
    return [result.text for result in results]


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize(
    "name", ["llava", "llava-next", "llava-onevision", "internvl", "qwen2.5-vl", "qwen3-vl"]
)
def test_a_padded_batch_answers_as_one_by_one(name):
    pretrained = f"random:tiny-{name}"
    together, alone = make(pretrained, batch_size=5), make(pretrained, batch_size=1)
    alone._model = together._model
    found = together.generate_until(asked(together, DOCS))
    assert texts(found) == texts(alone.generate_until(asked(alone, DOCS)))
    assert len(set(texts(found))) > 1
    assert {result.token_counts.visual_tokens_kept for result in found} == {4}
    assert together.processor.tokenizer.padding_side == "left"


def test_results_come_in_the_order_of_the_requests(model):
    alone = [texts(model.generate_until(asked(model, [doc])))[0] for doc in DOCS]
    short = SETTINGS | {"max_new_tokens": 1}
    mixed = [SETTINGS, short, SETTINGS, short, SETTINGS]
    found = model.generate_until(asked(model, DOCS, mixed))
    assert texts(found)[::2] == alone[::2]
    assert [result.token_counts.output_tokens for result in found][1::2] == [1, 1]


def test_images_are_counted_by_request(model):
    none, two = ({"images": DOCS[n]["images"] * n, "question": "what?"} for n in (0, 2))
    docs = [none, two, DOCS[0]]
    found = model.generate_until(asked(model, docs))
    counts = [result.token_counts.to_dict() for result in found]
    given = counts[2]["visual_tokens"]
    assert given > 4
    assert [count["visual_tokens"] for count in counts] == [0, 2 * given, given]
    assert [count["visual_tokens_kept"] for count in counts] == [0, 8, 4]
    unpruned = make(pruner="none", num_keep=None)
    whole = unpruned.generate_until(asked(unpruned, docs))
    pairs = zip(whole, counts, strict=True)
    saved = [all_.token_counts.input_tokens - few["input_tokens"] for all_, few in pairs]
    assert saved == [0, 2 * given - 8, given - 4]


def test_layers_of_the_language_model_count_by_their_share():
    model = make(pruner="fastv:stages=[[1,2]]", num_keep=None)
    (result,) = model.generate_until(asked(model, DOCS[:1]))
    layers = len(model._model.model.language_model.layers)
    given = result.token_counts.visual_tokens
    expected = (given + 2 * (layers - 1)) / layers
    assert result.token_counts.visual_tokens_kept == pytest.approx(expected, abs=1e-3)


def test_padding_behind_an_answer_is_no_token_of_it(model, monkeypatch):
    found = texts(model.generate_until(asked(model, DOCS)))
    row = next(row for row, text in enumerate(found) if text[:1].isascii())
    ends = model.processor.tokenizer(found[row][0], add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model._model.generation_config, "eos_token_id", ends[-1])
    monkeypatch.setattr(model._model.generation_config, "pad_token_id", 0)
    results = model.generate_until(asked(model, DOCS, SETTINGS | {"max_new_tokens": 8}))
    counts = [result.token_counts.output_tokens for result in results]
    assert counts[row] == 1
    assert max(counts) > 1


def test_an_answer_ends_before_its_stop_text(model):
    (whole,) = texts(model.generate_until(asked(model, DOCS[:1])))
    settings = SETTINGS | {"until": [whole[1]]}
    (cut,) = texts(model.generate_until(asked(model, DOCS[:1], settings)))
    assert cut == whole.partition(whole[1])[0].strip()


def test_what_fails_is_raised_and_named(model):
    def broken(doc):
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file") as caught:
        model.generate_until(asked(model, DOCS[:2], to_messages=broken))
    assert caught.value.__notes__ == ["while pruner 'divprune' answered t 0, t 1 (task, doc_id)"]
    greedy = make(num_keep=10_000)
    with pytest.raises(ValueError, match="num_keep=10000 exceeds"):
        greedy.generate_until(asked(greedy, DOCS))


def test_wrong_arguments_stop_before_anything_is_loaded(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="did you mean 'pruner'"):
        make(nowhere, prunner="fopru")
    with pytest.raises(ValueError, match="fopru"):
        make(nowhere, pruner="fopro")
    with pytest.raises(ValueError, match="nowhere' cannot be loaded"):
        make(nowhere)


def test_only_single_answers_are_offered(model):
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="generate_until"):
            getattr(model, name)(asked(model, DOCS[:1]))


def test_the_model_is_free_after_a_run():
    model = make()
    model.clean()  # lmms-eval calls this when it has all answers
    assert not any(isinstance(value, torch.nn.Module) for value in vars(model).values())
