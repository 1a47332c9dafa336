import pytest

from ocvtp.evaluation.tasks.answers import (
    exact_yes_no,
    normalise_vqa,
    pope_yes_no,
    vqa_accuracy,
    vqa_exact,
)


@pytest.mark.parametrize(
    ("text", "official", "exact"),
    [
        ("yes", "yes", "yes"),
        ("Yes", "yes", "yes"),
        (" Yes.\n", "yes", "yes"),
        ("no.", "no", "no"),
        ("No", "no", "no"),
        ("NO", "yes", "no"),  # the official list has No and no only
        ("no!", "yes", "no"),  # the official rule takes off commas and no other mark
        ("No, there is not", "no", None),
        ("No,", "no", "no"),
        ("not sure", "no", None),
        ("Yes and no", "no", None),
        ("Yes, it is not hidden", "no", None),
        ("", "yes", None),
        ("Nothing", "yes", None),
        ("Yes. No.", "yes", None),
        ("There is. Not a dog", "yes", None),
        (". no", "yes", None),
        ("There is no dog.", "no", None),
        ("\nno", "yes", "no"),  # split at single spaces alone
        ("yesno", "yes", None),
    ],
)
def test_yes_or_no(text, official, exact):
    assert pope_yes_no(text) == official
    assert exact_yes_no(text) == exact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog", "dog"),
        ("a dog and an owl", "dog and owl"),
        ("two", "2"),
        ("None", "0"),
        ("Ten\ndogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"),  # two apostrophes short
        ("its", "its"),
        ("black-and-white", "black and white"),
        ("black - and-white", "black andwhite"),  # the same mark beside a space: nothing
        ("yes.", "yes"),
        ("3.5 m.", "3.5 m"),
        (".5", ".5"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),
        ("red/blue", "red blue"),
        ("what?", "what"),
        ("A", ""),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalise_vqa(text) == expected


def test_vqa_accuracy_leaves_each_of_ten_people_out():
    def people(equal):
        return ["red"] * equal + ["blue"] * (10 - equal)

    got = [vqa_accuracy("Red.", people(n)) for n in range(11)]
    # n people agree: n times n - 1 others do, 10 - n times n others do
    assert got == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("answers", [["red"], ["blue", "the red"], ["blue"] * 8 + ["RED"]])
def test_with_fewer_answers_one_match_is_enough(answers):
    assert vqa_accuracy("a red", answers) == 1.0
    assert vqa_accuracy("dark red", answers) == 0.0
    assert vqa_exact("a red", answers)
    assert not vqa_exact("dark red", answers)


def test_an_answer_is_normalised_where_all_people_agree_too():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 1.0
