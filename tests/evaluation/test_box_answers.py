"""Boxes in what models say, and where they are in the image that was asked about."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from ocvtp.data.grounding import turned
from ocvtp.evaluation.tasks.box_answers import overlap, parse_box
from ocvtp.evaluation.tasks.box_frames import Frames


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ('```json\n[\n\t{"bbox_2d": [12, 30, 140, 52], "label": "dog"}\n]\n```', (12, 30, 140, 52)),
        ('{"label": "cat 2", "bbox_2d": [1.5, 2, 3, 4.25]}', (1.5, 2, 3, 4.25)),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]', (1, 2, 3, 4)),
        ("Image 1 of 2: {'bbox': [1, 2, 3, 4]}", (1, 2, 3, 4)),
        ("[0.12, 0.3, .5, 1.0]", (0.12, 0.3, 0.5, 1.0)),
        ("The dog is at [0.12, 0.30, 0.52, 0.44].", (0.12, 0.3, 0.52, 0.44)),
        ("<ref>dog</ref><box>[[123, 45, 678, 900]]</box>", (123, 45, 678, 900)),
        (
            "<|object_ref_start|>dog 2<|object_ref_end|><|box_start|>(12,30),(140,52)<|box_end|>",
            (12, 30, 140, 52),
        ),
        ("34 22 58 46", (34, 22, 58, 46)),
        ("34, 22, 58, 46.", (34, 22, 58, 46)),
        ("x1=34, y1=22, x2=58, y2=46", (34, 22, 58, 46)),
        ("x1: 34, y1: 22, x2: 58, y2: 46", (34, 22, 58, 46)),
        ("(34, 22, 58, 46)", (34, 22, 58, 46)),
        ("[-3, 0, 58, 46]", (-3, 0, 58, 46)),
        ("", None),
        ("I cannot see a dog.", None),
        ("34 22 58", None),
        ("1. 34 22 58 46", None),
        ("[34, 22, 58]", None),
        ("10% 20% 30% 40%", None),
        ("[34, 22, 58, 46, 70]", None),
    ],
)
def test_the_first_box_of_an_answer(text, box):
    assert parse_box(text) == box


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert overlap((0, 0, 4, 4), (2, 2, 6, 6)) == pytest.approx(4 / 28)
    assert overlap((0, 0, 4, 4), (4, 0, 8, 4)) == 0
    assert overlap((4, 4, 0, 0), (0, 0, 4, 4)) == 0
    assert overlap((4, 4, 0, 0), (4, 4, 0, 0)) == 0


@pytest.mark.parametrize("turn", [None, *Image.Transpose])
def test_a_box_turns_as_its_image_does(turn):
    mask = Image.new("1", (9, 6))
    mask.paste(1, (2, 1, 7, 3))
    upright = mask if turn is None else mask.transpose(turn)
    assert turned((2, 1, 7, 3), mask.size, turn) == upright.getbbox()


def processor(name, images):
    return type(name, (), {"image_processor": images})()


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})


@pytest.fixture(scope="module")
def qwen():
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(patch_size=14, merge_size=2)


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("LlavaProcessor", (0.0, 0.5, 1.0, 1.0), (10, 10, 30, 20)),  # the middle, which it sees
        ("LlavaProcessor", (0, 12, 24, 24), (10, 10, 30, 20)),  # pixels of the crop
        ("InternVLProcessor", (0, 500, 1000, 1000), (10, 10, 30, 20)),
    ],
)
def test_numbers_are_of_the_picture_that_a_model_sees(clip, name, said, expected):
    frames = Frames(processor(name, clip))
    assert frames.in_image(said, (40, 20)) == pytest.approx(expected, abs=0.6)


def test_pixels_of_a_resized_picture(qwen):
    """100 x 150 pixels are made 112 x 140 (Qwen2.5-VL says boxes in those)."""
    plain = Frames(processor("Qwen2_5_VLProcessor", qwen))
    assert plain.in_image((0, 0, 112, 140), (100, 150)) == pytest.approx((0, 0, 100, 150))
    assert plain.in_image((56, 0, 112, 70), (100, 150)) == pytest.approx((50, 0, 100, 75))
    smaller = plain.in_image((28, 0, 56, 56), (100, 150), (50, 50))
    assert smaller == pytest.approx((50, 0, 100, 150))
    older = Frames(processor("Qwen2VLProcessor", qwen))
    assert older.in_image((500, 0, 1000, 500), (100, 150)) == pytest.approx((50, 0, 100, 75))


def test_what_is_said_goes_before_the_family(qwen):
    box = (0.5, 0, 1, 0.5)
    auto = Frames(processor("Qwen2_5_VLProcessor", qwen))
    assert auto.in_image(box, (100, 150)) == pytest.approx((50, 0, 100, 75))
    told = Frames(processor("Qwen2_5_VLProcessor", qwen), "pixels")
    assert told.in_image(box, (112, 140)) == pytest.approx(box)
    assert Frames(None, "thousand").in_image((0, 0, 500, 500), (8, 4)) == (0, 0, 4, 2)
    assert Frames().in_image((1, 1, 3, 2), (8, 4)) == (1, 1, 3, 2)
    with pytest.raises(ValueError, match="coordinates='parts'.*pass one of auto, pixels"):
        Frames(None, "parts")


def test_a_padded_picture(clip):
    """The image lies in the middle of a square, as LLaVA's own code pads it."""

    class Padded:
        def __call__(self, images, **options):
            square = [ImageOps.pad(i, (24, 24), Image.Resampling.NEAREST) for i in images]
            pixels = np.stack([np.asarray(i).transpose(2, 0, 1) for i in square]).astype(float)
            import torch

            return {"pixel_values": torch.from_numpy(pixels)}

    frames = Frames(processor("LlavaProcessor", Padded()), "unit")
    assert frames.in_image((0, 0.25, 1, 0.75), (40, 20)) == pytest.approx((0, 0, 40, 20))
