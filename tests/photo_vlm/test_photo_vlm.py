"""`python -m tools.photo_vlm`: timm's tower, stopped runs go on, the folder is a model."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from tiny_photo_vlm import RULE, SIZE, tiny_settings, write_inputs
from tiny_timm import tiny_timm

from ocvtp.evaluation.oracle import LEAST_COVER, on_cells
from ocvtp.hosts.loading import load_model
from tools.photo_vlm.__main__ import main
from tools.photo_vlm.batches import Batches, listed
from tools.photo_vlm.composites import Painter, split_photos
from tools.photo_vlm.cutouts import cut_out
from tools.photo_vlm.folders import assemble
from tools.photo_vlm.learner import Learner, spotlight
from tools.photo_vlm.questions import Asker
from tools.photo_vlm.recipe import make_model, measure
from tools.photo_vlm.shards import object_table, patch_labels, read_shards
from tools.photo_vlm.task import CompositeTask
from tools.photo_vlm.tower import convert, encode, read_timm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("photo"))


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    settings = tiny_settings(inputs, tmp_path_factory.mktemp("model"))
    return settings, make_model(settings)


@pytest.mark.parametrize("size", [56, SIZE])
def test_the_tower_is_that_of_timm(inputs, size):
    """At the size of its positions and at another."""
    theirs = timm.create_model(
        f"local-dir:{inputs['tower']}", pretrained=True, img_size=size, num_classes=0
    ).eval()
    ours = convert(read_timm(inputs["tower"], size))
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = ours(pixels, output_hidden_states=True)
        known = theirs.forward_intermediates(
            pixels, norm=False, output_fmt="NLC", intermediates_only=True
        )
        last = theirs.forward_features(pixels)
    assert len(found.hidden_states) == 1 + len(known)
    for one, other in zip(found.hidden_states[1:], known, strict=True):
        torch.testing.assert_close(one[:, 1:], other, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.last_hidden_state, last, atol=1e-4, rtol=0)
    torch.testing.assert_close(encode(ours, pixels), known[-2], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("size", "text"), [(60, "multiple of the tower's patch"), (56, "no DINOv2")]
)
def test_other_towers_and_sizes_are_refused(inputs, tmp_path, size, text):
    folder = inputs["tower"]
    if text == "no DINOv2":
        folder = tmp_path / "vit"
        tiny_timm(folder, "vit_small_patch16_224", depth=2, patch_size=14)
    with pytest.raises(ValueError, match=text):
        read_timm(folder, size)


def test_a_folder_without_a_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        read_timm(tmp_path, 56)


@pytest.mark.slow
def test_shards_are_what_tower_and_masks_say(made):
    settings, root = made
    cutouts, photos = cut_out(settings.coco, RULE)["train"], split_photos(settings.photos)["train"]
    painter = Painter(cutouts, photos, SIZE, settings.seed, "train")
    encoded = read_shards(sorted((root / "work/train").glob("*.safetensors")))
    model, processor = load_model(str(root), "float32")
    assert len(encoded) == settings.num_train
    for number in range(settings.num_train):
        composite = painter.draw(number)
        pixels = processor.image_processor(images=composite.image, return_tensors="pt")
        features = encode(model.model.vision_tower, pixels["pixel_values"])[0]
        torch.testing.assert_close(encoded.features[number].float(), features, atol=5e-3, rtol=5e-3)
        cover = on_cells(np.stack([item.mask for item in composite.objects]), (6, 6))
        for patch, label in enumerate(encoded.patches[number].tolist()):
            most = cover[:, patch].max()
            assert (label > 0) == (most >= LEAST_COVER)
            name = composite.objects[int(cover[:, patch].argmax())].category
            assert label == 0 or cutouts.categories[label - 1] == name
        found = listed(encoded.objects[number], cutouts.categories)
        assert [(o.category, o.area) for o in found] == [
            (o.category, o.area) for o in composite.objects
        ]
        assert torch.equal(object_table(composite, cutouts.categories), encoded.objects[number])
        assert torch.equal(
            patch_labels(composite, (6, 6), cutouts.categories), encoded.patches[number]
        )


def test_the_reader_has_no_weights_of_the_tower(made):
    _, root = made
    with safe_open(root / "reader/model.safetensors", "pt") as reader:
        names = set(reader.keys())
        assert not [name for name in names if "vision_tower" in name]
        assert {reader.get_tensor(name).dtype for name in names} == {torch.float16}
    with safe_open(root / "model.safetensors", "pt") as whole:
        assert names < set(whole.keys()) or {n for n in names if "lm_head" not in n} < set(
            whole.keys()
        )
    assert not any(path.suffix == ".bin" for path in root.rglob("*"))


def test_the_whole_model_is_put_together_by_the_command(made, inputs, tmp_path, capsys):
    _, root = made
    words = ["--reader", str(root / "reader"), "--tower", inputs["tower"]]
    assert main(["assemble", *words, "--output", str(tmp_path / "whole")]) == 0
    (one, _), (other, _) = (load_model(str(path), "float32") for path in (root, tmp_path / "whole"))
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    tower = convert(read_timm(inputs["tower"], SIZE)).state_dict()
    own = one.model.vision_tower.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in tower.items())
    assert main(["assemble", *words[:2], "--tower", str(tmp_path), "--output", "x"]) == 2
    assert "photo_vlm: error:" in capsys.readouterr().err


def test_a_tower_of_other_sizes_is_refused(made, tmp_path):
    _, root = made
    folder = tmp_path / "tower"
    tiny_timm(folder, embed_dim=16)
    with pytest.raises(ValueError, match="hidden_size=16, but .* was trained with 32"):
        assemble(root / "reader", folder, tmp_path / "whole")


def test_the_model_reads_what_its_training_read(made):
    """Logits of the saved model are those of the learner: the projector is folded."""
    settings, root = made
    model, processor = load_model(str(root), "float32")
    cutouts = cut_out(settings.coco, RULE)["train"]
    encoded = read_shards(sorted((root / "work/train").glob("*.safetensors")))
    asker = Asker(cutouts.categories, cutouts.together)
    vision = model.config.vision_config
    learner = Learner(vision, settings.reader, processor.tokenizer, cutouts.categories, 0)
    state = torch.load(root / "work/training/2-english.ckpt", weights_only=True)["learner"]
    learner.load_reader(state)
    batch = Batches(encoded, asker, processor.tokenizer, 0, 0).at(0, 2, 3, english=True)
    logits, _ = learner.answer(learner.project(batch.features), batch)
    start = processor.tokenizer("USER: <image>\n")["input_ids"]
    image = start.index(model.config.image_token_id)
    visual = learner.project(batch.features)
    for row in range(2):
        for number in range(3):
            at = int(batch.answer_at[row, number])
            text = batch.words[row, number, :at]
            embed = model.get_input_embeddings()
            inputs = [embed(torch.tensor(start[:image])), visual[row], embed(text)]
            found = model.model.language_model(inputs_embeds=torch.cat(inputs)[None])
            own = model.lm_head(found.last_hidden_state[0, -1])
            torch.testing.assert_close(own, logits[row, number], atol=2e-2, rtol=2e-2)
    projected = model.model.multi_modal_projector(batch.features)
    torch.testing.assert_close(projected, visual, atol=2e-2, rtol=2e-2)


def test_a_spotlight_is_on_objects_first():
    patches = torch.zeros(2, 30, dtype=torch.long)
    patches[0, [3, 7, 20]] = 2
    patches[1, :12] = 1
    generator = torch.Generator().manual_seed(0)
    drawn = [spotlight(patches, 10, generator) for _ in range(5)]
    for keep in drawn:
        assert keep.shape == (2, 10)
        assert torch.equal(keep, keep.sort(dim=1).values)
        assert {3, 7, 20} <= set(keep[0].tolist())
        assert keep[1].max() < 12
    assert not torch.equal(drawn[0], drawn[1])
    assert spotlight(patches, 99, generator).shape == (2, 30)


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_same_weights(made, inputs, tmp_path):
    """Stopped in the second stage and before; composites that are encoded stay."""
    settings, root = made
    own = replace(settings, output=str(tmp_path))
    short = replace(own, stages=own.stages[:1])
    make_model(short)
    shard = next((tmp_path / "work/train").glob("*.safetensors"))
    before = os.stat(shard).st_mtime_ns
    make_model(own)
    assert os.stat(shard).st_mtime_ns == before
    stopped = tmp_path / "work/training/2-english.ckpt"
    stopped.unlink()
    make_model(own)
    one, other = ((path / "model.safetensors").read_bytes() for path in (root, tmp_path))
    assert one == other


def test_another_recipe_in_the_same_folder_is_refused(made):
    settings, _ = made
    with pytest.raises(ValueError, match="was made with"):
        make_model(replace(settings, seed=1))
    stages = [replace(settings.stages[0], steps=4), settings.stages[1]]
    with pytest.raises(ValueError, match="was written with other settings"):
        make_model(replace(settings, stages=stages))


def test_the_test_set_is_a_task_with_masks(made):
    settings, root = made
    task = CompositeTask(str(root / "composites"))
    painter = Painter(
        cut_out(settings.coco, RULE)["test"],
        split_photos(settings.photos)["test"],
        SIZE,
        settings.seed,
        "test",
    )
    assert len(task.image_names) == settings.num_test
    for owner in range(settings.num_test):
        composite = painter.draw(owner)
        np.testing.assert_array_equal(np.asarray(task.image(owner)), composite.image)
        masks = task.masks(owner)
        np.testing.assert_array_equal(masks, np.stack([item.mask for item in composite.objects]))
    few = CompositeTask(str(root / "composites"), num_images=2, questions=1)
    assert [item.owner for item in few.items] == [0, 1]
    right = task.ratios([{"answer": item.answers[0]} for item in task.items])
    wrong = task.ratios([{"answer": "perhaps"} for item in task.items])
    assert {ratio.value for ratio in right.values()} == {1.0}
    assert {ratio.value for ratio in wrong.values()} == {0.0}
    assert set(task.metrics) <= set(right)
    with pytest.raises(ValueError, match="questions=0 asks nothing"):
        CompositeTask(str(root / "composites"), questions=0)


def test_figures_are_measured_with_controls(made):
    settings, root = made
    figures = measure(settings)
    labels = {row["label"] for row in figures["rows"]}
    assert labels == {"unpruned", "shuffled", "random", "oracle"}
    assert json.loads((root / "figures.json").read_text())["metrics"][0] == "all"
    card = (root / "reader/README.md").read_text()
    unpruned = next(row for row in figures["rows"] if row["label"] == "unpruned")
    assert f"| unpruned | {100 * unpruned['figures']['all']['value']:.1f} (" in card
    for name, found in cut_out(settings.coco, RULE)["train"].by_category.items():
        assert name in card
        assert f" {len(found)} |" in card
    assert "$" not in card


def test_an_image_of_another_size_is_read_too(made):
    _, root = made
    model, processor = load_model(str(root), "float32")
    text = "USER: <image>\nIs there a circle in the image? ASSISTANT:"
    inputs = processor(images=[Image.new("RGB", (200, 130))], text=[text], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, SIZE, SIZE)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 36
    assert not (inputs["input_ids"] == processor.tokenizer.unk_token_id).any()
