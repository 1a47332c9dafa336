"""What is compared between vLLM and transformers."""

from __future__ import annotations

import pytest

from ocvtp.choices import TINY_MODELS
from ocvtp.hosts.loading import load_model
from ocvtp.serving.plan import read_plan
from ocvtp.serving.vllm_check import Found, by_transformers, compare, requests_of
from ocvtp.serving.vllm_plugin import SERVED


def test_what_differs_is_told_by_request():
    found = [Found("?", [144], [16], 30, [5, 2]), Found("?", [144], [16], 31, [7, 2])]
    compare(found, [(30, [5, 2]), (31, [7, 2])], "prompts at once")
    assert [one.differs for one in found] == [[], []]
    compare(found, [(30, [6, 2]), (159, [7, 2])], "in chunks of 64")
    assert found[0].differs == [
        "request 0 (in chunks of 64): vLLM answers [6, 2], and transformers [5, 2] (tokens)"
    ]
    assert found[1].differs == [
        "request 1 (in chunks of 64): its prompt has 159 tokens in vLLM, and 31 in transformers"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_host_is_asked_about_images_that_are_pruned(name):
    """Transformers' side of a check: every image loses tokens, and no answer ends by itself."""
    model, processor = load_model(name, "float32")
    assert model.config.model_type in SERVED
    plan = read_plan(model.config, {"pruner": "divprune", "num_keep": 5})
    tiling = {"budget": "per_image", "separators": "all"}
    model.generation_config.eos_token_id = [*range(model.config.get_text_config().vocab_size)]
    requests = requests_of(processor)
    assert all(image.width != image.height for one in requests for image in one.images)
    found = by_transformers(model, processor, plan.pruner, requests, 2, tiling)
    assert [one.visual_tokens_kept for one in found] == [[5]] * 6 + [[5, 5]]
    assert all(min(one.visual_tokens) > 5 for one in found)
    assert all(len(one.answer) == 2 for one in found)
    assert model.generation_config.eos_token_id
