"""The prompt's embeddings that pruners are shown, against those of the words themselves."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from reference import (
    GREEDY,
    Scripted,
    ask,
    best_by_cls,
    fingerprint,
    make_batch,
    make_prompts,
    shorten,
    single,
)
from tiny_models import IMAGE_TOKEN, tiny_llava, tiny_processor
from torch import Tensor

from ocvtp import Needs, Selection, VisualTokens, attach
from ocvtp.hosts.base import Encoded
from ocvtp.hosts.runtime.attachment import attachment_of

TEXT = Needs(text=True)
ROWS = [
    "USER: <image>\nwhat is it? ASSISTANT:",
    "USER: nothing to see ASSISTANT:",
    "USER: <image>\n<image>\nthe same? ASSISTANT:",
    "so ASSISTANT: hm",
    "USER: who is here, <image> or here <image>? ASSISTANT:",
]
SAID = ["what is it?", "the same?", "the same?", *["who is here,  or here ?"] * 2]
"""Of each image's own row; what stood around an image stands there still."""

sides = pytest.mark.parametrize("side", ["left", "right"])
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]


def shown(model: Any, inputs: Any, needs: Needs = TEXT, **options: Any) -> Any:
    """What a pruner of these needs sees."""
    pruner = Scripted(wants=needs)
    with pruner(model, **options), torch.no_grad():
        model(**inputs)
    return pruner.seen[0]


def embedded(model: Any, processor: Any, text: str) -> Tensor:
    ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return model.get_input_embeddings()(ids)[0].detach()


@sides
def test_the_words_of_each_images_own_row(llava: Any, processor: Any, side: Any) -> None:
    tokens = shown(llava, make_prompts(processor, ROWS, side), processor=processor)
    assert tokens.text is not None
    assert tokens.text_valid is not None
    assert tokens.text.shape == (5, max(map(len, SAID)), 48)
    for image, said in enumerate(SAID):
        real = tokens.text_valid[image]
        assert real.tolist() == [i < len(said) for i in range(len(real))]
        assert torch.equal(tokens.text[image, real], embedded(llava, processor, said))
    assert not tokens.text[~tokens.text_valid].any()
    assert not tokens.text.requires_grad


@sides
def test_a_batch_equals_single_rows(llava: Any, processor: Any, side: Any) -> None:
    inputs = make_prompts(processor, ROWS, side)
    batch = shown(llava, inputs, processor=processor)
    images = iter(range(5))
    for row in (0, 2, 4):
        alone = shown(llava, single(inputs, row), processor=processor)
        for text, real in zip(alone.text, alone.text_valid, strict=True):
            image = next(images)
            assert torch.equal(text[real], batch.text[image, batch.text_valid[image]])


def test_generate_and_forward_show_the_same(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, ROWS)
    expected = shown(llava, inputs, processor=processor)

    def by_first_word(tokens: Any) -> Selection:
        start = (tokens.text[:, 0].sum(dim=1) > 0).long()[:, None]
        return Selection(start + torch.arange(3))

    pruner = Scripted(wants=TEXT, choose=by_first_word)
    kept = by_first_word(expected).keep_indices.tolist()
    short = shorten(llava, inputs, kept)
    with pruner(llava, processor=processor):
        assert torch.equal(ask(llava, inputs), short.greedy(5))
    assert torch.equal(pruner.seen[0].text, expected.text)
    assert len({start for start, *_ in kept}) == 2


def test_generation_without_a_mask(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, ROWS)
    del inputs["attention_mask"]
    pruner = Scripted(wants=TEXT)
    with pruner(llava, processor=processor):
        llava.generate(**inputs, **GREEDY)
    assert pruner.seen[0].text_valid.sum(dim=1).tolist() == [len(s) for s in SAID]


def test_answers_are_not_the_users_words(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, ["USER: <image>\nwhat is it? ASSISTANT: a cat</s>"])
    tokens = shown(llava, inputs | {"labels": inputs["input_ids"]}, processor=processor)
    assert torch.equal(tokens.text[0], embedded(llava, processor, "what is it?"))


def test_a_tokenizer_will_do(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, ROWS)
    tokenizer = deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    expected = shown(llava, inputs, processor=processor)
    assert torch.equal(shown(llava, inputs, processor=tokenizer).text, expected.text)


def test_the_processor_saved_with_a_model_is_found(processor: Any, tmp_path: Any) -> None:
    model = tiny_llava("clip")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inputs = make_prompts(processor, ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = shown(again, inputs)
    assert torch.equal(tokens.text, shown(again, inputs, processor=processor).text)


def test_without_a_processor_only_special_tokens_are_left_out(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, [ROWS[0] + "</s>", ROWS[1]])
    with pytest.warns(UserWarning, match=r"was not found, so what a chat template .* processor="):
        tokens = shown(llava, inputs)
    expected = embedded(llava, processor, "USER: \nwhat is it? ASSISTANT:")
    assert torch.equal(tokens.text[0], expected)
    batch = make_batch([(5, "image", 4)])
    with pytest.warns(UserWarning, match="processor"):
        tokens = shown(llava, batch)
    ids = batch["input_ids"][batch["input_ids"] != IMAGE_TOKEN][1:]  # BOS
    assert torch.equal(tokens.text[0], llava.get_input_embeddings()(ids))


def test_lists_of_ends_are_special(llava: Any, processor: Any) -> None:
    model = deepcopy(llava)
    model.generation_config.eos_token_id = [2, 98]
    inputs = make_prompts(processor, ["<image>what~?"])
    ids = inputs["input_ids"][0]
    assert int((ids == 98).sum()) == 1
    with pytest.warns(UserWarning, match="processor"):
        tokens = shown(model, inputs)
    assert torch.equal(tokens.text[0], embedded(llava, processor, "what?"))


def test_a_processor_without_a_template(llava: Any) -> None:
    plain = tiny_processor(chat_template=None)
    message = "has no chat template that can be rendered, so .* is read as theirs; pass processor="
    with pytest.warns(UserWarning, match=message):
        tokens = shown(llava, make_prompts(plain, ROWS[:1]), processor=plain)
    expected = embedded(llava, plain, "USER: \nwhat is it? ASSISTANT:")
    assert torch.equal(tokens.text[0], expected)


def test_prompts_that_say_nothing(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, [*ROWS[:2], "USER: <image>\n ASSISTANT:"])
    message = "row 2 of the batch has images and no words of the user's; pass a prompt with a quest"
    with Scripted(wants=TEXT)(llava, processor=processor):
        with pytest.raises(ValueError, match=message):
            llava(**inputs)
        with pytest.raises(ValueError, match=message):
            llava.generate(**inputs, max_new_tokens=1)
    with Scripted()(llava, processor=processor):
        llava(**inputs)


def test_processors_that_do_not_fit(llava: Any, processor: Any) -> None:
    for wrong in (processor.image_processor, "processor", 3):
        with pytest.raises(
            ValueError, match="processor is a .*; pass the processor or the tokeniz"
        ):
            attach(llava, Scripted(wants=TEXT), processor=wrong)
    other = deepcopy(llava)
    other.config.image_token_id = 101
    with pytest.raises(ValueError, match="placeholder is token 101, that of the processor is 100"):
        attach(other, Scripted(wants=TEXT), processor=processor)
    clips = deepcopy(processor.tokenizer)
    del clips._special_tokens_map["image_token"]
    other.config.image_token_id = 32000
    with pytest.raises(
        ValueError, match="token 32000, that of the processor is not in its vocabul"
    ):
        attach(other, Scripted(wants=TEXT), processor=clips)


def test_images_of_unequal_sizes_know_their_rows() -> None:
    tokens = VisualTokens(torch.zeros(3, 4, 2), (2, 2))
    encoded = Encoded(tokens, torch.zeros(12, 5))
    assert encoded.first_rows(torch.device("cpu")).tolist() == [0, 4, 8]
    uneven = Encoded(tokens, torch.zeros(12, 5), starts=torch.tensor([0, 7, 9]))
    assert uneven.first_rows(torch.device("cpu")).tolist() == [0, 7, 9]


def test_who_does_not_read_loads_nothing(
    llava: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loads something")

    for name in ("AutoProcessor", "AutoTokenizer", "AutoConfig", "CLIPModel"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    model = deepcopy(llava)
    model.name_or_path = "somewhere"
    handle = attach(model, Scripted(), processor=processor, text_tower="nowhere")
    assert attachment_of(model).reader is None
    handle.remove()
    with pytest.warns(UserWarning, match="processor"):
        attach(model, Scripted(wants=TEXT)).remove()  # what fails to load is not there


def test_nothing_is_left_of_it(llava: Any, processor: Any) -> None:
    before, inputs = fingerprint(llava), make_prompts(processor, ROWS)
    with torch.no_grad():
        logits = llava(**inputs).logits
        handle = attach(llava, Scripted(wants=TEXT), processor=processor)
        llava(**inputs)
        with pytest.raises(ValueError, match="no words"):
            llava(**make_prompts(processor, ["<image>"]))
        handle.remove()
        assert fingerprint(llava) == before
        assert torch.equal(llava(**inputs).logits, logits)


def test_gradients_flow_as_without_text(llava: Any, processor: Any) -> None:
    model, inputs = deepcopy(llava), make_prompts(processor, ROWS)
    kept = best_by_cls(llava, inputs["pixel_values"], 3)
    choose = lambda tokens: Selection(torch.tensor(kept))  # noqa: E731
    gradients = []
    for needs in (Needs(), TEXT):
        with Scripted(wants=needs, choose=choose)(model, processor=processor):
            model(**inputs).logits.square().mean().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    assert torch.equal(*gradients)


def test_offloaded_half_precision_models_read(llava: Any, processor: Any) -> None:
    from accelerate import cpu_offload

    inputs = make_prompts(processor, ROWS)
    model = deepcopy(llava).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected = shown(model, inputs, processor=processor)
    assert expected.text.dtype == torch.bfloat16
    offloaded = cpu_offload(model, execution_device="cpu")
    actual = shown(offloaded, inputs, processor=processor)
    assert torch.equal(actual.text, expected.text)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_read(llava: Any, processor: Any) -> None:
    inputs = make_prompts(processor, ROWS)
    expected = shown(llava, inputs, processor=processor)
    torch.compiler.reset()
    model = torch.compile(deepcopy(llava), backend="eager")
    pruner = Scripted(wants=TEXT)
    with pruner(model, processor=processor):
        model(**inputs)
    assert torch.equal(pruner.seen[0].text, expected.text)


@pytest.mark.slow
@torch.no_grad()
def test_an_attached_model_copies_and_pickles(llava: Any, processor: Any) -> None:
    inputs, stream = make_prompts(processor, ROWS), io.BytesIO()
    expected = shown(llava, inputs, processor=processor)
    fresh = tiny_llava("clip")
    with Scripted(wants=TEXT, choose=first_three)(fresh, processor=processor):
        torch.save(fresh, stream)
        stream.seek(0)
        for other in (deepcopy(fresh), torch.load(stream, weights_only=False)):
            other(**inputs)
            seen = attachment_of(other).pruner.seen
            assert torch.equal(seen[0].text, expected.text)


def first_three(tokens: VisualTokens) -> Selection:
    return Selection(torch.arange(3).repeat(tokens.batch_size, 1))
