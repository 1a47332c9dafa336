"""Published methods inside the language model: as if columns were masked, chosen by plain loops.

B rows, L columns of the prompt, D' width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import naive_layers as naive
import pytest
import torch
from matrix.families import FAMILIES, Family, untouched
from reference import IMG, Inputs, assert_close
from reference_layers import Choose, Masked, View, best, last_row
from torch import Tensor

from ocvtp import Compose, OCPruner, build_pruner
from ocvtp.hosts.in_llm.hooks import hooks
from ocvtp.hosts.in_llm.plan import plan_layers
from ocvtp.hosts.runtime.call import Call
from ocvtp.slots import OCPrunerConfig
from ocvtp.towers.hooks import put

pytestmark = pytest.mark.sampled(2)

ONE = [(6, IMG, 4)]
ROWS = [(5, IMG, 4), (9, IMG, 2), (3, IMG, 6)]
MIXED = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]
NUM_NEW = 5
HOSTS = ("llava", "llava_next", "qwen2_5_vl")
TWICE = ((1, 9), (2, 4))
"""Of 15 tokens and more: what is recycled of them makes two tokens, and of 9 one."""
Columns = list[int]


@pytest.fixture(params=[f for f in FAMILIES if f.host in HOSTS], ids=lambda family: family.host)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


def of_images(choose: Callable[[View, int, Columns], Columns]) -> Choose:
    """A choice for one image of one row, made for all of them."""
    return lambda view: [
        [choose(view, row, image) for image in images] for row, images in enumerate(view.images)
    ]


def numbered(family: Family, inputs: Inputs) -> Inputs:
    """With the positions that generate() gives to padded rows: a forward() counts padding too."""
    if not plain(family):
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


def plain(family: Family) -> bool:
    """Whether positions are numbers, and not coordinates, which stay."""
    return not family.host.startswith("qwen")


class ByHand:
    """The methods on a prompt, positions and all."""

    def __init__(self, family: Family, inputs: Inputs) -> None:
        self.model, self.language_model = family.model, family.model.model.language_model
        self.renumber = plain(family)
        is_image = inputs["input_ids"] == family.model.config.image_token_id
        self.is_text = inputs["attention_mask"].bool() & ~is_image
        caught: list[Tensor] = []

        def catch(module: Any, args: Any, kwargs: Any) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])

        handle = self.language_model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        with torch.no_grad():
            cache = self.model(**numbered(family, inputs), use_cache=True).past_key_values
        handle.remove()
        self.embeddings = caught[0]
        self.keys = [layer.keys.transpose(1, 2).flatten(2) for layer in cache.layers]
        self.raters: dict[tuple[int, int], Columns] = {}

    def behind(self, row: int, image: Columns) -> Columns:
        """Columns of the text behind an image."""
        return [c for c in self.is_text[row].nonzero()[:, 0].tolist() if c > image[-1]]

    def pyramiddrop(self, count: int) -> Choose:
        """The last token's attention in the coming layer."""
        last = [int(row.nonzero()[-1]) for row in self.is_text]

        def choose(view: View, row: int, image: Columns) -> Columns:
            return best(view.coming()[row].mean(dim=0)[last[row]], image, count)

        return of_images(choose)

    def dart(self, count: int) -> Choose:
        """Keys of the layer before, and hidden states behind the last norm."""

        def choose(view: View, row: int, image: Columns) -> Columns:
            text, keys = self.behind(row, image), self.keys[view.layer - 1][row]
            normed = self.language_model.norm(view.hidden[row])
            kept = naive.dart(keys[image], keys[text], normed[image], normed[text], count)
            return [image[i] for i in kept]

        return of_images(choose)

    def sparsevlm(self, total: int, plus: bool = False) -> Choose:
        """The raters' attention in the layer before; recycled tokens go into the states."""

        def choose(view: View, row: int, image: Columns) -> Columns:
            text = self.behind(row, image)
            key = row, text[0]
            if key not in self.raters:
                states = self.embeddings[row]
                self.raters[key] = [text[i] for i in naive.raters(states[image], states[text])]
            scores = view.weights[row].mean(dim=0)[self.raters[key]].mean(dim=0)
            if plus:
                return best(scores, image, total)
            num_kept = naive.without_recycled(total, len(image))
            kept, spare, _ = naive.sparsevlm(scores[image].tolist(), num_kept)
            states = view.hidden[row, image].clone()
            rows = [(i, [i]) for i in kept]
            if total > num_kept:
                found = naive.clusters(states[spare], total - num_kept)
                rows += [(spare[c], [spare[i] for i in members]) for c, members in found]
            places = [image[anchor] for anchor, _ in rows]
            order = sorted(places) if self.renumber else places
            for place, (_, members) in zip(order, rows, strict=True):
                view.hidden[row, place] = states[members].mean(dim=0)
            return sorted(places)

        return of_images(choose)

    def sparsevlm_plus(self, total: int) -> Choose:
        """Nothing is recycled."""
        return self.sparsevlm(total, plus=True)


METHODS = {
    "pyramiddrop": ("pyramiddrop", {}, TWICE, True),
    "dart": ("dart", {}, ((2, 13),), False),
    "sparsevlm": ("sparsevlm", {}, TWICE, True),
    "sparsevlm_plus": ("sparsevlm", {"plus": True}, TWICE, False),
}
"""Name, settings, stages, and whether tokens are numbered anew."""


def build(method: str) -> Any:
    name, settings, stages, _ = METHODS[method]
    return build_pruner(name, stages=stages, **settings)


def by_hand(method: str, family: Family, inputs: Inputs) -> Masked:
    hand, (_, _, stages, anew) = ByHand(family, inputs), METHODS[method]
    chosen = {layer: getattr(hand, method)(count) for layer, count in stages}
    return Masked(family.model, chosen, renumber=anew and hand.renumber)


def answer(family: Family, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        sequences = family.model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.covering(2)
@pytest.mark.slow
@pytest.mark.parametrize("rows", [ONE, ROWS, MIXED], ids=["one", "three", "mixed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_equals_masked_columns(family: Family, method: str, rows: Any) -> None:
    inputs = family.make(rows, "left")
    words = by_hand(method, family, numbered(family, inputs)).greedy(inputs, NUM_NEW)
    with build(method)(family.model), torch.no_grad():
        assert answer(family, inputs).equal(words)
        actual = family.model(**inputs).logits
    expected = by_hand(method, family, inputs)
    is_image = inputs["input_ids"] == family.model.config.image_token_id
    text = inputs["attention_mask"].bool() & ~is_image
    assert_close(actual[text], expected.logits(inputs)[text], 1e-5)


def test_states_are_compared_behind_the_last_norm() -> None:
    """Whose weights are all 1 in the other models, where it turns no state."""
    family = replace(FAMILIES[0])
    generator = torch.Generator().manual_seed(0)
    norm = family.model.model.language_model.norm
    norm.weight.data = torch.randn(norm.weight.shape, generator=generator).exp()
    inputs = family.make(ROWS, "left")
    expected = by_hand("dart", family, inputs).logits(inputs)
    with build("dart")(family.model), torch.no_grad():
        actual = family.model(**inputs).logits
    text = ByHand(family, inputs).is_text
    assert_close(actual[text], expected[text], 1e-5)


@pytest.mark.covering(2)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_rows(family: Family, method: str, side: Any) -> None:
    inputs = family.make(MIXED, side)
    with build(method)(family.model), torch.no_grad():
        together = family.model(**inputs).logits
        for row in range(len(MIXED)):
            alone = family.model(**family.single(inputs, row)).logits[0]
            real = inputs["attention_mask"][row].bool()
            text = inputs["input_ids"][row, real] != family.model.config.image_token_id
            assert_close(together[row, real][text], alone[text], 1e-5)


def test_pyramiddrop_is_the_official_one(vectors: Any) -> None:
    """Its own schedule on layers that change nothing: what reaches each of them, and its place."""
    from transformers import LlamaConfig, LlamaModel

    reference = vectors("pdrop_b1")
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
    )
    model = LlamaModel(config).eval()
    caught: dict[int, Any] = {}
    handles = []
    for layer in model.layers:
        layer.self_attn.q_proj.weight.data = reference["q_proj"]
        layer.self_attn.k_proj.weight.data = reference["k_proj"]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    hidden = reference["hidden"]
    length, count = hidden.shape[1], int(reference["image_tokens"])
    column, start = torch.arange(length)[None], int(reference["image_pos"])
    is_image = (column >= start) & (column < start + count)
    image, places = (is_image.long() - 1), (column - start).where(is_image, -1)
    pruner = build_pruner("pyramiddrop")
    plan = plan_layers(pruner, 4, image, places, torch.ones_like(is_image), renumber=True)
    handles += put(hooks(model, pruner))
    for number, layer in enumerate(model.layers):

        def catch(module: Any, args: Any, kwargs: Any, number: int = number) -> None:
            caught[number] = args[0], kwargs["position_embeddings"]

        handles.append(layer.register_forward_pre_hook(catch, with_kwargs=True))
    call = Call(model)
    with call.on_its_way(), call.reading(plan, None), torch.no_grad():
        model(inputs_embeds=hidden, attention_mask=torch.ones(1, length))
    for stage in range(3):
        states, (cosines, _) = caught[stage + 1]
        assert_close(states, reference[f"s{stage}.out"])
        expected = model.rotary_emb(states, reference[f"s{stage}.position_ids"].long())[0]
        assert_close(cosines, expected)
    assert [len(caught[n][0][0]) for n in range(4)] == [34, 22, 16, 13]


def chosen_before(kept: list[list[Columns]]) -> Choose:
    """For every row, the places of each image's tokens that reach the language model."""
    return lambda view: [
        [[image[i] for i in places] for image, places in zip(images, own, strict=True)]
        for images, own in zip(view.images, kept, strict=True)
    ]


@torch.no_grad()
def test_the_oc_pruner_and_then_a_pyramid() -> None:
    """Compose: 10 tokens reach the language model, 6 its layer 1 and 3 its layer 2."""
    family = next(family for family in FAMILIES if family.host == "llava")
    inputs = family.make(MIXED, "left")
    torch.manual_seed(0)
    sizes = {"feature_dim": 32, "hidden_dim": 16, "slot_dim": 8, "ffn_dim": 8}
    network = OCPruner(OCPrunerConfig(**sizes, grid_hw=(4, 4), layer=3, noise_rows=32)).eval()
    slots = build_pruner("ocvtp", num_keep=10, network=network)
    prompts: list[Any] = []
    with slots(family.model, on_prune=prompts.append):
        family.model(**inputs)
    chosen = iter(prompts[0].selection.keep_indices.tolist())
    kept = [[next(chosen) for _ in range(count)] for count in (1, 0, 2)]
    by_hand = ByHand(family, inputs)
    masked = Masked(
        family.model,
        {
            0: chosen_before(kept),
            1: by_hand.pyramiddrop(6),
            2: by_hand.pyramiddrop(3),
        },
        renumber=True,
    )
    pyramid = build_pruner("pyramiddrop", stages=((1, 6), (2, 3)))
    with Compose([pyramid, slots])(family.model, on_prune=prompts.append):
        said = family.model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    assert said[:, inputs["input_ids"].shape[1] :].equal(masked.greedy(inputs, NUM_NEW))
    told = prompts[1].summary()
    assert told["visual_tokens_kept"] == [10, 10, 10]
    assert [stage["visual_tokens_kept"] for stage in told["layers"]] == [[6] * 3, [3] * 3]


@torch.no_grad()
def test_fopru_and_then_fastv() -> None:
    """Half of the tokens before the language model, half of these inside it."""
    family = next(family for family in FAMILIES if family.host == "llava")
    inputs = family.make(MIXED, "left")
    fopru, fastv = build_pruner("fopru", num_keep=8), build_pruner("fastv", stages=((1, 0.5),))
    prompts: list[Any] = []
    with fopru(family.model, on_prune=prompts.append):
        family.model(**inputs)
    chosen = iter(prompts[0].selection.keep_indices.tolist())
    kept = [[next(chosen) for _ in range(count)] for count in (1, 0, 2)]
    masked = Masked(
        family.model,
        {
            0: chosen_before(kept),
            1: last_row(lambda size: size // 2),
        },
    )
    both = Compose([fopru, fastv])
    with both(family.model, positions="original", on_prune=prompts.append):
        said = family.model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    assert said[:, inputs["input_ids"].shape[1] :].equal(masked.greedy(inputs, NUM_NEW))
    assert prompts[1].summary()["layers"] == [{"layer": 1, "visual_tokens_kept": [4, 4, 4]}]
