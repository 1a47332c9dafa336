"""Pruned Qwen-VL in vLLM: places in the prompt, rows, coordinates. No kernel of vLLM's runs.

I images of a prompt, L columns of it, R rows of its images. `make test-vllm` runs this.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import built
from served_qwen import FAMILIES, WIDTH, coordinates, drawn, load, prompt, save, short_prompt
from small_networks import network_setting
from vllm_setup import VLLMValidationError, arguments, build, check_equal, under

from ocvtp.serving.plan import alternatives, read_plan

WIDE, TALL, SQUARE, TINY = (300, 140), (110, 330), (200, 200), (40, 30)
TRAINED = ("ocvtp", "learned")  # here of random weights
FURTHER = ("visionzip:guidance=received", "hiprune:object_block=2", "pool", "fps", "none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Any]:
    return {family: save(family, tmp_path_factory.mktemp("qwen")) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def served(folders, groups, request):
    """vLLM's model by vLLM's loader, its processor, transformers' model and its own."""
    if request.param == "qwen2-vl" and not hasattr(torch.ops._C, "gelu_quick"):
        pytest.skip("this build of vLLM cannot make a Qwen2-VL on this machine: no gelu_quick")
    folder = folders[request.param]
    ours, processor = build(arguments(folder))
    model, own = load(folder)
    return SimpleNamespace(ours=ours, processor=processor, model=model, own=own, folder=folder)


class Case:
    """A prompt about images, as vLLM's processor and model make rows of it."""

    def __init__(
        self, served: Any, sizes: Any, spec: str = "divprune", num_keep: int = 9, **more: Any
    ):
        self.served, self.pruner = served, built(spec, num_keep, **more)
        colours = ("white", "yellow", "navy")
        self.images = [drawn(*size, colour) for size, colour in zip(sizes, colours, strict=False)]
        self.text = prompt(served.own, len(sizes), "what is it?")
        settings = {"pruner": spec, "num_keep": num_keep, **more}
        self.plan, processor = read_plan(served.model.config, settings), served.processor
        with under(self.plan, processor.info):
            ids = processor.info.get_tokenizer().encode(self.text, add_special_tokens=False)
            self.result = processor(ids, processor.info.parse_mm_data({"image": self.images}), None)

    @property
    def ids(self) -> list[int]:
        return self.result["prompt_token_ids"]

    @property
    def features(self) -> list[Any]:
        """What a runner knows of the images."""
        items = self.result["mm_kwargs"]["image"]
        places = self.result["mm_placeholders"]["image"]
        return [
            SimpleNamespace(modality="image", data=item, mm_position=place)
            for item, place in zip(items, places, strict=True)
        ]

    @torch.inference_mode()
    def rows(self) -> list[Any]:
        """By the whole multi-modal path of vLLM's model, with their columns."""
        with under(self.plan, self.served.ours):
            kwargs = self.result["mm_kwargs"].get_data()
            return list(self.served.ours.embed_multimodal(**kwargs))

    def expected(self) -> Any:
        """What transformers' language model reads."""
        model, processor = self.served.model, self.served.own
        return short_prompt(model, processor, self.pruner, self.text, self.images)


class Read(torch.nn.Module):
    """In the place of a language model: keeps what it is given."""

    def forward(self, **given: Any) -> Any:
        self.given = {k: v.clone() for k, v in given.items() if torch.is_tensor(v)}
        further = given.get("deepstack_input_embeds")  # in a buffer that is written over
        self.deep = None if further is None else torch.stack([*further.tensors.values()])
        return given["inputs_embeds"]


@torch.inference_mode()
def read_in_parts(case: Case, size: int) -> tuple[Any, Any, list[Any]]:
    """What the language model reads of a prompt in parts of `size` columns, as a runner runs it."""
    ours, ids = case.served.ours, torch.tensor(case.ids)
    positions, _ = ours.get_mrope_input_positions(case.ids, case.features)
    rows, features = case.rows(), case.features
    reader, before = Read(), ours.language_model.model
    places, embedded, deep = [], [], []
    for start in range(0, len(ids), size):
        part = slice(start, min(start + size, len(ids)))
        mask, own = torch.zeros(part.stop - start, dtype=torch.bool), []
        for image, kept in zip(features, rows, strict=True):
            first, length = image.mm_position.offset, image.mm_position.length
            low, high = max(start, first), min(part.stop, first + length)
            if low < high:
                own.append(kept[low - first : high - first])
                mask[low - start : high - start] = True
        inputs = ours.embed_input_ids(ids[part], own, is_multimodal=mask)
        ours.language_model.model = reader
        try:
            ours(ids[part], positions[:, part], None, inputs)
        finally:
            ours.language_model.model = before
        places.append(reader.given["positions"])
        embedded.append(reader.given["inputs_embeds"])
        if reader.deep is not None:
            deep.append(reader.deep)
    return torch.cat(places, dim=1), torch.cat(embedded), deep


CASES = {
    "wide": [WIDE],
    "tall": [TALL],
    "several": [TALL, WIDE, SQUARE],
    "tiny": [TINY],
    "tiny and wide": [TINY, WIDE],
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_places_are_k_and_the_rest_of_the_prompt_is_as_it_was(served, sizes):
    case = Case(served, sizes)
    image_id = served.model.config.image_token_id
    bare = served.own.tokenizer.encode(case.text, add_special_tokens=False)
    assert [i for i in case.ids if i != image_id] == [i for i in bare if i != image_id]
    inputs = served.own(images=case.images, text=case.text, return_tensors="pt")
    counts = (inputs["image_grid_thw"].prod(dim=1) // 4).tolist()
    places = case.result["mm_placeholders"]["image"]
    assert [place.length for place in places] == [min(9, count) for count in counts]
    for place in places:
        assert set(case.ids[place.offset : place.offset + place.length]) == {image_id}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_what_is_read_is_what_transformers_reads(served, sizes):
    """Ids, rows, coordinates, DeepStack, and where the answer goes on, of every part."""
    case = Case(served, sizes)
    expected = case.expected()
    assert case.ids == expected.short_ids[0].tolist()
    positions, ahead = coordinates(expected)
    assert served.ours.get_mrope_input_positions(case.ids, case.features)[1] == ahead
    for size in (len(case.ids), 16, 7, 1):  # parts that split images
        found, embedded, deep = read_in_parts(case, size)
        assert torch.equal(found, positions)
        check_equal(embedded, expected.embeddings[0])
        if expected.deepstack is None:
            assert not deep
            continue
        layers = torch.cat(deep, dim=1)
        mask = torch.tensor(case.ids) == served.model.config.image_token_id
        check_equal(layers[:, mask], expected.deepstack.rows)
        assert not layers[:, ~mask].any()


def test_every_pruner_that_is_served_keeps_what_it_keeps_in_transformers(served):
    names = alternatives(served.ours.plan.layout)
    assert {"divprune", "fopru", "uniform"} <= set(names)
    for spec in {*names, *FURTHER, *TRAINED}:
        network = network_setting(spec, 64, (4, 5), projected_dim=WIDTH)
        case = Case(served, [TALL], spec, **network)
        expected = case.expected()
        found, embedded, _ = read_in_parts(case, 16)
        assert torch.equal(found, coordinates(expected)[0]), spec
        check_equal(embedded, expected.embeddings[0])


def test_images_are_pruned_alike_in_any_batch(served):
    together = Case(served, [TALL, WIDE, SQUARE], "visionzip:guidance=received").rows()
    served.ours._most_tokens, before = 1, served.ours._most_tokens
    try:
        alone = Case(served, [TALL, WIDE, SQUARE], "visionzip:guidance=received").rows()
    finally:
        served.ours._most_tokens = before
    for one, other in zip(together, alone, strict=True):
        check_equal(one, other)


def test_text_after_images_of_any_number_of_tokens_reads_the_same(served):
    """Coordinates of text do not depend on K, nor on what was kept."""
    last = set()
    for num_keep in (1, 9, 40, 500):
        case = Case(served, [TALL, WIDE], num_keep=num_keep)
        positions, ahead = served.ours.get_mrope_input_positions(case.ids, case.features)
        last.add((int(positions[0, -1]), len(case.ids) + ahead))
    assert len(last) == 1


def test_a_prompt_without_images(served):
    ids = torch.tensor([5, 6, 7])
    ours = served.ours
    positions, ahead = ours.get_mrope_input_positions(ids.tolist(), [])
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert ahead == 0
    Case(served, [TALL]).rows()
    with torch.inference_mode():
        ours.embed_input_ids(ids)
    assert not ours._steps.any()


def test_other_budgets_have_other_cache_keys(served):
    one, other = (Case(served, [WIDE], num_keep=k).result["mm_hashes"]["image"] for k in (8, 9))
    assert one != other
    assert one == Case(served, [WIDE], num_keep=8).result["mm_hashes"]["image"]


def test_videos_are_refused(served):
    import numpy as np

    video = np.zeros((2, 56, 56, 3), dtype=np.uint8)
    with pytest.raises(VLLMValidationError, match=r"At most 0 video"):
        served.processor.info.parse_mm_data({"video": [(video, {"fps": 1.0})]})


@pytest.mark.parametrize("spec", ["fastervlm", "trim"])
def test_pruners_that_cannot_be_served_are_refused_in_the_first_process(served, spec):
    with pytest.raises(ValueError, match="use one of divprune"):
        read_plan(served.model.config, {"pruner": spec, "num_keep": 4})


@pytest.mark.parametrize(
    ("name", "value"),
    [("speculative_config", object()), ("pipeline_parallel_size", 2), ("enable_dbo", True)],
)
def test_engines_in_which_others_read_coordinates_are_refused(served, name, value):
    config = arguments(served.folder).create_engine_config()
    holder = config if hasattr(config, name) else config.parallel_config
    object.__setattr__(holder, name, value)
    with pytest.raises(ValueError, match=name):
        type(served.ours)(vllm_config=config)


def test_a_language_model_has_room_for_coordinates_that_run_ahead(served):
    """Its rotations reach further than its columns; and vLLM's own pruning of videos stays off."""
    layer = served.ours.language_model.model.layers[0]
    most = served.model.config.get_text_config().max_position_embeddings
    assert layer.self_attn.rotary_emb.cos_sin_cache.shape[0] == 4 * most
    assert not served.ours.multimodal_config.is_multimodal_pruning_enabled()
