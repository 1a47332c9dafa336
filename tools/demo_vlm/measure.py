"""How well the demo VLM answers, unpruned and under the controls that show whether it is sound."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ocvtp.evaluation.conditions import Budget, content_hash
from ocvtp.evaluation.labels import ORACLE, RANDOM
from ocvtp.evaluation.report import results
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.loading import load_model
from tools.demo_vlm.settings import DemoSettings

SHARE = 18
"""The controls keep one in so many tokens."""

_BATCH = 64


def measure(settings: DemoSettings, folder: Path) -> dict[str, Any]:
    """Figures of the saved model on scenes of `settings.report`.

    Args:
        settings: of the model, which lies in `settings.output`.
        folder: where answers are kept, so that a call that was stopped is continued.

    Returns:
        See `ocvtp.evaluation.report.results`: all tokens, on the right image and on a wrong one;
        and an 18th of them, at random and chosen by the oracle.
    """
    shown, model = settings.report, settings.model
    task = SceneTask(
        shown.levels,
        shown.split,
        shown.num_images,
        shown.questions,
        settings.seed,
        model.image_size,
    )
    about = json.dumps([content_hash(settings.output), asdict(shown)])
    report, _ = evaluate(
        Subject(*load_model(settings.output, "float32", settings.device), settings.output),
        task,
        [],
        [Budget(num_keep=max(1, model.side**2 // SHARE))],
        folder / hashlib.sha256(about.encode()).hexdigest()[:8],
        batch_size=_BATCH,
        controls=(RANDOM, ORACLE),
    )
    return results(report)
