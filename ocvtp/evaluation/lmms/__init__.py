"""The door to lmms-eval: what its entry point `lmms_eval.models` finds, as the model `ocvtp`.

Importing this needs nothing of lmms-eval; only its own registry calls `manifest`.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "ocvtp"


def manifest() -> Any:
    """The `ModelManifest` of `PrunedVLM`, whose module lmms-eval imports when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="ocvtp.evaluation.lmms.model.PrunedVLM")
