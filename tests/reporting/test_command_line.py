"""Commands that are printed run as they stand, and messages are in their words."""

from __future__ import annotations

import re
import shlex

import pytest

from ocvtp.reporting.command_line import as_typed, command, in_flags, typed_before


def test_a_command_has_what_was_typed_before_it():
    words = ["export", "--checkpoint", "my runs/best.ckpt"]
    with typed_before(["--import", "my pruner.py", "--"]):
        found = command(*words)
    assert shlex.split(found) == ["ocvtp", "--import", "my pruner.py", "--", *words]
    assert command("list") == "ocvtp list"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "num_keep=1000 exceeds the 144 tokens; pass at most 144.",
            "--num-keep 1000 exceeds the 144 tokens; pass at most 144.",
        ),
        (
            "fopru got num_keep=None and keep_ratio=None; pass exactly one of them, or max_keep.",
            "fopru got no --num-keep and no --keep-ratio; pass exactly one of them, or --max-keep.",
        ),
        (
            "pass text_tower=, the hub id or folder; pass text_tower='a/b c' to load",
            "pass --text-tower, the hub id or folder; pass --text-tower 'a/b c' to load",
        ),
        ("text_tower='gone' cannot be loaded (why).", "--text-tower gone cannot be loaded (why)."),
        ("no share; pass budget='per_image'.", "no share; pass --budget per_image."),
        (
            "keep_ratio=1.5, keep_ratio=.5, keep_ratio=1e-05 and keep_ratio=2.5e-05: num_keep=9.",
            "--keep-ratio 1.5, --keep-ratio .5, --keep-ratio 1e-05 and --keep-ratio 2.5e-05:"
            " --num-keep 9.",
        ),
        ("Pass num_keep=54 or more.", "Pass --num-keep 54 or more."),
        ("a K, which stands for num_keep; pass it", "a K, which stands for --num-keep; pass it"),
        ("levels=('easy', 'hard'), num_images=0: no", "--levels easy hard, --num-images 0: no"),
        (
            "stages=((4, 8), (5, 0.2)), stages=[[2, 4]]; pass stages=((layer, K), ...) from 1.",
            "stages=[[4,8],[5,0.2]], stages=[[2,4]]; pass NAME:stages=[[layer,K],...] from 1.",
        ),
        ("once: pass stages=((layer, K),).", "once: pass NAME:stages=[[layer,K]]."),
        ("early=True; pass choice='one_to_one'.", "early=true; pass NAME:choice=one_to_one."),
        *(
            (text, text)  # no setting of this command, or said in a spec
            for text in (
                "pruner 'fps:num_keep=5' of /runs/num_keep=5/num_keep: num_keep=5 is little",
                "text_tower='a.b' of pruner 'trim:text_tower=a.b' cannot be loaded",
                "write e.g. stages=[[2,64]]; model_type='x'; pass processor=, or `num_keep=3`",
                "question 'is num_keep=5 or stages=(1, 2) of max_keep?' is asked twice",
                'no JSON: {"text": "why num_keep=4, max_keep or early=True?"}',
                "see `attach(model, num_keep=64)`, attach(model, num_keep=64), `ocvtp num_keep`",
                "/my runs, max_keep and num_keep=3/cell.json is not whole",
                "num_keep=3.json is not whole, num_keep=3.tar.gz is none; early=True.csv",
                "Pass max_keep=1.5.txt: it is one of num_keep=1.7z and num_keep=2.py",
                "https://host/?num_keep=5&max_keep=3 says num_keep=[[[1]]]",
            )
        ),
    ],
)
def test_messages_are_in_the_words_of_the_command(said, told):
    flags = "num_keep", "keep_ratio", "max_keep", "text_tower", "budget", "levels", "num_images"

    def command():
        words = ["fps:num_keep=5", "trim:text_tower=a.b", "/my runs, max_keep and num_keep=3"]
        with in_flags(flags, words):
            assert as_typed(said) == as_typed(told) == told
            raise ValueError(said)

    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        command()
    assert as_typed(said) == said
