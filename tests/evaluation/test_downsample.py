"""Images made smaller until the host makes few tokens of them, where it can."""

import numpy as np
import pytest
from PIL import Image

from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.labels import DOWNSAMPLE
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.loading import load_model


def subject_of(name):
    return Subject(*load_model(name, "float32"), name)


@pytest.fixture(scope="module")
def qwen():
    return subject_of("random:tiny-qwen2.5-vl")


def picture(size):
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tokens_by_hand(image, unit=28):
    """Qwen's own rounding, for images that are within its limits."""
    width, height = image.size
    return round(width / unit) * round(height / unit)


@pytest.mark.parametrize("size", [(224, 224), (150, 300)])
@pytest.mark.parametrize("count", [25, 9, 6])
def test_a_smaller_picture_gives_about_so_many_tokens(qwen, size, count):
    image = picture(size)
    smaller = qwen.sizer.smaller(image, Budget(num_keep=count))
    made = qwen.sizer.tokens(smaller.size)
    assert made == tokens_by_hand(smaller)
    assert 0.6 * count <= made <= count
    shape = smaller.size[0] / smaller.size[1]
    assert shape == pytest.approx(size[0] / size[1], rel=0.1)
    best = max(
        n
        for by in np.linspace(0.05, 1, 80)
        if (n := qwen.sizer.tokens((round(by * size[0]), round(by * size[1])))) <= count
    )
    assert made == best


def test_a_share_is_that_of_the_images_own_tokens(qwen):
    smaller = qwen.sizer.smaller(picture((224, 224)), Budget(keep_ratio=0.25))
    assert qwen.sizer.tokens(smaller.size) == 16
    image = picture((56, 56))
    assert qwen.sizer.smaller(image, Budget(num_keep=16)) is image


def test_the_row_tells_the_true_count_and_answers_are_those_of_the_smaller_picture(qwen, tmp_path):
    task = SceneTask(levels=("easy",), num_images=2, questions=2, size=140)
    budgets = [Budget(num_keep=10), Budget(num_keep=4)]
    report, records = evaluate(
        qwen, task, [], budgets, tmp_path, controls=("pool", DOWNSAMPLE), batch_size=4
    )
    rows = {(row.label, row.num_keep): row for row in report.rows}
    assert rows[DOWNSAMPLE, 10].visual_tokens == 9  # 3 x 3 of a square
    assert rows[DOWNSAMPLE, 4].visual_tokens == 4
    assert rows[DOWNSAMPLE, 10].control
    assert not report.remarks
    assert {record["given"] for record in records[f"{DOWNSAMPLE} @ 10 # 0"]} == {9}
    small = SceneTask(levels=("easy",), num_images=2, questions=2, size=140)
    plain, size = small.image, qwen.sizer.size((140, 140), budgets[0])
    assert round(size[0] / 28) == 3
    small.image = lambda owner: plain(owner).resize(size, Image.Resampling.BICUBIC)
    _, expected = evaluate(qwen, small, [], budgets, tmp_path / "same", controls=(), batch_size=4)
    said = [record["answer"] for record in records[f"{DOWNSAMPLE} @ 10 # 0"]]
    assert said == [record["answer"] for record in expected["unpruned # 0"]]


def test_a_tower_of_one_size_has_pooling_in_its_place(tmp_path):
    subject = subject_of("random:tiny-llava")
    task = SceneTask(levels=("easy",), num_images=1, questions=2, size=48)
    for number, controls in enumerate([("pool", DOWNSAMPLE), (DOWNSAMPLE,)]):
        report, _ = evaluate(
            subject, task, [], [Budget(num_keep=9)], tmp_path / str(number), controls=controls
        )
        assert DOWNSAMPLE not in {row.label for row in report.rows}
        (remark,) = report.remarks
        assert "144 tokens of an image of 48 x 48 pixels, and as many at any smaller size" in remark
        assert ("`pool`" in remark) is (number == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random:tiny-llava-next", "random:tiny-llava-onevision"])
def test_models_of_tiles_come_as_near_as_their_grids_let_them(name):
    sizer = subject_of(name).sizer
    size = (200, 150)
    whole = sizer.tokens(size)
    fewest = min(sizer.tokens((4 * n, 3 * n)) for n in range(5, 50, 5))
    if fewest < whole:
        made = sizer.tokens(sizer.size(size, Budget(num_keep=fewest)))
        assert made == fewest
        sizer.check(size, Budget(num_keep=fewest))
    with pytest.raises(ValueError, match="tokens"):
        sizer.check(size, Budget(num_keep=2))
