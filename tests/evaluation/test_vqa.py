import json

import numpy as np
import pytest
from listed_files import answers, write_images, write_lines
from PIL import Image

from ocvtp.evaluation.tasks.vqa import VqaTask

ENTRIES = [
    {"image": "b.png", "question": "What colour?", "answers": ["red"] * 2 + ["blue"] * 8},
    {"image": "a.png", "question": "How many?", "answer": "two", "kind": "count"},
    {"image": "b.png", "question": "How many dogs?", "answers": ["3"], "kind": "count"},
]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", ["a.png", "b.png"])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def test_questions_of_an_image_stand_side_by_side(file, folder):
    task = VqaTask(file, folder, suffix="\nOne word.")
    got = [(i.key, i.owner, i.question, i.kind) for i in task.items]
    assert got == [
        ("1", 0, "What colour?\nOne word.", ""),
        ("3", 0, "How many dogs?\nOne word.", "count"),
        ("2", 1, "How many?\nOne word.", "count"),
    ]
    assert [task.image(owner).getpixel((0, 0))[0] for owner in (0, 1)] == [1, 0]
    assert task.masks(0) is None
    assert task.items[2].answers == ("two",)


def test_figures(file, folder):
    task = VqaTask(file, folder)
    figures = task.ratios(answers(["Red.", "three", "1"]))
    # red: two of ten people; three is 3; 1 is wrong
    assert {name: ratio.value for name, ratio in figures.items()} == pytest.approx(
        {
            "all/accuracy": (0.6 + 1) / 3,
            "all/exact": 2 / 3,
            "count/accuracy": 0.5,
            "count/exact": 0.5,
        }
    )
    assert set(task.metrics) <= figures.keys()
    assert figures["count/exact"].owners.tolist() == [0, 1]
    assert figures["all/accuracy"].hits == pytest.approx(np.array([0.6, 1, 0]))
    with pytest.raises(ValueError, match="2 records for 3 items"):
        task.ratios(answers(["red", "3"]))


def test_a_list_and_lines_are_the_same_task(file, folder, tmp_path):
    lines = write_lines(tmp_path / "questions.jsonl", ENTRIES)
    lines.write_text(lines.read_text() + "\n")
    task = VqaTask(file, folder)
    first = task.describe()
    assert VqaTask(lines, folder).describe() == first
    assert json.loads(json.dumps(first)) == first
    suffixed, limited = VqaTask(file, folder, suffix=" "), VqaTask(file, folder, limit=1)
    assert first != suffixed.describe()
    assert first != limited.describe()
    assert limited.items == task.items[:2]
    Image.new("L", (99, 99), 7).save(folder / "a.png")
    resized = VqaTask(file, folder)
    assert resized.items == task.items
    assert resized.describe() != first
    assert resized.image(1).getpixel((0, 0)) == (7, 7, 7)  # RGB, whatever the file has


def test_images_lie_beside_the_file_unless_said(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    path = write_lines(tmp_path / "questions.json", ENTRIES)
    assert VqaTask(path).image(1).size == (12, 8)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question": "Q?", "answer": "a"}, "entry 2 of .* lacks 'image' .*has question, answer"),
        ({"image": "a.png", "answer": "a"}, "entry 2 of .* lacks 'question'"),
        ({"image": "a.png", "question": "Q?"}, "entry 2 of .* lacks 'answers' .or 'answer'"),
        ({"image": "a.png", "question": "Q?", "answers": []}, "entry 2 of .* has no 'answers'"),
        ({"image": "a.png", "question": "Q?", "answers": "a"}, "'a' as 'answers'; pass a list"),
        ({"image": "a.png", "question": "Q?", "answers": [2]}, r"\[2\] as 'answers'"),
        ({"image": "a.png", "question": " ", "answer": "a"}, "' ' as 'question'; pass a text"),
        ({"image": "a.png", "question": "Q?", "answer": "a", "kind": "all"}, "rename it"),
        (["a.png"], "entry 2 of .* pass a JSON object"),
        ({"image": "z.png", "question": "Q?", "answer": "a"}, "1 of 2 images are not in .*z.png"),
    ],
)
def test_what_an_entry_lacks_is_named(entry, message, folder, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([ENTRIES[0], entry]))
    with pytest.raises(ValueError, match=message):
        VqaTask(path, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}", "neither a JSON list nor JSON lines"),
        ('{"image": "a.png"}\n\n{"image": ', "line 3"),
        ("", "needs questions"),
        ("[]", "needs questions"),
    ],
)
def test_bad_files_are_refused(text, message, folder, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        VqaTask(path, folder)


def test_files_and_folders_that_are_missing_are_named(file, folder, tmp_path):
    with pytest.raises(ValueError, match=r"none\.json does not exist"):
        VqaTask(tmp_path / "none.json", folder)
    with pytest.raises(ValueError, match="images folder .*nowhere does not exist"):
        VqaTask(file, [folder, tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="limit=0"):
        VqaTask(file, folder, limit=0)
    task = VqaTask(file, folder)
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        task.image(0)
