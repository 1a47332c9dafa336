"""Names of images in files of others stay inside of their folder, unless one says otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ocvtp.cli import main
from ocvtp.data.coco import CocoImages
from ocvtp.data.coco_questions import CocoQuestionDataModule
from ocvtp.data.conversations import ConversationDataModule
from ocvtp.data.image_names import check_inside, inside
from ocvtp.data.module import CocoDataModule
from ocvtp.evaluation.tasks.coverage import CoverageTask
from ocvtp.evaluation.tasks.pope import PopeTask
from ocvtp.evaluation.tasks.vqa import VqaTask


class AsStored:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def instance_map(self, ids):
        return torch.from_numpy(np.array(ids))

    def describe(self):
        return {}


@pytest.fixture
def folder(tmp_path):
    """`images/` with an image, a link to it and one that leads out; the secret is beside it."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    Image.new("RGB", (12, 8), "red").save(tmp_path / "secret.png")
    Image.new("RGB", (12, 8), "blue").save(images / "own.png")
    (images / "near.png").symlink_to("own.png")
    (images / "far.png").symlink_to(tmp_path / "secret.png")
    (images / "away").symlink_to(tmp_path)
    return images


def outside_names(folder):
    secret = folder.parent / "secret.png"
    return [
        *("../secret.png", "deep/../../secret.png", str(secret), "far.png", "away/secret.png"),
        *("deep/../own.png", "..", "own.png\0", "C:/secret.png", "..\\secret.png"),
    ]


def test_what_leads_out_is_refused(folder):
    for name in outside_names(folder):
        with pytest.raises(ValueError, match="of its folder") as refused:
            inside(folder, name)
        assert "\0" not in str(refused.value)


def test_what_is_inside_is_found(folder, tmp_path):
    (tmp_path / "moved").symlink_to(folder)
    for place in (folder, tmp_path / "moved"):
        for name in ("own.png", "near.png", "./own.png", "deep", "absent.png", "a..b/own.png"):
            assert inside(place, name) == place / name
    assert inside(folder, "far.png", outside=True) == folder / "far.png"
    with pytest.raises(ValueError, match=r"file '\.\./x' is not a name inside.*name files by"):
        check_inside("../x", folder, "file")


def coco(folder, name):
    entry = {"id": 1, "file_name": name, "width": 12, "height": 8}
    box = [0, 0, 4, 0, 4, 4, 0, 4]
    objects = [{"id": 1, "image_id": 1, "segmentation": [box], "iscrowd": 0, "category_id": 1}]
    kinds = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    path = folder.parent / "instances.json"
    path.write_text(json.dumps({"images": [entry], "annotations": objects, "categories": kinds}))
    return path


def of_coco(folder, name, outside):
    images = CocoImages(folder, coco(folder, name), AsStored(), outside=outside)
    return images[0]["pixel_values"].permute(1, 2, 0).numpy()


def of_module(folder, name, outside):
    coco(folder, name)
    paths = {"train_images": folder.name, "train_annotations": "instances.json"}
    data = CocoDataModule(
        str(folder.parent), **paths, val_images=None, transform=AsStored(), outside=outside
    )
    data.setup("fit")
    return data.train_set[0]["pixel_values"].permute(1, 2, 0).numpy()


def of_coco_questions(folder, name, outside):
    coco(folder, name)
    paths = {"train_images": folder.name, "train_annotations": "instances.json"}
    data = CocoQuestionDataModule(str(folder.parent), **paths, existence=2, outside=outside)
    return np.asarray(data.questions("train")[0]["image"])


def of_conversations(folder, name, outside):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    text = json.dumps([{"image": name, "conversations": turns}])
    (folder.parent / "talk.json").write_text(text)
    data = ConversationDataModule(
        str(folder.parent), "talk.json", images=folder.name, outside=outside
    )
    return np.asarray(data.questions("train")[0]["image"])


def of_vqa(folder, name, outside):
    asked = [{"image": name, "question": "What?", "answer": "That."}]
    (folder.parent / "asked.json").write_text(json.dumps(asked))
    return np.asarray(VqaTask(folder.parent / "asked.json", folder, outside=outside).image(0))


def of_pope(folder, name, outside):
    asked = {"question_id": 1, "image": name, "text": "Is it?", "label": "yes"}
    path = folder.parent / "asked_random.json"
    path.write_text(json.dumps(asked))
    return np.asarray(PopeTask([path], folder, outside=outside).image(0))


def of_coverage(folder, name, outside):
    return np.asarray(CoverageTask(folder, coco(folder, name), None, outside=outside).image(0))


READERS = [
    *(of_coco, of_module, of_coco_questions, of_conversations, of_vqa, of_pope, of_coverage),
]


@pytest.mark.parametrize("read", READERS)
def test_no_reader_leaves_the_folder_unless_told(folder, read):
    for name in ("own.png", "near.png"):
        assert read(folder, name, False)[0, 0].tolist() == [0, 0, 255]
    for name in outside_names(folder)[:5]:
        with pytest.raises(ValueError, match="of its folder"):
            read(folder, name, False)
        assert read(folder, name, True)[0, 0].tolist() == [255, 0, 0]


def test_images_that_lead_out_can_be_left_out(folder):
    images = CocoImages(folder, coco(folder, "far.png"), AsStored(), on_error="skip")
    assert images[0]["error"].startswith("far.png: image 'far.png' is a link out of its folder")


def test_a_folder_without_a_file_is_read_as_it_lies(folder):
    """Its names are the user's own: many a folder is made of links."""
    images = CocoImages(folder, None, AsStored())
    assert [name for _, name in images.names] == ["far.png", "near.png", "own.png"]
    assert images[0]["pixel_values"].float().mean(dim=(1, 2)).tolist() == [255, 0, 0]


@pytest.mark.parametrize("task", ["vqa", "pope"])
def test_it_is_a_flag(task, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--task", task, "--help"])
    assert "names and links may lead out of --images" in " ".join(capsys.readouterr().out.split())
