"""Methods of two halves, and of hidden states: as if columns were masked, chosen by plain loops.

B rows, L columns of the prompt, I images, N tokens of the tower, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import naive_halves as naive
import pytest
import torch
from matrix.families import FAMILIES, Family, untouched
from reference import IMG, Inputs, assert_close
from reference_layers import Choose, Masked, View
from tiny_models import random_model
from torch import Tensor

from ocvtp import Chain, Compose, build_pruner
from ocvtp.hosts.in_llm.attention import turn
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host

pytestmark = pytest.mark.sampled(2)

ONE = [(6, IMG, 4)]
ROWS = [(5, IMG, 4), (9, IMG, 2), (3, IMG, 6)]
MIXED = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]
NUM_NEW = 4
HOSTS = ("llava", "llava_next", "qwen2_5_vl")
STAGES = ((1, 8), (2, 4))
Columns = list[int]

METHODS = {
    "vitcop": {"num_keep": 12, "stages": STAGES, "cluster_share": 0.3},
    "visiondrop": {"num_keep": 12, "stages": STAGES, "later": True},
    "todre": {"num_keep": 12, "later": True, "threshold": 0.4},
    "vflowopt": {"num_keep": 12, "stages": STAGES},
    "topv": {"stages": ((1, 6),)},
}
OF_HOST: dict[tuple[str, str], dict[str, Any]] = {
    ("llava", "vflowopt"): {"cell": 2},
    ("llava_next", "vflowopt"): {"cell": 1},
    ("llava_next", "topv"): {"relative": 0.0, "centre": 0.0},
    ("qwen2_5_vl", "vflowopt"): {"cell": 1, "block": -1},
    ("qwen2_5_vl", "vitcop"): {"guidance": "received", "block": -1},
    ("qwen2_5_vl", "visiondrop"): {"block": -1},
    ("qwen2_5_vl", "topv"): {"relative": 0.0, "centre": 0.0},
}
MERGED_BEHIND = ("visiondrop",)
"""Methods that number tokens anew inside the language model."""


@pytest.fixture(params=[f for f in FAMILIES if f.host in HOSTS], ids=lambda family: family.host)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


@pytest.fixture
def llava() -> Family:
    return FAMILIES[0]


@pytest.fixture
def llava_next() -> Family:
    return next(family for family in FAMILIES if family.host == "llava_next")


def build(method: str, family: Family, **more: Any) -> Any:
    settings = METHODS[method] | OF_HOST.get((family.host, method), {}) | more
    pruner = build_pruner(method, **settings)
    if method == "todre" and family.host.startswith("qwen"):  # no CLS: what it does inside
        return pruner.parts[-1]
    return pruner


def plain(family: Family) -> bool:
    """Whether positions are numbers, and not coordinates, which stay."""
    return not family.host.startswith("qwen")


def answer(family: Family, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        sequences = family.model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    return sequences[:, inputs["input_ids"].shape[1] :]


def text_of(family: Family, inputs: Inputs) -> Tensor:
    is_image = inputs["input_ids"] == family.model.config.image_token_id
    return inputs["attention_mask"].bool() & ~is_image


class ByHand:
    """A method on a prompt that its first half has shortened."""

    def __init__(self, family: Family, inputs: Inputs, pruner: Any, method: str) -> None:
        self.pruner, self.part = pruner, pruner.parts[-1]
        self.prompt = prompt_of(family, inputs, pruner)
        self.renumber = plain(family) and method in MERGED_BEHIND
        self.text = [row.nonzero()[:, 0].tolist() for row in text_of(family, inputs)]
        is_image = self.prompt.short_ids == family.model.config.image_token_id
        self.short_text = self.prompt.short_mask & ~is_image
        self.places = places_of(family, inputs, self.prompt)
        self.states: dict[tuple[str, int], Tensor] = {}
        self.ropes: dict[int, Any] = {}
        stages = {stage.layer: stage.num_keep for stage in self.part.schedule(3, 16)}
        chosen = {layer: self._at(layer, getattr(self, method)) for layer in stages}
        self.counts = stages
        self.masked = Masked(family.model, {0: self._first, **chosen})
        self.plain = plain(family)
        self.layers = self.masked.model.model.language_model.layers
        for number, layer in enumerate(self.layers):
            self._record(number, layer)

    def _record(self, number: int, layer: Any) -> None:
        def keep(name: str) -> Any:
            return lambda module, args, output: self.states.update({(name, number): output})

        def keep_rope(module: Any, args: Any, kwargs: Any) -> None:
            self.ropes[number] = kwargs["position_embeddings"]

        layer.self_attn.q_proj.register_forward_hook(keep("q"))
        layer.self_attn.k_proj.register_forward_hook(keep("k"))
        layer.self_attn.register_forward_pre_hook(keep_rope, with_kwargs=True)

    def turned(self, name: str, layer: int) -> Tensor:
        """[B, H, L, d] queries or keys as they are compared."""
        attention = self.layers[layer].self_attn
        return turn(attention, self.states[name, layer], f"{name}_norm", *self.ropes[layer])

    def _first(self, view: View) -> list[list[Columns]]:
        """What the first half kept, and what it made of it."""
        prompt, kept = self.prompt, []
        for row, images in enumerate(view.images):
            here = prompt.keep[row].nonzero()[:, 0]
            view.hidden[row, here] = prompt.embeddings[row][prompt.short_mask[row]]
            stays = set(here.tolist())
            kept.append([[c for c in image if c in stays] for image in images])
        self.masked.renumber = self.plain
        return kept

    def _at(self, layer: int, method: Any) -> Choose:
        def choose(view: View) -> list[list[Columns]]:
            kept = [
                [method(view, row, image, min(self.counts[layer], len(image))) for image in images]
                for row, images in enumerate(view.images)
            ]
            self.masked.renumber = self.renumber
            return kept

        return choose

    def _mix(self, view: View, row: int, image: Columns, rows: list[naive.Row]) -> Columns:
        """Put rows in the states of columns."""
        states = view.hidden[row, image].clone()
        places = [image[anchor] for anchor, _ in rows]
        where = sorted(places) if self.renumber else places
        for place, (_, weights) in zip(where, rows, strict=True):
            view.hidden[row, place] = sum(w * states[i] for i, w in weights.items())
        return sorted(places)

    def _lengths(self, view: View, row: int, image: Columns) -> list[float]:
        keys = self.turned("k", view.layer - 1)[row, :, image].mean(dim=0)
        return keys.norm(dim=1).tolist()

    def _in_tower(self, row: int, image: Columns) -> tuple[int, list[int]]:
        """Which image of the call it is, and which of its tokens the columns are."""
        known = [self.places[row, column] for column in image]
        before = 0
        found = []
        for _, place in known:
            before = place if place >= 0 else before
            found.append(before)
        return known[0][0], found

    def vitcop(self, view: View, row: int, image: Columns, count: int) -> Columns:
        lengths = self._lengths(view, row, image)
        if view.layer == 2 or count == len(image):
            return [image[i] for i in lowest(lengths, count)]
        number, places = self._in_tower(row, image)
        tower = self.prompt.encoded.tokens
        points = tower.keys[self.pruner.block][number, places]
        points = points.unflatten(1, (tower.num_heads, -1)).mean(dim=1)
        num_clusters = max(1, int(0.3 * len(image)))
        return self._mix(
            view, row, image, naive.shortest_of_clusters(points, lengths, num_clusters, count)
        )

    def visiondrop(self, view: View, row: int, image: Columns, count: int) -> Columns:
        if count == len(image):
            return image
        queries = self.turned("q", view.layer - 1)[row, :, image]
        keys = self.turned("k", view.layer - 1)[row, :, image]
        shared = keys.repeat_interleave(len(queries) // len(keys), dim=0)
        logits = queries @ shared.transpose(1, 2) * self.layers[0].self_attn.scaling
        scores = logits.softmax(dim=2).mean(dim=(0, 1)).tolist()
        rows = naive.dominant_and_contextual(scores, keys.mean(dim=0), count)
        return self._mix(view, row, image, rows)

    def todre(self, view: View, row: int, image: Columns, count: int) -> Columns:
        behind = [c for c in self.text[row] if c > image[-1]]
        weights = view.weights[row].mean(dim=0)
        share = sum(float(weights[c, image].sum()) for c in behind) / len(behind)
        return image if share >= self.part.threshold else []

    def vflowopt(self, view: View, row: int, image: Columns, count: int) -> Columns:
        number, places = self._in_tower(row, image)
        scores = self.prompt.encoded.tokens.attention[self.pruner.block, "global"][number]
        return [image[i] for i in lowest((-scores[places]).tolist(), count)]

    def topv(self, view: View, row: int, image: Columns, count: int) -> Columns:
        states = view.hidden[row, image]
        normed = self.layers[view.layer].input_layernorm(states)
        pruner = self.pruner
        _, places = self._in_tower(row, image)
        height, width = self.prompt.encoded.tokens.grid_hw
        at = [(place // max(1, width), place % max(1, width)) for place in places]
        weights = pruner.appearance, pruner.relative, pruner.centre
        costs = naive.transport_costs(
            states.tolist(), normed.tolist(), at, (height, width), weights, pruner.sigma
        )
        paid = naive.mean_costs(costs, pruner.entropy)
        return [image[i] for i in lowest(paid, count)]


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i])[:count])


def prompt_of(family: Family, inputs: Inputs, pruner: Any) -> Prompt:
    found: list[Prompt] = []
    with pruner(family.model, on_prune=found.append), torch.no_grad():
        family.model(**inputs)
    return found[0]


def places_of(
    family: Family, inputs: Inputs, prompt: Prompt
) -> dict[tuple[int, int], tuple[int, int]]:
    """Row and column of an image token -> the image of the call, and which of its tokens it is."""
    numbers = find_host(family.model).tokens_of_rows(prompt.encoded).tolist()
    slots = (inputs["input_ids"] == family.model.config.image_token_id).nonzero().tolist()
    found, image, last = {}, -1, (-1, -1)
    for (row, column), number in zip(slots, numbers, strict=True):
        image += (row, column - 1) != last
        last = row, column
        found[row, column] = image, number
    return found


# -------------------------------------------------------------------------- as if they were masked


@pytest.mark.covering(2)
@pytest.mark.slow
@pytest.mark.parametrize("rows", [ONE, ROWS, MIXED], ids=["one", "three", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_masked_columns(family: Family, method: str, rows: Any) -> None:
    inputs = family.make(rows, "left")
    pruner = build(method, family)
    hand = ByHand(family, inputs, pruner, method)
    masked, expected = hand.masked, hand.masked.logits(inputs)
    words = masked.greedy(inputs, NUM_NEW)
    with pruner(family.model), torch.no_grad():
        actual = family.model(**inputs).logits
        assert answer(family, inputs).equal(words)
    assert_close(actual[hand.short_text], expected[text_of(family, inputs)], 1e-5)


@pytest.mark.covering(2)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_rows(family: Family, method: str, side: Any) -> None:
    inputs, pruner = family.make(MIXED, side), build(method, family)
    prompt = prompt_of(family, inputs, pruner)
    with pruner(family.model), torch.no_grad():
        together = family.model(**inputs).logits
        for row in range(len(MIXED)):
            single = family.single(inputs, row)
            alone = family.model(**single).logits[0]
            image = family.model.config.image_token_id
            real = prompt.short_mask[row]
            text = prompt.short_ids[row, real] != image
            assert_close(together[row, real][text], alone[text], 1e-5)


@pytest.mark.parametrize("method", ["vitcop", "todre"])
def test_beams_of_a_batch_answer_as_its_rows_do(llava: Family, method: str) -> None:
    inputs, settings = llava.make(MIXED, "left"), {"num_beams": 3, "max_new_tokens": 4}
    with build(method, llava)(llava.model), torch.no_grad():
        together = llava.model.generate(**inputs, **settings, do_sample=False)[:, -4:]
        for row in range(len(MIXED)):
            alone = llava.model.generate(**llava.single(inputs, row), **settings, do_sample=False)
            assert together[row].equal(alone[0, -4:])


# ------------------------------------------------------------ images that go whole


def test_some_images_go_and_some_stay(llava: Family) -> None:
    """The threshold of the other tests is one between the images of a batch."""
    inputs, kept = llava.make(MIXED, "left"), {}
    for threshold in (0.0, METHODS["todre"]["threshold"], 1.0):
        pruner = build("todre", llava, threshold=threshold)
        hand = ByHand(llava, inputs, pruner, "todre")
        expected = hand.masked.logits(inputs)
        kept[threshold] = [len(image) for row in hand.masked.kept[2] for image in row]
        with pruner(llava.model), torch.no_grad():
            actual = llava.model(**inputs).logits
        assert_close(actual[hand.short_text], expected[text_of(llava, inputs)], 1e-5)
    first, between, last = kept.values()
    assert (first, last) == ([12] * 3, [0] * 3)
    assert sorted(set(between)) == [0, 12]


# --------------------------------------------------------------------------------- several pruners


def logits(family: Family, inputs: Inputs, pruner: Any, **options: Any) -> Tensor:
    with pruner(family.model, **options), torch.no_grad():
        return family.model(**inputs).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_composed_method_does_what_it_does_alone(llava: Family, method: str) -> None:
    inputs, pruner = llava.make(MIXED, "left"), build(method, llava)
    alone = logits(llava, inputs, pruner)
    assert logits(llava, inputs, Compose([pruner])).equal(alone)
    assert logits(llava, inputs, Compose(pruner.parts)).equal(alone)


def test_halves_of_two_methods_in_a_row(llava: Family) -> None:
    """A half inside the language model takes what any pruner before it left."""
    inputs = llava.make(MIXED, "left")
    before, later = build_pruner("fastervlm", num_keep=12), build("vitcop", llava).parts[-1]
    assert logits(llava, inputs, Compose([later, before])).equal(
        logits(llava, inputs, build("vitcop", llava))
    )


def test_stages_that_are_taken_are_refused(llava: Family) -> None:
    whole = build("visiondrop", llava)
    for other, stage in (("fastv", "llm_layers"), ("uniform", "llm_input")):
        message = f"'visiondrop' and '{other}', which both act at stage '{stage}'"
        with pytest.raises(ValueError, match=message):
            Compose([whole, build_pruner(other, num_keep=5)])
    with pytest.raises(ValueError, match="'todre' acts at several stages, of which a Chain would"):
        Chain([build_pruner("uniform", num_keep=14), build("todre", llava)])


# ----------------------------------------------------------------------------- what cannot be done


def test_tiles_shown_alone_are_refused_where_the_tower_is_looked_up(llava_next: Family) -> None:
    inputs = llava_next.make(ONE, "left")
    with pytest.raises(ValueError, match="shown 5 tiles one by one; pass budget='per_image'"):
        logits(llava_next, inputs, build("vitcop", llava_next), budget="per_tile")
    logits(llava_next, inputs, build("visiondrop", llava_next), budget="per_tile")


@pytest.mark.parametrize(
    ("method", "more"), [("topv", {"relative": 1.0}), ("vflowopt", {"cell": 2})]
)
def test_methods_of_the_grid_refuse_tiles(
    llava_next: Family, method: str, more: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"'{method}' reads the grid of the tokens, but"):
        logits(llava_next, llava_next.make(ONE, "left"), build(method, llava_next, **more))


def test_without_a_cls_another_guidance_is_named() -> None:
    qwen = next(family for family in FAMILIES if family.host == "qwen2_5_vl")
    for method in ("vitcop", "todre"):
        with pytest.raises(ValueError, match="CLS"):
            logits(qwen, qwen.make(ONE, "left"), build_pruner(method, num_keep=5))


def test_a_whole_budget_on_a_deeper_model() -> None:
    """Numbers of the paper, on a language model of its depth."""
    config = deepcopy(FAMILIES[0].model.config)
    config.text_config.num_hidden_layers = 32
    model = random_model(config)
    inputs, prompts = FAMILIES[0].make(ROWS, "left"), []
    pruner = build_pruner("visiondrop", num_keep=8, later=True)
    with pruner(model, on_prune=prompts.append), torch.no_grad():
        model(**inputs)
    layers = [
        (layer["layer"], layer["visual_tokens_kept"]) for layer in prompts[0].summary()["layers"]
    ]
    assert prompts[0].summary()["visual_tokens_kept"] == [12] * 3
    assert layers == [(8, [9] * 3), (16, [6] * 3), (24, [5] * 3)]
