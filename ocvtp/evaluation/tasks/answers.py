"""What a model said, and whether it is right: POPE's parser, exact yes or no, VQA's soft accuracy.

Pure functions of texts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

YesNo = Literal["yes", "no"]

NUM_VQA_ANSWERS = 10  # people asked per question; the soft accuracy is defined for so many
_TRAILING = re.compile(r"[\s.,;:!?\"'`)]+$")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA = re.compile(r"\d,\d")
_ARTICLES = ("a", "an", "the")
_DIGITS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _without_one_apostrophe(words: str) -> dict[str, str]:
    """`couldnt've` and `couldn'tve` to `couldn't've`, `dont` to `don't`, ..."""
    return {
        word[: mark.start()] + word[mark.end() :]: word
        for word in words.split()
        for mark in re.finditer("'", word)
    }


_APOSTROPHES = _without_one_apostrophe(_CONTRACTIONS)


def pope_yes_no(text: str) -> YesNo:
    """The answer as POPE's official `evaluate.py` reads it.

    What comes before the first full stop, without commas, split at single spaces: `No`, `no` or
    `not` among the words is no, all else yes. So `NO`, `Nothing`, `no!` and the empty text are yes.
    From https://github.com/AoiDragon/POPE (https://arxiv.org/abs/2305.10355).
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def exact_yes_no(text: str) -> YesNo | None:
    """Yes or no if the answer is this one word; None, which is always wrong, for all else.

    Case, white space around it and punctuation after it do not matter.
    """
    word = _TRAILING.sub("", text).strip().lower()
    if word == "yes":
        return "yes"
    return "no" if word == "no" else None


def normalise_vqa(text: str) -> str:
    """An answer in the form in which VQA v2's official script compares answers.

    Punctuation and articles go, number words become digits, missing apostrophes are put back, and
    all is lower case. A mark becomes a space; it becomes nothing where the text has it next to a
    space as well, or has any comma between digits. A full stop before a digit stays.
    From https://github.com/GT-Vision-Lab/VQA (https://arxiv.org/abs/1612.00837).
    """
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    number = _DIGIT_COMMA.search(plain) is not None
    cleaned = plain
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in plain or f" {mark}" in plain
        cleaned = cleaned.replace(mark, "" if beside_space or number else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """VQA v2's soft accuracy of an answer, 0 to 1.

    With ten people's answers or more: min(n / 3, 1) with n equal answers among all but one of the
    people, averaged over the one left out. With fewer: 1 where any is equal. Both sides are
    normalised always; the official script does so only where people disagree.

    Args:
        text: what the model said.
        answers: what people said, at least one.
    """
    said = normalise_vqa(text)
    equal = [normalise_vqa(answer) == said for answer in answers]
    if len(answers) < NUM_VQA_ANSWERS:
        return float(any(equal))
    return sum(min((sum(equal) - own) / 3, 1.0) for own in equal) / len(equal)


def vqa_exact(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer equals any of the right ones, all normalised."""
    return normalise_vqa(text) in map(normalise_vqa, answers)
