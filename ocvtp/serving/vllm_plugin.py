"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ocvtp.transformers_names import known_model_types

SUPPORTED = ("0.32", "0.33")
"""Minor versions of vLLM on which the classes of this package were tested."""
_KEY = "ocvtp"
_ROUTED = "ocvtp_routed"
_OTHERS = ("internvl_chat",)  # of models that only their own code reads


@dataclass(frozen=True)
class Served:
    """A pruned model.

    Args:
        stands_for: vLLM's own architecture, which `config.json` names.
        module: of the class. name: of the class, and what vLLM calls the architecture.
    """

    stands_for: str
    module: str
    name: str


SERVED: dict[str, Served] = {
    "llava": Served(
        "LlavaForConditionalGeneration",
        "ocvtp.serving.vllm_llava",
        "OCVTPLlavaForConditionalGeneration",
    ),
    "llava_next": Served(
        "LlavaNextForConditionalGeneration",
        "ocvtp.serving.vllm_llava_next",
        "OCVTPLlavaNextForConditionalGeneration",
    ),
    "llava_onevision": Served(
        "LlavaOnevisionForConditionalGeneration",
        "ocvtp.serving.vllm_llava_next",
        "OCVTPLlavaOnevisionForConditionalGeneration",
    ),
    "internvl": Served(
        "InternVLForConditionalGeneration",
        "ocvtp.serving.vllm_internvl",
        "OCVTPInternVLForConditionalGeneration",
    ),
    "qwen2_vl": Served(
        "Qwen2VLForConditionalGeneration",
        "ocvtp.serving.vllm_qwen",
        "OCVTPQwen2VLForConditionalGeneration",
    ),
    "qwen2_5_vl": Served(
        "Qwen2_5_VLForConditionalGeneration",
        "ocvtp.serving.vllm_qwen",
        "OCVTPQwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": Served(
        "Qwen3VLForConditionalGeneration",
        "ocvtp.serving.vllm_qwen",
        "OCVTPQwen3VLForConditionalGeneration",
    ),
}
"""By the `model_type` of the model's configuration."""


def register() -> None:
    """Tell vLLM where the pruned models are; none is imported before a model asks for it.

    A model whose configuration has an `ocvtp` section (`hf_overrides`) is then built by the class
    of its family here; all others as before. A section that cannot be served is refused, so that no
    model is unpruned unnoticed. vLLM may call this more than once.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    for served in SERVED.values():
        ModelRegistry.register_model(served.name, f"{served.module}:{served.name}")
    known = convertors.MODEL_ARCH_CONFIG_CONVERTORS
    for model_type in {*SERVED, *known, *known_model_types(), *_OTHERS}:
        own = known.get(model_type, convertors.ModelArchConfigConvertorBase)
        if not hasattr(own, _MARK):
            known[model_type] = _routed(own)


_MARK = "routes_ocvtp"


def _routed(own: Any) -> Any:
    """A convertor of vLLM that first reads whether a model is to be pruned."""

    def init(self: Any, hf_config: Any, *given: Any, **named: Any) -> None:
        route(hf_config)
        own.__init__(self, hf_config, *given, **named)

    return type(own.__name__, (own,), {"__init__": init, _MARK: True})


def route(config: Any) -> None:
    """Name the class that is to build a model: `architectures` of its configuration.

    Args:
        config: of the model; one without an `ocvtp` section is left alone, and so is one that was
            routed: models whose text settings are not apart build their language model from it.

    Raises:
        ValueError: for models and versions of vLLM that are not served.
    """
    if getattr(config, _KEY, None) is None or getattr(config, _ROUTED, False):
        return
    check_version()
    architectures = list(getattr(config, "architectures", None) or [])
    served = SERVED.get(config.model_type)
    if served is None or not {served.name, served.stands_for} & {*architectures}:
        raise ValueError(
            f"a model of type {config.model_type!r} ({', '.join(architectures)}) cannot be pruned"
            f" in vLLM; serve one of {', '.join(one.stands_for for one in SERVED.values())}, or"
            " leave `ocvtp` out of hf_overrides."
        )
    config.architectures = [served.name]
    setattr(config, _ROUTED, True)


def check_version() -> None:
    """Refuse versions of vLLM on which nothing was tested.

    Raises:
        ValueError: that names those that were.
    """
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in SUPPORTED:
        raise ValueError(
            f"vLLM {__version__} is installed, and ocvtp prunes in vLLM {', '.join(SUPPORTED)}:"
            " install one of these, or leave `ocvtp` out of hf_overrides."
        )
