"""What vLLM calls in each of its processes, through the entry point `vllm.general_plugins`."""

from __future__ import annotations

ARCHITECTURE = "OCVTPLlavaForConditionalGeneration"
"""What `hf_overrides={"architectures": [...]}` names."""


def register() -> None:
    """Tell vLLM where the pruned LLaVA is; nothing of it is imported before a model asks for it.

    vLLM may call this more than once.
    """
    from vllm import ModelRegistry

    ModelRegistry.register_model(
        ARCHITECTURE, "ocvtp.serving.vllm_llava:OCVTPLlavaForConditionalGeneration"
    )
