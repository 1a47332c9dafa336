"""Pruned models in vLLM: registration, places in the prompt, rows, cache keys. No kernel of vLLM's.

I images of a prompt, R' rows that the language model reads of them. `make test-vllm` runs this.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from served import (
    FAMILIES,
    NETWORK,
    PLACEHOLDER,
    SPECS,
    built,
    image,
    load,
    rows_by_transformers,
    save,
)
from vllm_setup import (
    MULTIMODAL_REGISTRY,
    ModelRegistry,
    MultiModalUUIDItems,
    arguments,
    build,
    check_equal,
    under,
)

from ocvtp.serving import vllm_plugin
from ocvtp.serving.plan import read_plan
from ocvtp.serving.vllm_plugin import SERVED, register

NUM_KEEP = 5
SQUARE, WIDE, TALL, TINY = (96, 96), (300, 140), (110, 250), (20, 12)
TILED = ("next", "onevision", "internvl")
OF = {family: (SQUARE, WIDE, TALL) for family in FAMILIES}
OF["onevision"] = ((200, 100), (100, 210))
"""Widths and heights; of a LLaVA-OneVision, no single tile, which would repeat the base view token
by token, and none so large that tokens are resized: they have tests of their own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def served(folders, groups):
    """Family -> (vLLM's model by vLLM's loader, its processor, transformers' model and its own)."""
    from transformers import AutoProcessor

    known: dict[str, Any] = {}

    def of(family: str) -> Any:
        if family not in known:
            ours, processor = build(arguments(folders[family]))
            theirs = load(folders[family]), AutoProcessor.from_pretrained(folders[family])
            known[family] = ours, processor, *theirs
        return known[family]

    return of


class Case:
    """A prompt with images for a family, processed by vLLM under some settings."""

    def __init__(self, served: Any, family: str, sizes: Any, settings: Any, request: Any = None):
        self.ours, processor, self.theirs, self.processor = served(family)
        self.plan = read_plan(self.theirs.config, settings)
        self.images = [image(number, size) for number, size in enumerate(sizes)]
        self.text = "what?".join(PLACEHOLDER[family] for _ in sizes) + " who?"
        with under(self.plan, processor.info):
            ids = processor.info.get_tokenizer().encode(self.text)
            items = processor.info.parse_mm_data({"image": self.images})
            kwargs = {} if request is None else {"ocvtp": request}
            self.result = processor(ids, items, None, kwargs)

    @torch.inference_mode()
    def rows(self) -> list[Any]:
        """What vLLM's model makes of the images, by its whole multi-modal path."""
        with under(self.plan, self.ours):
            return list(self.ours.embed_multimodal(**self.result["mm_kwargs"].get_data()))

    @property
    def places(self) -> list[int]:
        """How many embeddings the prompt has room for, of each image."""
        return [place.get_num_embeds() for place in self.result["mm_placeholders"]["image"]]

    def expected(self, pruner: Any) -> Any:
        """What transformers' language model reads of them, by `attach`."""
        inputs = self.processor(images=self.images, text=self.text, return_tensors="pt")
        tiling = self.plan.layout.tiling
        return rows_by_transformers(self.theirs, inputs, pruner, vars(tiling))


def check_rows(case: Case, pruner: Any) -> None:
    expected, found = case.expected(pruner), case.rows()
    assert [len(rows) for rows in found] == case.places
    together = torch.cat(found)
    assert together.shape == expected.shape
    check_equal(together, expected, tolerance=2e-5)


def test_the_entry_point_names_the_plugin():
    [point] = [p for p in entry_points(group="vllm.general_plugins") if p.name == "ocvtp"]
    assert point.value == "ocvtp.serving.vllm_plugin:register"
    assert point.load() is register


@pytest.mark.parametrize("family", FAMILIES)
def test_the_section_alone_names_the_class(folders, family):
    register()  # may happen twice
    config = arguments(folders[family]).create_model_config()
    assert config.architecture == FAMILIES[family]
    cls, name = ModelRegistry.resolve_model_cls(config.hf_config.architectures, config)
    assert cls.__name__ == name == FAMILIES[family]
    assert config.is_multimodal_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_the_section_is_vllms_own(folders, family):
    config = arguments(folders[family], hf_overrides={}).create_model_config()
    own = {served.stands_for for served in SERVED.values()}
    assert config.architecture in own


def test_overrides_of_before_still_name_the_class(folders):
    given = {"architectures": [FAMILIES["clip"]], "ocvtp": {"pruner": "divprune", "num_keep": 5}}
    config = arguments(folders["clip"], hf_overrides=given).create_model_config()
    assert config.architecture == FAMILIES["clip"]


def test_other_models_are_refused_and_not_served_unpruned(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' .* cannot be pruned in vLLM"):
        arguments(tmp_path).create_model_config()


def test_other_versions_are_refused(folders, monkeypatch):
    monkeypatch.setattr(vllm_plugin, "SUPPORTED", ("0.1", "0.2"))
    with pytest.raises(ValueError, match="ocvtp prunes in vLLM 0.1, 0.2: install one of these"):
        arguments(folders["clip"]).create_model_config()
    arguments(folders["clip"], hf_overrides={}).create_model_config()


def test_another_process_finds_the_class(folders):
    """vLLM's processes load the plug-in by themselves: nothing of this one is in them."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm import ModelRegistry;"
        "from vllm.engine.arg_utils import EngineArgs;"
        "o = {'ocvtp': {'pruner': 'divprune', 'num_keep': 5}};"
        f"c = EngineArgs(model={str(folders['clip'])!r}, hf_overrides=o).create_model_config();"
        "print('FOUND', ModelRegistry.resolve_model_cls(c.hf_config.architectures, c)[0].__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"FOUND {FAMILIES['clip']}" in run.stdout, run.stderr[-3000:]


@pytest.mark.parametrize("spec", ["trim", "fastv:stages=[[1,4]]"])
def test_the_first_process_refuses(folders, spec):
    config = arguments(folders["clip"], spec).create_model_config()
    with pytest.raises(ValueError, match="use one of divprune"):
        MULTIMODAL_REGISTRY.create_processor(config)


def test_embeddings_in_place_of_images_are_refused(folders):
    config = arguments(folders["clip"], enable_mm_embeds=True).create_model_config()
    with pytest.raises(ValueError, match="enable_mm_embeds"):
        MULTIMODAL_REGISTRY.create_processor(config)


@pytest.mark.parametrize("family", ["clip", "internvl"])
def test_settings_may_be_of_the_processor(folders, family):
    """Those of mm_processor_kwargs go first, and transformers' processor does not see them."""
    further = {"mm_processor_kwargs": {"ocvtp": {"num_keep": 7}}}
    config = arguments(folders[family], **further).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    items = processor.info.parse_mm_data({"image": [image(0, SQUARE)]})
    ids = processor.info.get_tokenizer().encode(PLACEHOLDER[family])
    [place] = processor(ids, items, None)["mm_placeholders"]["image"]
    assert place.get_num_embeds() == 7


@pytest.mark.parametrize(
    ("family", "spec"), [(family, spec) for family, specs in SPECS.items() for spec in specs]
)
def test_rows_are_those_of_transformers(served, family, spec):
    """Several images at once: square, wide, tall."""
    case = Case(
        served, family, OF[family], {"pruner": spec, "num_keep": NUM_KEEP, "separators": "all"}
    )
    check_rows(case, built(spec, NUM_KEEP))


@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@pytest.mark.parametrize("separators", ["all", "none"])
@pytest.mark.parametrize("given", [{"num_keep": 3}, {"keep_ratio": 0.3}, {"num_keep": 40}])
def test_tiles(served, family, budget, separators, given):
    """Whole tiles, and those that unpadding cuts; K above the tokens of some views."""
    tiling = {"budget": budget, "separators": separators}
    case = Case(served, family, OF[family], {"pruner": "visiondrop", **given, **tiling})
    check_rows(case, replace(case.plan.pruner))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_keep", [1, 4, 100000])
def test_a_request_has_a_budget_of_its_own(served, family, num_keep):
    settings = {"pruner": "divprune", "num_keep": NUM_KEEP}
    case = Case(served, family, OF[family][:2], settings, {"num_keep": num_keep})
    check_rows(case, replace(case.plan.pruner, num_keep=num_keep))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_images_stay_whole(served, family):
    """Fewer tokens than K: what the model reads is what it would read unpruned."""
    from ocvtp import build_pruner

    settings = {"pruner": "divprune", "num_keep": 8}
    case = Case(served, family, (TINY,), settings, {"num_keep": 5000})
    check_rows(case, build_pruner("none"))


@pytest.mark.parametrize("spec", ["divprune", "fps:space=projected", "uniform"])
def test_images_whose_tokens_are_resized(served, spec):
    sizes = ((450, 340), SQUARE, (330, 440))
    case = Case(served, "onevision", sizes[:1], {"pruner": spec, "num_keep": 30})
    assert case.plan.layout.shape(sizes[0][::-1]).is_resized
    check_rows(case, built(spec, 30))
    # of several images, each is pruned as it would be alone
    several = Case(served, "onevision", sizes, {"pruner": spec, "num_keep": 30})
    torch.testing.assert_close(several.rows()[0], case.rows()[0], rtol=0, atol=1e-5)


def test_what_reads_the_tower_is_refused_where_tokens_are_resized(served):
    with pytest.raises(ValueError, match=r"reads attention.*pass a smaller image"):
        Case(served, "onevision", ((450, 340),), {"pruner": "visiondrop", "num_keep": 30})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_prompt_is_unchanged(served, family):
    case = Case(served, family, (SQUARE, WIDE), {"pruner": "uniform", "num_keep": 6})
    token = case.theirs.config.image_token_id
    inputs = case.processor(images=case.images, text=case.text)["input_ids"][0]
    ids = case.result["prompt_token_ids"]
    assert [i for i in ids if i != token] == [i for i in inputs if i != token]
    places = case.result["mm_placeholders"]["image"]
    for place, rows in zip(places, case.places, strict=True):
        assert ids[place.offset : place.offset + place.length].count(token) == rows
    assert ids.count(token) == sum(case.places)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"pruner": "fastervlm"}, "the request names pruner 'fastervlm'"),
        ({"budget": "per_tile"}, "a request may set num_keep, keep_ratio, max_keep"),
        ({"num_keep": 0}, "pass at least 1 token"),
        ({"num_keep": 4, "keep_ratio": 0.5}, "pass exactly one of them"),
        ({"num_keep": 9, "max_keep": 8}, "num_keep=9 and max_keep=8"),
        (7, "pass a budget, e.g."),
        ({"num_keep": 2}, "num_contextual=3 of num_keep=2"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(served, request_, message):
    settings = {"pruner": "visionzip:num_contextual=3", "num_keep": 12}
    with pytest.raises(ValueError, match=message):
        Case(served, "clip", (SQUARE,), settings, request_)


def test_a_cap_holds_for_requests(served):
    settings = {"pruner": "divprune", "keep_ratio": 0.5, "max_keep": 9}
    for request_, places in (
        (None, 9),
        ({"num_keep": 4}, 4),
        ({"num_keep": 99}, 9),
    ):
        assert Case(served, "clip", (SQUARE,), settings, request_).places == [places]


def hashes(served: Any, settings: Any, request: Any = None, uuid: str | None = None) -> list[str]:
    _, processor, theirs, _ = served("clip")
    with under(read_plan(theirs.config, settings), processor.info):
        items = processor.info.parse_mm_data({"image": [image(0, SQUARE)]})
        ids = processor.info.get_tokenizer().encode("<image>")
        uuids = None if uuid is None else MultiModalUUIDItems({"image": [uuid]})
        kwargs = {} if request is None else {"ocvtp": request}
        return processor(ids, items, uuids, kwargs)["mm_hashes"]["image"]


@pytest.mark.parametrize("uuid", [None, "a-name-of-the-caller"])
def test_caches_tell_budgets_pruners_and_artifacts_apart(served, tmp_path, uuid):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    config = f"{NETWORK}/config.json"
    (other / "config.json").write_bytes(open(config, "rb").read())
    weights = load_file(f"{NETWORK}/model.safetensors")
    some = next(name for name, values in weights.items() if values.is_floating_point())
    save_file(weights | {some: weights[some] + 1e-3}, other / "model.safetensors")

    def of(spec: str, request: Any = None, **more: Any) -> str:
        settings = {"pruner": spec, "num_keep": 9, **more}
        return hashes(served, settings, request, uuid)[0]

    network = f"ocvtp:checkpoint={NETWORK}"
    found = [
        of("divprune"),
        of("divprune", {"num_keep": 8}),
        of("divprune", {"keep_ratio": 0.5}),
        of("divprune", {"max_keep": 3}),
        of("fastervlm"),
        of("visionzip"),
        of("visionzip", num_contextual=3),
        of(network),
        of(f"ocvtp:checkpoint={other}"),
        of("divprune", separators="none"),
    ]
    assert len(set(found)) == len(found)
    assert of("divprune") == found[0] == of("divprune", {"num_keep": 9})
    assert of(network) == found[7]


def test_the_log_says_what_came_in_and_went_out(served, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("INFO", logger="vllm.ocvtp"):
        Case(served, "clip", (SQUARE, WIDE), {"pruner": "divprune", "num_keep": 7})
    assert "visual tokens: 144 + 144 in, 7 + 7 out (divprune)" in caplog.text


def test_the_most_that_an_image_may_take_is_known(folders, served):
    for family in FAMILIES:
        _, processor, theirs, _ = served(family)
        plain = processor.info.get_mm_max_tokens_per_item(1024, {"image": 1})["image"]
        settings = {"pruner": "divprune", "num_keep": 5, "max_keep": 6}
        with under(read_plan(theirs.config, settings), processor.info):
            capped = processor.info.get_mm_max_tokens_per_item(1024, {"image": 1})["image"]
            ends = processor.info.largest_shape().ends
        assert capped == 6 + ends < plain


def test_other_tokens_are_other_rows(served):
    """The comparisons above can fail: the methods do not all keep the same."""
    kept = [
        torch.cat(Case(served, "clip", (SQUARE,), {"pruner": spec, "num_keep": 5}).rows())
        for spec in ("divprune", "fastervlm")
    ]
    assert (kept[0] - kept[1]).abs().max() > 0.1


def test_an_image_is_pruned_the_same_in_any_batch(served):
    settings = {"pruner": "visionzip", "num_keep": NUM_KEEP}
    sizes = (SQUARE, WIDE, TALL)
    together = Case(served, "clip", sizes, settings)
    for number, rows in enumerate(together.rows()):
        alone = Case(served, "clip", sizes[: number + 1], settings).rows()[number]
        torch.testing.assert_close(alone, rows, rtol=0, atol=1e-4)


def test_no_module_is_hooked(served):
    for family in FAMILIES:
        for module in served(family)[0].modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_the_network_keeps_its_type_in_a_half_precision_engine(folders, groups):
    if torch.cpu._is_amx_tile_supported() and not hasattr(torch.ops._C, "convert_weight_packed"):
        pytest.skip("this build of vLLM has no half precision here: no convert_weight_packed")
    spec = f"ocvtp:checkpoint={NETWORK}"
    model, _ = build(arguments(folders["clip"], spec, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    network = model.plan.pruner.network
    saved = built(spec, NUM_KEEP).network
    for name, tensor in saved.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_a_wrong_number_of_tokens_is_no_ones(served, monkeypatch):
    case = Case(served, "clip", (SQUARE,), {"pruner": "divprune", "num_keep": 5})
    monkeypatch.setattr(case.plan.pruner.__class__, "budget", lambda self, count: 4)
    with pytest.raises(RuntimeError, match="kept 4 tokens, but 5 places"):
        case.rows()


def test_images_that_were_not_counted_are_refused(served):
    case = Case(served, "clip", (SQUARE,), {"pruner": "divprune", "num_keep": 5})
    data = case.result["mm_kwargs"].get_data()
    with pytest.raises(RuntimeError, match="cannot be pruned"):
        case.ours.embed_multimodal(pixel_values=data["pixel_values"])
