"""What a chat template puts around the user's text, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FILLERS = ("what", "blue")  # texts that begin and end differently
_UNREADABLE = "has no chat template that can be rendered"


@dataclass(frozen=True)
class Template:
    """Tokens around the text of a prompt, each run of image placeholders written once.

    Args:
        head: what comes before the user's text, images included.
        opening: how many tokens of `head` come before the first image.
        tail: what comes after it, up to where the model answers.
        user: marks after which the user speaks.
        assistant: marks after which the model speaks.
    """

    head: tuple[int, ...]
    opening: int
    tail: tuple[int, ...]
    user: tuple[tuple[int, ...], ...] = ()
    assistant: tuple[tuple[int, ...], ...] = ()


def find_tokenizer(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself; None if it is neither."""
    tokenizer = getattr(processor, "tokenizer", processor)
    is_one = callable(tokenizer) and hasattr(tokenizer, "all_special_ids")
    return tokenizer if is_one else None


def find_processor(model: Any) -> Any:
    """The processor saved with a model, if it is on this machine: nothing is downloaded."""
    from transformers import AutoProcessor

    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    try:
        processor = AutoProcessor.from_pretrained(name, local_files_only=True)
    except Exception:  # whatever is wrong with it, there is none
        return None
    return None if find_tokenizer(processor) is None else processor


def special_tokens(tokenizer: Any) -> set[int]:
    """Tokens that nobody types: of sequences, of turns, padding; not the unknown word."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return found - ({tokenizer.unk_token_id} - ends)


def framing_tokens(tokenizer: Any) -> set[int]:
    """Special tokens that a prompt may have more or less of than its template.

    BOS, padding, and what processors write around the placeholders of an image.
    """
    names = ("bos_token_id", "pad_token_id", "start_image_token_id", "end_image_token_id")
    return {i for name in names if (i := getattr(tokenizer, name, None)) is not None}


class ChatTemplate:
    """The chat template of a processor, found by rendering it around texts that differ.

    Args:
        processor: or tokenizer, with or without a chat template.
        image_token_id: the placeholder of images.
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self._tokenizer = tokenizer = find_tokenizer(processor)
        self._image = image_token_id
        self._special = special_tokens(tokenizer)
        self._framing = framing_tokens(tokenizer)
        self._found: dict[int, Template] = {}
        owners = [o for o in (processor, tokenizer) if getattr(o, "chat_template", None)]
        self._owner = owners[0] if owners else None
        self._in_parts = True  # whether contents are lists of parts, or plain text
        self.problem = None if self._can_render() else _UNREADABLE

    def around(self, num_images: int) -> Template:
        """What surrounds a text that follows so many images.

        Raises:
            ValueError: if there is a `problem`.
        """
        if self.problem is not None:
            raise ValueError(f"the processor {self.problem}.")
        if num_images not in self._found:
            try:
                self._found[num_images] = self._render_around(num_images)
            except Exception:  # it takes a single image
                if num_images == 1:
                    raise
                self._found[num_images] = self.around(1)
        return self._found[num_images]

    def _can_render(self) -> bool:
        """Find out how the template wants its contents."""
        if self._owner is None:
            return False
        for self._in_parts in (True, False):
            try:
                what, blue = (self._tokens(1, text) for text in _FILLERS)
            except Exception:  # templates raise anything at contents they do not know
                continue
            if what != blue and what.count(self._image) == 1:
                return True
        return False

    def _render_around(self, num_images: int) -> Template:
        what, blue = (self._tokens(num_images, text) for text in _FILLERS)
        head, tail = _common_head(what, blue), _common_tail(what, blue)
        opening = head.index(self._image) if self._image in head else len(head)
        between = self._between_turns(num_images)
        if between is None:
            return Template(head, opening, tail)
        to_assistant, to_user = between
        first, later = self._stripped(head[:opening]), self._stripped(to_user)
        assistant = self._spellings(to_assistant)
        user = self._spellings(to_user) | self._spellings(_common_tail(first, later))
        user = {mark for mark in user if not any(_holds(other, mark) for other in assistant)}
        if not (user and assistant):  # one of them would seem to speak for ever
            return Template(head, opening, tail)
        return Template(head, opening, tail, tuple(sorted(user)), tuple(sorted(assistant)))

    def _between_turns(self, num_images: int) -> tuple[tuple[int, ...], ...] | None:
        """What is between a user's text and the answer, and between that and the next text."""
        what, blue = _FILLERS
        turns = ((what, what, what), (blue, what, what), (what, blue, what), (what, what, blue))
        try:
            base, first, second, third = (self._tokens(num_images, *texts) for texts in turns)
        except Exception:  # a template for single turns
            return None
        ends = [len(base) - len(_common_tail(base, other)) for other in (first, second)]
        starts = [len(_common_head(base, other)) for other in (second, third)]
        return tuple(base[end:start] for end, start in zip(ends, starts, strict=True))

    def _spellings(self, mark: tuple[int, ...]) -> set[tuple[int, ...]]:
        """A mark, and its tokens in other places: white space at its ends may merge with words.

        Marks that might be a user's word, a single token that is not special, are left out.
        """
        core = self._stripped(mark)
        text = self._tokenizer.decode(core)
        found = {mark, core, *(self._stripped(self._encode(lead + text)) for lead in ("", "\n"))}
        return {m for m in found if len(m) > 1 or not self._special.isdisjoint(m)}

    def _stripped(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        wordy = [i for i, token in enumerate(tokens) if self._tokenizer.decode([token]).strip()]
        return tokens[wordy[0] : wordy[-1] + 1] if wordy else ()

    def _tokens(self, num_images: int, *texts: str) -> tuple[int, ...]:
        """A conversation of these turns, the images before the first."""
        messages = []
        for number, text in enumerate(texts):
            role = "assistant" if number % 2 else "user"
            images = 0 if number else num_images
            messages.append({"role": role, "content": self._content(images, text)})
        assert self._owner is not None
        rendered = self._owner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._encode(rendered)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Tokens as they are compared: each run of placeholders once, without BOS."""
        ids = [i for i in self._tokenizer(text)["input_ids"] if i not in self._framing]
        pairs = zip(ids, [None, *ids], strict=False)
        return tuple(i for i, before in pairs if not i == before == self._image)

    def _content(self, num_images: int, text: str) -> Any:
        if self._in_parts:
            return [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        placeholder = self._tokenizer.convert_ids_to_tokens(self._image)
        return f"{placeholder}\n" * num_images + text


def _holds(tokens: Sequence[int], part: Sequence[int]) -> bool:
    starts = range(len(tokens) - len(part) + 1)
    return any(tokens[start : start + len(part)] == part for start in starts)


def _common_head(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    pairs = enumerate(zip(a, b, strict=False))
    length = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    return tuple(a[:length])


def _common_tail(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return _common_head(a[::-1], b[::-1])[::-1]


def with_template(processor: Any, prompt: str, num_images: int) -> str:
    """A prompt about images in the model's chat template; unchanged if it has their placeholder."""
    if image_placeholder(processor) in prompt:
        return prompt
    return with_turns(processor, (prompt,), num_images)


def with_turns(processor: Any, turns: Sequence[str], num_images: int) -> str:
    """A conversation in the model's chat template; after the user, up to where the model answers.

    Args:
        processor: of the model; without a template, LLaVA-1.5's.
        turns: what the user says, what the model answers, and so on.
        num_images: before the first of them.
    """
    is_answered = len(turns) % 2 == 0
    if getattr(processor, "chat_template", None) is None:
        images = f"{image_placeholder(processor)}\n" * num_images
        said = [f"ASSISTANT: {text}" if n % 2 else f"USER: {text}" for n, text in enumerate(turns)]
        said[0] = f"USER: {images}{turns[0]}"
        return " ".join(said if is_answered else [*said, "ASSISTANT:"])
    messages = []
    for number, text in enumerate(turns):
        content = [{"type": "image"}] * (0 if number else num_images)
        content = [*content, {"type": "text", "text": text}]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return str(processor.apply_chat_template(messages, add_generation_prompt=not is_answered))


def image_placeholder(processor: Any) -> str:
    """What stands for an image in a prompt."""
    return str(getattr(processor, "image_token", "<image>"))
