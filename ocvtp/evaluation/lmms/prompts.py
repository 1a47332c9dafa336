"""Messages of lmms-eval as prompts: a text in the model's chat template, and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.images import open_image, to_rgb


@dataclass(frozen=True)
class Asked:
    """A request, made ready.

    Args:
        text: the whole prompt, chat template included.
        images: of its placeholders, in their order.
    """

    text: str
    images: list[Image.Image]


def ask(processor: Any, messages: Sequence[Mapping[str, Any]]) -> Asked:
    """The prompt of a conversation.

    Args:
        processor: of the model.
        messages: `role`, and `content`, a list of `{"type": "text", "text": ..}` and
            `{"type": "image", "url": ..}`, an image or the path of one.

    Raises:
        ValueError: for other media, an image that cannot be read, several messages without a
            template, or a text that holds the placeholder of images.
    """
    images: list[Image.Image] = []
    plain = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_opened(part["url"]))
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise ValueError(
                    f"a prompt has a part of type {part['type']!r}; the model 'ocvtp' reads texts"
                    " and images: pass another task."
                )
        plain.append({"role": message["role"], "content": parts})
    return Asked(_rendered(processor, plain, len(images)), images)


def _opened(image: Any) -> Image.Image:
    """An image of a prompt, given as such or as the path of a file."""
    if isinstance(image, str):
        return open_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    raise ValueError(f"a prompt has an image of type {type(image).__name__}; pass PIL or a path.")


def _rendered(processor: Any, messages: Sequence[dict[str, Any]], num_images: int) -> str:
    """Messages in the chat template; without one, a single question in that of Vicuna."""
    texts = [[p["text"] for p in m["content"] if p["type"] == "text"] for m in messages]
    placeholder = getattr(processor, "image_token", "<image>")
    if any(placeholder in text for some in texts for text in some):
        raise ValueError(
            f"the text of a prompt holds {placeholder!r}, which stands for an image; take it out"
            " (doc_to_text), images are put in front."
        )
    if getattr(processor, "chat_template", None) is not None:
        return str(processor.apply_chat_template(list(messages), add_generation_prompt=True))
    if len(messages) > 1:
        raise ValueError(
            f"the processor has no chat template for {len(messages)} messages; pass tasks of one."
        )
    return with_template(processor, "\n".join(texts[0]), num_images)
