"""The demo VLM's processor: LLaVA's own, around a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ocvtp.data.questions import WORDS
from ocvtp.random_models.clip_config import plain_processor
from tools.demo_vlm.settings import ModelSettings

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
_PROMPT_WORDS = ("user", "assistant", ":", "?", ".")
_WORDS = (*_PROMPT_WORDS, *WORDS)
BEFORE_IMAGE = f"{BOS} USER:"
AFTER_QUESTION = "ASSISTANT:"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's: `USER: <image>\\nQuestion? ASSISTANT:`."""


def word_tokenizer(words: Sequence[str] = WORDS) -> Any:
    """A tokenizer of whole words, small and capital alike.

    Args:
        words: that questions and answers are made of, in lower case.
    """
    special = [PAD, BOS, EOS, UNKNOWN, IMAGE]
    return _tokenizer(
        [*special, *_PROMPT_WORDS, *words],
        f"{BOS} $A",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
    )


def text_tower_tokenizer(max_length: int) -> Any:
    """The same words as a CLIP reads them: between BOS and EOS, which come last as CLIP's do.

    Args:
        max_length: tokens that the text tower reads, BOS and EOS included.
    """
    return _tokenizer(
        [PAD, UNKNOWN, *_WORDS, BOS, EOS], f"{BOS} $A {EOS}", model_max_length=max_length
    )


def _tokenizer(tokens: Sequence[str], sequence: str, **settings: Any) -> Any:
    """Of whole words, numbered in this order; what it does not know is `UNKNOWN`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    ends = [(name, tokens.index(name)) for name in (BOS, EOS) if name in sequence.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=sequence, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        **settings,
    )


def build_processor(settings: ModelSettings) -> Any:
    """A `LlavaProcessor`: pixels in -1..1, words to numbers, `<image>` to a token a patch."""
    images = plain_processor(settings.image_size)
    images.image_mean = images.image_std = [0.5] * 3
    return llava_processor(images, word_tokenizer(), settings.patch_size)


def llava_processor(images: Any, tokenizer: Any, patch_size: int) -> Any:
    """LLaVA's processor around an image processor and a tokenizer."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
