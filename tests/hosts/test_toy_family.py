"""A family of models from outside the package: one file, one line that registers it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ocvtp
from ocvtp import build_pruner, plugins
from ocvtp.cli import main
from ocvtp.flops import count, operations
from ocvtp.hosts import registry
from ocvtp.hosts.base import Host
from ocvtp.hosts.loading import load_config, load_model
from ocvtp.pruners.specs import build_spec

FILE = Path(__file__).with_name("toy_family.py")
IMAGE = torch.randint(0, 255, (96, 96, 3), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    """The model and its processor; nobody knows them before and after."""
    with pytest.raises(ValueError, match="'random:tiny-toy' is unknown"):
        load_model("random:tiny-toy")
    assert main(["--import", str(FILE), "list", "--json"]) == 0
    yield load_model("random:tiny-toy")
    del registry.HOSTS["toy"], sys.modules[FILE.stem]


@pytest.fixture(scope="module")
def inputs(toy: Any) -> Any:
    """Of two prompts, the second one longer."""
    _, processor = toy
    image = Image.fromarray(IMAGE.numpy().astype(np.uint8))
    prompts = ["<image>a", "what is this? <image>"]
    return processor(images=[image, image.rotate(90)], text=prompts, padding=True,
                     return_tensors="pt")  # fmt: skip


def test_the_host_is_found_by_its_model_type(toy):
    model, _ = toy
    host = ocvtp.hosts.find_host(model)
    assert (type(host).__name__, host.name, host.image_tokens) == ("ToyHost", "toy", 144)


@pytest.mark.parametrize("name", ["none", "fopru"])
def test_keeping_all_changes_no_bit(toy, inputs, name):
    model, _ = toy
    expected = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=5)
    settings = {} if name == "none" else {"keep_ratio": 1.0}
    with build_pruner(name, **settings)(model):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=5), answer)


@pytest.mark.parametrize(
    ("spec", "columns"),
    [("fastervlm", 20), ("divprune", 20), ("visionzip", 20), ("fastv:stages=[[1,20]]", 144)],
)
def test_pruned_calls(toy, inputs, spec, columns):
    model, _ = toy
    length = inputs["input_ids"].shape[1]
    with build_spec(spec, num_keep=20)(model):
        logits = model(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    assert logits.shape[1] == length - 144 + columns
    assert torch.equal(answer[:, :length], inputs["input_ids"])
    assert answer.shape[1] == length + 5


def test_a_pruned_call_is_that_of_the_kept_rows(toy, inputs):
    """By hand: the rows of the first 30 tokens in their places, the others cut out."""
    model, _ = toy
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        rows = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        short = [row.nonzero()[:, 0] for row in mask]
        for number, row in enumerate(short):
            places = (ids[number, row] == model.config.image_token_id).nonzero()[:, 0]
            gone = torch.isin(torch.arange(len(row)), places[30:])
            embeddings = model.get_input_embeddings()(ids[number, row][~gone])
            embeddings[places[0] : places[0] + 30] = rows.pooler_output[number][:30]
            expected = model(inputs_embeds=embeddings[None]).logits[0, -1]
            with First(num_keep=30)(model):
                found = model(**inputs).logits[number, -1]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class First(ocvtp.Pruner):
    """The first tokens of an image."""

    def _select(self, tokens, num_keep):
        keep = torch.arange(num_keep).expand(tokens.batch_size, -1)
        return ocvtp.Selection(keep, None)


@pytest.mark.parametrize(
    ("spec", "projected"),
    [(None, 144), ("fastervlm", 20), ("divprune", 144), ("fastv:stages=[[1,20]]", 144)],
)
def test_operations_are_those_that_torch_counts(toy, inputs, spec, projected):
    model, _ = toy
    one = {name: values[1:] for name, values in inputs.items()}
    pruner = None if spec is None else build_spec(spec, num_keep=20)
    attached = nullcontext() if pruner is None else pruner(model)
    with attached, operations.counter() as counter, torch.no_grad():
        model(**one, logits_to_keep=1)
    found = count(model, text_length=one["input_ids"].shape[1] - 144, pruner=pruner)
    assert found.total == pytest.approx(counter.get_total_flops(), rel=0.002)
    assert found.projector == 2 * projected * (64 * 40 + 40 * 24 + 24 * 48)


def test_commands_know_it(toy, capsys):
    words = ["flops", "--model", "random:tiny-toy", "--num-keep", "36", "--json"]
    assert main(["--import", str(FILE), *words, "--pruners", "fastervlm", "vprune"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["num_keep"] for row in facts["rows"]] == [144, 36]
    (note,) = facts["notes"]
    assert "the host of 'toy_vlm' serves llm_input, llm_layers" in note
    with pytest.raises(ValueError, match=r"random:nothing.*random:tiny-toy"):
        load_model("random:nothing")


def test_an_installed_package_brings_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_with_a_host.py").write_text(
        FILE.read_text().split("class ToyConfig")[0] + HOST
    )
    facts = tmp_path / "package_with_a_host-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: package_with_a_host\nVersion: 1\n"
    )
    (facts / "entry_points.txt").write_text("[ocvtp.hosts]\nmine = package_with_a_host\n")
    plugins.load_installed.cache_clear()
    try:
        assert registry.host_class("mine_vlm").name == "mine"
        with pytest.raises(ValueError, match="mine_vlm"):
            ocvtp.attach(torch.nn.Linear(1, 1), build_pruner("none"))
    finally:
        registry.HOSTS.pop("mine", None)
        (facts / "entry_points.txt").write_text("")
        plugins.load_installed.cache_clear()


HOST = """
@register_host("mine")
class MyHost(ClipFamilyHost):
    family = "Mine"
    model_types = ("mine_vlm",)
"""


def test_names_and_model_types_that_are_taken_are_refused():
    class Other(Host):
        model_types = ("other_vlm", "llava")

    with pytest.raises(ValueError, match="host 'internvl' is registered already"):
        registry.register_host("internvl")(Other)
    with pytest.raises(ValueError, match="serves model_type llava, as 'llava' does"):
        registry.register_host("other")(Other)
    assert "other" not in registry.HOSTS


def test_a_host_without_a_tiny_model_has_none_by_name():
    class Plain(Host):
        model_types = ("plain_vlm",)

    registry.register_host("plain")(Plain)
    try:
        with pytest.raises(ValueError, match="'random:tiny-plain' is unknown") as error:
            load_config("random:tiny-plain")
        assert "'random:tiny-plain'" not in str(error.value).split("random models are")[1]
    finally:
        del registry.HOSTS["plain"]


def test_the_page_about_hosts_names_what_a_host_says():
    page = Path("docs/add-a-host.md").read_text()
    cells = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    said = {name for name in dir(Host) if not name.startswith("_")} | set(Host.__annotations__)
    assert len(named) > 20
    assert named <= said
    assert Host.__abstractmethods__ <= named


def test_every_family_of_the_package_has_a_name_and_a_tiny_model():
    from ocvtp.choices import FAMILIES, TINY_MODELS

    assert list(registry.hosts())[: len(FAMILIES)] == list(FAMILIES)
    for name, model_name in zip(FAMILIES, TINY_MODELS, strict=True):
        model, _ = load_model(model_name)
        assert model.config.model_type in registry.HOSTS[name].model_types
