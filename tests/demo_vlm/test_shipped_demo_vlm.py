"""The demo VLM that is shipped sees drawn scenes, and goes on seeing them when it is pruned; the
pruners that are shipped keep its objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ocvtp import build_pruner
from ocvtp.data.scenes import draw_scene
from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.loading import load_model

FOLDER = Path(__file__).parents[2] / "checkpoints" / "demo-vlm"
DOCS = FOLDER.parents[1] / "docs"
PRUNERS = [str(FOLDER.parent / "demo-pruner" / str(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Accuracies by row and kind, of 40 images."""
    subject = Subject(*load_model(str(FOLDER), "float32"), str(FOLDER))
    task = SceneTask(("easy",), num_images=40, questions=6)
    folder = tmp_path_factory.mktemp("shipped")
    controls = ("random", "oracle")
    report, _ = evaluate(
        subject,
        task,
        ["divprune", "ocvtp"],
        [Budget(num_keep=8)],
        folder,
        checkpoints=PRUNERS,
        seeds=[0],
        controls=controls,
    )
    return {
        row.label: {name: ratio.value for name, ratio in row.figures.items()} for row in report.rows
    }


@pytest.mark.slow
def test_it_answers_by_what_it_sees(figures):
    assert figures["unpruned"]["easy/existence"] > 0.8
    assert figures["unpruned"]["easy/all"] > figures["shuffled"]["easy/all"] + 0.2


@pytest.mark.slow
def test_it_bears_pruning_of_the_background(figures):
    whole = figures["unpruned"]["easy/all"]
    assert figures["oracle"]["easy/all"] > whole - 0.1
    assert figures["divprune"]["easy/all"] > whole - 0.15
    assert figures["random"]["easy/all"] < figures["oracle"]["easy/all"] - 0.1


@pytest.mark.slow
def test_the_trained_pruners_keep_what_it_answers_by(figures):
    assert figures["ocvtp"]["easy/all"] > figures["random"]["easy/all"] + 0.15


@pytest.mark.slow
def test_it_answers_rightly_about_the_picture_of_the_documentation():
    """Whole, and with the tokens that the examples keep."""
    model, processor = load_model(str(FOLDER), "float32")
    scene, image = draw_scene(seed=7, index=151), Image.open(DOCS / "images" / "scene.png")
    assert (np.asarray(image) == scene.image).all()
    plurals = {"circle": "circles", "cross": "crosses", "square": "squares", "star": "stars"}
    plurals["triangle"] = "triangles"
    asked = {
        f"How many {plural} are there in the image?": str(
            sum(one.shape == shape for one in scene.objects)
        )
        for shape, plural in plurals.items()
    }
    (star,) = [one for one in scene.objects if one.shape == "star"]
    asked["What colour is the small star?"] = star.colour
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in asked]
    images = [image] * len(prompts)
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    inputs = inputs.to(model.dtype)

    def answers():
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

    assert answers() == list(asked.values())
    for name in ("divprune", "fastervlm"):
        with build_pruner(name, num_keep=16)(model):
            assert answers() == list(asked.values())


def test_its_half_precision_weights_run_in_single_precision_on_a_cpu_unless_asked():
    assert load_model(str(FOLDER))[0].dtype == torch.float32
    assert load_model(str(FOLDER), "float16")[0].dtype == torch.float16


def test_it_is_small_and_holds_no_pickle():
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 8 * 2**20
    assert {path.suffix for path in sizes} <= {".safetensors", ".json", ".md", ".jinja"}
