"""A tokenizer without a vocabulary file, for models of random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def byte_tokenizer(special_tokens: Mapping[str, str]) -> Any:
    """A tokenizer that reads any text, byte by byte.

    Args:
        special_tokens: text of further tokens, by their names.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<unk>", *special_tokens.values()]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=dict(special_tokens),
        padding_side="left",
    )
