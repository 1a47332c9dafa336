"""Which tokens of a prompt are the user's words, for tokenizers and templates of several kinds."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_TOKEN, LLAVA_TEMPLATE, tiny_processor

from ocvtp.hosts.prompt.user_words import Prompts, embed_words

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HUMAN = (  # contents are plain text
    "{% for m in messages %}{{ 'Human: ' if m['role'] == 'user' else 'Assistant: ' }}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(i) for i in range(97, 123)]
TRAINING = (
    "what is the colour of the cat? blue cat, who are you? where do they look at the dog?\n"
    "describe this picture. look here name the thing!\n US ER : ASS IST ANT : Human : Ass ist ant"
)


@lru_cache
def sentencepiece_like() -> Any:
    """Spaces become part of the words behind them, as in Llama's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False, initial_alphabet=LETTERS
    )
    tokenizer.train_from_iterator([TRAINING] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return wrap(tokenizer, LLAVA_TEMPLATE)


@lru_cache
def byte_level(template: str) -> Any:
    """Punctuation swallows the line break behind it, as in Qwen's tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TRAINING] * 9, trainer)
    return wrap(tokenizer, template)


def wrap(tokenizer: Any, template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"],
        chat_template=template,
    )


@lru_cache
def characters() -> Any:
    return tiny_processor()


def host_of(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    return SimpleNamespace(image_token_id=tokenizer.convert_tokens_to_ids("<image>"))


def tokenised(tokenizer: Any, rows: list[str], side: str = "left") -> tuple[Any, Any]:
    """Ids and mask; each image has three placeholders."""
    rows = [row.replace("<image>", "<image>" * 3) for row in rows]
    tokenizer.padding_side = side
    inputs = tokenizer(rows, return_tensors="pt", padding=True)
    return inputs["input_ids"], inputs["attention_mask"].bool()


def heard(processor: Any, rows: list[str], side: str = "left") -> list[str]:
    """The words found in each row, decoded."""
    prompts = Prompts(host_of(processor), processor)
    assert prompts.problem is None
    ids, real = tokenised(getattr(processor, "tokenizer", processor), rows, side)
    words = prompts.words(ids, real, [max(1, row.count("<image>")) for row in rows])
    assert not words[~real].any()
    return prompts.strings(ids, words)


VICUNA = {
    "USER: <image>\nwhat is it? ASSISTANT:": "what is it?",
    "USER: <image>\n<image>\n<image>\nwhere is the dog? ASSISTANT:": "where is the dog?",
    "USER: what is it? <image> ASSISTANT:": "what is it?",
    "USER: look at <image>\nand at <image> please ASSISTANT:": "look at and at please",
    "<image>\nwhat is it?": "what is it?",
    "what is it?<image>": "what is it?",
    "USER: <image>\nwhat is it? ASSISTANT: the cat USER: who is it? ASSISTANT:": (
        "what is it? who is it?"
    ),
    "USER: <image>\nwhat is it? ASSISTANT: the cat</s>": "what is it?",
    "they look. USER: <image>\nwhat is it? ASSISTANT:": "what is it?",
    "<image>\nname the US dog?": "name the US dog?",
    "the US cat <image>": "the US cat",
    "<image>\nUSER: what is it?\nASSISTANT:": "what is it?",  # not as the template has it
    "they look. USER: <image>\nwhat is it?\nASSISTANT: the cat": "what is it?",
    "the cat<image>\nis it ANT :": "the cat is it ANT :",
    "USER: <image>\nwhat ASSISTANT:": "what",  # the filler itself
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("row", "words"), VICUNA.items())
@pytest.mark.parametrize("make", [characters, sentencepiece_like])
def test_words_in_prompts_of_llavas_template(make: Any, row: str, words: str, side: str) -> None:
    longest = max(VICUNA, key=len)
    assert heard(make(), [row, longest], side) == [words, VICUNA[longest]]


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER, END, MODEL = "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"
CHATML_ROWS = {
    f"{SYSTEM}{USER}<image>what is it?{END}{MODEL}": "what is it?",
    f"{SYSTEM}{USER}what is<image>it?{END}{MODEL}": "what is it?",
    f"{SYSTEM}{USER}<image><image>what is it?\n{END}{MODEL}": "what is it?",
    f"{SYSTEM}{USER}<image>what is it?{END}": "what is it?",
    f"{SYSTEM}{USER}<image>what?{END}{MODEL}the cat{END}{USER}who?{END}{MODEL}": "what? who?",
    f"{SYSTEM}{USER}<image>what?{END}{MODEL}the cat": "what?",
    f"<|im_start|>system\nthey look{END}{USER}<image>what?{END}{MODEL}": "what?",
    "<image>what is it?": "what is it?",
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("row", "words"), CHATML_ROWS.items())
def test_words_between_special_tokens(row: str, words: str, side: str) -> None:
    longest = max(CHATML_ROWS, key=len)
    found = heard(byte_level(CHATML), [row, longest], side)
    assert found == [words, CHATML_ROWS[longest]]


HUMAN_ROWS = {
    "Human: <image>\nwhat is it\nAssistant:": "what is it",
    "Human: <image>\nwhat is it?\nAssistant:": "what is it?",  # "?\n" is one token
    "Human: <image>\nwhat?\nAssistant: the cat!\nHuman: who?\nAssistant:": "what? who?",
    "Human: <image>\n<image>\n\nwhat?\nAssistant:": "what?",  # so is "\n\n"
    "<image>\nwhat is it?": "what is it?",
}


@pytest.mark.parametrize(("row", "words"), HUMAN_ROWS.items())
def test_words_that_merge_with_their_neighbours(row: str, words: str) -> None:
    assert heard(byte_level(HUMAN), [row]) == [words]


def test_the_tokenizers_merge_as_the_tests_say() -> None:
    pieces = byte_level(HUMAN).tokenize("what?\nAssistant:")
    assert any(piece.startswith("?") and len(piece) == 2 for piece in pieces)
    assert sentencepiece_like().tokenize("the cat")[0].startswith("▁")
    assert len(sentencepiece_like().tokenize("ASSISTANT:")) > 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_to_the_column(side: str) -> None:
    processor = characters()
    rows = ["USER: <image>\nis it? ASSISTANT:", "USER: so <image>?\nno ASSISTANT:"]
    ids, real = tokenised(processor.tokenizer, rows, side)
    words = Prompts(host_of(processor), processor).words(ids, real, [1, 1])
    expected = [
        "." + "." * len("USER: ") + "..." + ".wwwwww" + "." * len(" ASSISTANT:"),
        "." + "." * len("USER: ") + "www..." + "wwww" + "." * len(" ASSISTANT:"),
    ]
    for row, text in enumerate(expected):
        actual = ["w" if word else "." for word in words[row, real[row]]]
        assert "".join(actual) == text


def test_padding_and_repeated_beginnings_do_not_matter() -> None:
    processor = characters()
    prompts = Prompts(host_of(processor), processor)
    ids, real = tokenised(processor.tokenizer, ["USER: <image>\nis it? ASSISTANT:"])
    twice = torch.cat([ids[:, :1], ids], dim=1)  # BOS of the template and of the tokenizer
    expected = prompts.words(ids, real, [1])
    assert expected.sum() == len("is it?")
    actual = prompts.words(twice, torch.ones_like(twice).bool(), [1])
    assert torch.equal(actual[:, 1:], expected)
    # Padding within the row, between two placeholders, and image tokens as padding.
    holes = torch.cat([ids[:, :8], ids.new_full((1, 3), IMAGE_TOKEN), ids[:, 8:]], dim=1)
    mask = torch.ones_like(holes).bool()
    mask[:, 8:11] = False
    actual = prompts.words(holes, mask, [1])
    assert torch.equal(torch.cat([actual[:, :8], actual[:, 11:]], dim=1), expected)


def test_nothing_left_but_the_template() -> None:
    processor = characters()
    prompts = Prompts(host_of(processor), processor)
    rows = ["USER: <image>\n ASSISTANT:", "<image>", "USER: <image>\nso ASSISTANT:"]
    ids, real = tokenised(processor.tokenizer, rows)
    words = prompts.words(ids, real, [1, 1, 1])
    assert words.sum(dim=1).tolist() == [0, 0, 2]
    assert prompts.strings(ids, words) == ["", "", "so"]


def test_unknown_words_are_words_and_other_special_tokens_are_not() -> None:
    processor = characters()
    rows = ["USER: <image>\né</s>\u00e4? ASSISTANT:"]
    assert heard(processor, rows) == ["<unk> <unk>?"]


def test_the_words_embedded() -> None:
    embed = torch.nn.Embedding(9, 4)
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 1, 2], [3, 3, 3, 3, 3]])
    words = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    embeddings, valid = embed_words(embed, ids, words)
    assert valid.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert torch.equal(embeddings[0], embed.weight[[2, 4, 5]])
    assert torch.equal(embeddings[1], torch.cat([embed.weight[[6]], torch.zeros(2, 4)]))
    assert not embeddings[2].any()


# -------------------------------------------------------------------------------- the template


def around(processor: Any, num_images: int = 1) -> Any:
    from ocvtp.hosts.prompt.chat_template import ChatTemplate

    return ChatTemplate(processor, host_of(processor).image_token_id).around(num_images)


def test_what_stands_around_the_text() -> None:
    processor = characters()
    template = around(processor, 2)
    said = [processor.tokenizer.decode(part) for part in (template.head, template.tail)]
    assert said == ["USER: <image>\n<image>\n", " ASSISTANT:"]
    assert template.opening == len("USER: ")
    marks = [
        {processor.tokenizer.decode(m) for m in ms} for ms in (template.user, template.assistant)
    ]
    assert marks == [{"USER:", " USER: "}, {"ASSISTANT:", " ASSISTANT: "}]


SINGLE = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + LLAVA_TEMPLATE
)


def test_templates_of_single_turns() -> None:
    processor = tiny_processor(SINGLE)
    template = around(processor)
    assert (template.user, template.assistant) == ((), ())
    assert heard(processor, ["USER: <image>\nwhat? ASSISTANT:"]) == ["what?"]


SAME = "{% for m in messages %}>>{{ m['content'] }}\n{% endfor %}>>"


def test_templates_that_do_not_tell_who_speaks() -> None:
    processor = tiny_processor(SAME)
    template = around(processor)
    assert (template.user, template.assistant) == ((), ())
    assert heard(processor, [">><image>\nwhat?\n>>the cat\n>>who?\n>>"]) == [
        "what?\n>>the cat\n>>who?"
    ]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('never') }}",
        "no contents at all",
        "{{ messages[0]['content'][1] }}",
    ],
    ids=["none", "raises", "constant", "no_image"],
)
def test_processors_without_a_template_of_use(template: str | None) -> None:
    prompts = Prompts(host_of(characters()), tiny_processor(template))
    assert prompts.problem == "has no chat template that can be rendered"
    ids, real = tokenised(characters().tokenizer, ["USER: <image>\nso ASSISTANT:"])
    words = prompts.words(ids, real, [1])
    assert prompts.strings(ids, words) == ["USER: so ASSISTANT:"]
