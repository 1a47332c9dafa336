"""transformers.Trainer on a pruned model: training, evaluating, label smoothing.

B rows, L columns of the prompt, V words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import IMG, Inputs, make_batch
from tiny_models import IMAGE_TOKEN, tiny_llava
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ocvtp import build_pruner

DEMO = Path("checkpoints/demo-vlm")
ROWS = [(5, IMG, 4), (2, IMG, 9), (4, IMG, 2, IMG, 3), (7,)]
SIZE = 2
"""Rows of a batch."""


def examples() -> list[dict[str, Any]]:
    """Batches of two rows, each of which a loader hands on as it is."""
    found = []
    for start in range(0, len(ROWS), SIZE):
        inputs = make_batch(ROWS[start : start + SIZE], "right", seed=start)
        wrong = (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0)
        found.append({**inputs, "labels": inputs["input_ids"].masked_fill(wrong, -100)})
    return found


class Rows(torch.utils.data.Dataset[Any]):
    """A batch is an item."""

    def __init__(self, batches: list[Inputs]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Inputs:
        return self.batches[index]


def trainer(model: Any, folder: Path, batches: list[Inputs], **settings: Any) -> Trainer:
    more = {name: settings.pop(name) for name in ("compute_metrics",) if name in settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=len(batches),
        learning_rate=settings.pop("learning_rate", 1e-3),
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    rows = Rows(batches)
    return Trainer(
        model,
        arguments,
        data_collator=lambda items: items[0],
        train_dataset=rows,
        eval_dataset=rows,
        **more,
    )


def smoothed(model: Any, logits: Any, labels: Any, epsilon: float) -> Any:
    """LabelSmoother's loss. Trainer shifts labels for it only where it knows a model as causal."""
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        logits, labels = logits[:, :-1], labels[:, 1:]
    real = labels != -100
    logs = -logits.log_softmax(dim=-1)[real]
    hit = logs.gather(1, labels[real][:, None])
    return (1 - epsilon) * hit.mean() + epsilon * logs.mean()


@pytest.fixture
def model() -> Any:
    return tiny_llava("clip")


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["short", "full"])
def test_training_steps_follow_the_pruned_loss(model: Any, tmp_path: Path, logits: Any) -> None:
    batches, pruner = examples(), build_pruner("divprune", num_keep=5)
    by_hand = tiny_llava("clip")
    by_hand.load_state_dict(model.state_dict())
    losses, optimizer = [], torch.optim.SGD(by_hand.parameters(), lr=1e-3)
    with pruner(by_hand):
        for batch in [batches[n] for n in order(len(batches))]:
            optimizer.zero_grad()
            output = by_hand.train()(**batch)
            loss = cross_entropy(
                output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten()
            )
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    with pruner(model, logits=logits):
        made = trainer(model, tmp_path, batches)
        made.train()
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-3)
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def order(count: int) -> list[int]:
    """In which order a Trainer of seed 42 takes its batches."""
    generator = torch.Generator().manual_seed(42)
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def test_evaluating_lines_logits_up_with_labels(model: Any, tmp_path: Path) -> None:
    batches, seen = examples()[:1], []

    def accuracy(predicted: Any) -> dict[str, float]:
        found = predicted.predictions
        found = found[0] if isinstance(found, tuple) else found
        seen.append((found, predicted.label_ids))
        real = predicted.label_ids[:, 1:] != -100
        hits = found[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
        return {"accuracy": float(hits[real].mean())}

    with build_pruner("divprune", num_keep=5)(model, logits="full"):
        made = trainer(model, tmp_path, batches, compute_metrics=accuracy)
        caches = ["cache", "past_key_values"]
        measured = made.evaluate(ignore_keys=caches)
        again = made.evaluate(ignore_keys=[*caches, "image_outputs", "image_hidden_states"])
    assert again["eval_accuracy"] == measured["eval_accuracy"]
    with build_pruner("divprune", num_keep=5)(model):
        output = model(**batches[0])
        real = output.labels[:, 1:] != -100
        hits = output.logits[:, :-1].argmax(-1) == output.labels[:, 1:]
    logits, labels = seen[0]
    assert logits.shape[:2] == labels.shape == tuple(batches[0]["input_ids"].shape)
    assert measured["eval_accuracy"] == pytest.approx(float(hits[real].float().mean()))
    assert measured["eval_loss"] == pytest.approx(float(output.loss), abs=1e-5)
    assert not np.isnan(logits).any()


@torch.no_grad()
def test_labels_are_smoothed(model: Any, tmp_path: Path) -> None:
    batches, epsilon = examples()[:1], 0.1
    with build_pruner("divprune", num_keep=5)(model, logits="full"):
        made = trainer(
            model, tmp_path, batches, label_smoothing_factor=epsilon, prediction_loss_only=True
        )
        assert np.isfinite(made.evaluate()["eval_loss"])
        measured = float(made.compute_loss(model, dict(batches[0])))
    with build_pruner("divprune", num_keep=5)(model):
        output = model(**batches[0])
    expected = float(smoothed(model, output.logits, output.labels, epsilon))
    assert measured == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo VLM is not here")
def test_the_demo_vlm_is_trained_and_evaluated(tmp_path: Path) -> None:
    from PIL import Image

    model = AutoModelForImageTextToText.from_pretrained(DEMO)
    processor = AutoProcessor.from_pretrained(DEMO)
    images = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue")]
    words = ["How many circles are there in the image?", "What is it?"]
    text = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": word}]}],
            add_generation_prompt=True,
        )
        for word in words
    ]
    inputs = dict(processor(images=images, text=text, return_tensors="pt", padding=True))
    image = inputs["input_ids"] == model.config.image_token_id
    wrong = image | (inputs["attention_mask"] == 0)
    inputs["labels"] = inputs["input_ids"].masked_fill(wrong, -100)
    pruner = build_pruner("divprune", num_keep=8)
    with torch.no_grad(), pruner(model):
        expected = float(model.eval()(**inputs).loss)
    with pruner(model, logits="full"):
        made = trainer(model, tmp_path, [inputs], prediction_loss_only=True, learning_rate=1e-5)
        assert made.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)
        made.train()
        assert made.evaluate()["eval_loss"] < expected
