"""Tokens dropped inside the language model: as if nobody looked at them from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from matrix.families import FAMILIES, Family, untouched
from reference import IMG, Inputs, Scripted, answer_of, assert_close, fingerprint
from reference_layers import Choose, Masked, View, best, last_row
from torch import Tensor

import ocvtp
from ocvtp import Selection, VisualTokens, build_pruner
from ocvtp.ops.selection import top_k
from ocvtp.pruners.layer_pruner import LayerNeeds, LayerPruner, LayerStage
from ocvtp.structures import LayerTokens

pytestmark = pytest.mark.sampled(2)

ONE = [(5, IMG, 4)]
ROWS = [(5, IMG, 4), (9, IMG, 2), (3, IMG, 6)]
MIXED = [(5, IMG, 4), (9,), (3, IMG, 2, IMG, 6)]
NUM_NEW = 5


@dataclass(kw_only=True, eq=False)
class Layered(LayerPruner):
    """Keeps what the test says, K of each image in front of each layer."""

    stages: Sequence[tuple[int, float]] | None = ((1, 7), (2, 4))
    wants: LayerNeeds = field(default_factory=LayerNeeds)
    choose: Callable[[VisualTokens, int, int], Selection] = field(
        default=lambda tokens, layer, count: every_other(tokens, count)
    )
    seen: list[Any] = field(default_factory=list)

    name = "layered"
    status = "control"

    def needs_at(self, layer: int) -> LayerNeeds:
        return self.wants

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        raise AssertionError

    def _schedule(self, num_layers: int, num_tokens: int) -> tuple[LayerStage, ...]:
        raise AssertionError

    def _select_at(self, tokens: VisualTokens, layer: int, num_keep: int) -> Selection:
        self.seen.append(tokens)
        return self.choose(tokens, layer, num_keep)


@dataclass(kw_only=True, eq=False)
class Renumbering(Layered):
    positions: ClassVar[Any] = "contiguous"


def every_other(tokens: VisualTokens, count: int) -> Selection:
    order = [*range(1, tokens.num_tokens, 2), *range(0, tokens.num_tokens, 2)][:count]
    return Selection(torch.tensor(sorted(order)).repeat(tokens.batch_size, 1))


def every_other_by_hand(count: int) -> Choose:
    def choose(view: View) -> list[list[list[int]]]:
        return [[sorted((i[1::2] + i[::2])[:count]) for i in images] for images in view.images]

    return choose


TWICE = {1: every_other_by_hand(7), 2: every_other_by_hand(4)}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.host)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with untouched(request.param) as family:
        yield family


@pytest.fixture
def llava() -> Iterator[Family]:
    before = fingerprint(FAMILIES[0].model)
    yield FAMILIES[0]
    assert fingerprint(FAMILIES[0].model) == before


def first_layer(family: Family) -> int:
    """Behind the layers to which the tower still adds something."""
    return 2 if family.host == "qwen3_vl" else 1


def answer(family: Family, inputs: Inputs, model: Any = None, **settings: Any) -> Tensor:
    model = family.model if model is None else model
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False} | settings
    with torch.no_grad():
        return answer_of(model, inputs, **settings)


def text_of(family: Family, inputs: Inputs) -> Tensor:
    """[B, L] bool: columns of text."""
    is_image = inputs["input_ids"] == family.model.config.image_token_id
    return inputs["attention_mask"].bool() & ~is_image


def logits_of(family: Family, inputs: Inputs, pruner: Any, **options: Any) -> Tensor:
    with pruner(family.model, **options), torch.no_grad():
        return family.model(**inputs).logits


# -------------------------------------------------------------------------- as if they were masked


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rows", [ONE, ROWS, MIXED], ids=["one", "three", "mixed"])
def test_fastv_equals_masked_columns(family: Family, rows: Any) -> None:
    layer, inputs = first_layer(family), family.make(rows, "left")
    expected = Masked(family.model, {layer: last_row(lambda size: 5)})
    words = expected.greedy(inputs, NUM_NEW)
    pruner = build_pruner("fastv", stages=((layer, 5),))
    with pruner(family.model):
        assert answer(family, inputs).equal(words)
    text = text_of(family, inputs)
    actual = logits_of(family, inputs, pruner)
    assert actual.shape[:2] == inputs["input_ids"].shape
    assert_close(actual[text], expected.logits(inputs)[text], 1e-5)


@pytest.mark.sampled(3)
# Qwen3-VL's DeepStack fills the first two of its three layers: one stage is left.
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=f.host) for f in FAMILIES if f.host != "qwen3_vl"],
    indirect=True,
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_stages(family: Family, side: Any) -> None:
    inputs = family.make(MIXED, side)
    expected, text = Masked(family.model, TWICE), text_of(family, inputs)
    assert_close(logits_of(family, inputs, Layered())[text], expected.logits(inputs)[text], 1e-5)
    if side == "left":
        with Layered()(family.model):
            assert answer(family, inputs).equal(expected.greedy(inputs, NUM_NEW))


@pytest.mark.parametrize("rows", [ONE, MIXED], ids=["one", "mixed"])
def test_positions_are_counted_anew(llava: Family, rows: Any) -> None:
    inputs = llava.make(rows, "left")
    expected, text = Masked(llava.model, TWICE, renumber=True), text_of(llava, inputs)
    pruner = Renumbering()
    assert_close(logits_of(llava, inputs, pruner)[text], expected.logits(inputs)[text], 1e-5)
    with pruner(llava.model):
        assert answer(llava, inputs).equal(expected.greedy(inputs, NUM_NEW))


def test_positions_stay_where_the_caller_says_so(llava: Family) -> None:
    inputs = llava.make(MIXED, "left")
    expected, text = Masked(llava.model, TWICE), text_of(llava, inputs)
    actual = logits_of(llava, inputs, Renumbering(), positions="original")
    assert_close(actual[text], expected.logits(inputs)[text], 1e-5)


def test_coordinates_are_never_counted_anew() -> None:
    qwen = next(family for family in FAMILIES if family.host == "qwen2_5_vl")
    inputs = qwen.make(MIXED, "left")
    expected, text = Masked(qwen.model, TWICE), text_of(qwen, inputs)
    actual = logits_of(qwen, inputs, Renumbering())
    assert_close(actual[text], expected.logits(inputs)[text], 1e-5)


@pytest.mark.sampled(3)
def test_a_batch_answers_as_its_rows_do(family: Family) -> None:
    inputs = family.make(MIXED, "left")
    with build_pruner("fastv", stages=((first_layer(family), 0.5),))(family.model):
        together = answer(family, inputs)
        for row in range(3):
            alone = answer(family, family.single(inputs, row))
            assert alone.equal(together[row : row + 1])


@pytest.mark.sampled(3)
def test_keeping_all_is_the_bare_model(family: Family) -> None:
    inputs = family.make(MIXED, "left")
    with torch.no_grad():
        bare = family.model(**inputs).logits
    words = answer(family, inputs)
    pruner = build_pruner("fastv", stages=((first_layer(family), 10_000),))
    text = text_of(family, inputs)
    assert logits_of(family, inputs, pruner)[text].equal(bare[text])
    with pruner(family.model):
        assert answer(family, inputs).equal(words)


# ------------------------------------------------------------------------------- what pruners see


@pytest.mark.covering(2)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["last", "text", "visual"])
@pytest.mark.parametrize("when", ["before", "coming"])
def test_attention_is_that_of_the_layers(family: Family, kind: str, when: str) -> None:
    inputs, layer = family.make(MIXED, "left"), 2
    block = layer - (when == "before")
    found: dict[tuple[int, int], Tensor] = {}
    shown: list[View] = []

    def look(view: View) -> list[list[list[int]]]:
        shown.append(view)
        return view.images

    Masked(family.model, {layer: look}).logits(inputs)
    view = shown[0]
    weights = (view.weights if when == "before" else view.coming()).mean(dim=1)  # [B, L, L]
    pruner = Layered(stages=((layer, 5),), wants=LayerNeeds(attention=((block, kind),)))
    logits_of(family, inputs, pruner)
    for tokens in pruner.seen:
        found |= {(tokens.num_tokens, i): v for i, v in enumerate(tokens.attention[block, kind])}
    counters: dict[int, int] = {}
    for row, images in enumerate(view.images):
        for columns in images:
            number = counters.get(len(columns), 0)
            counters[len(columns)] = number + 1
            behind = text_of(family, inputs)[row].nonzero()[:, 0].tolist()
            text = [c for c in behind if c > columns[-1]]
            if kind == "visual":
                continue  # without the mask of the layer: below
            rows = behind[-1:] if kind == "last" else text
            expected = weights[row][rows].mean(dim=0)[columns]
            assert_close(found[len(columns), number], expected, 1e-5)
    assert len(found) == sum(counters.values()) == 3
    if kind == "visual":
        assert all(torch.isclose(v.sum(), torch.tensor(1.0)) for v in found.values())


def test_attention_of_tokens_among_each_other(llava: Family) -> None:
    """Softmax over the image's own keys, whatever their order: by hand from queries and keys."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inputs = llava.make(ONE, "left")
    caught: dict[str, Any] = {}
    layer = llava.model.model.language_model.layers[0]

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught["x"], caught["rope"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    handle = layer.self_attn.register_forward_pre_hook(catch, with_kwargs=True)
    pruner = Layered(stages=((1, 5),), wants=LayerNeeds(attention=((0, "visual"),)))
    logits_of(llava, inputs, pruner)
    handle.remove()
    attention = layer.self_attn
    heads = (*caught["x"].shape[:2], -1, attention.head_dim)
    queries = attention.q_proj(caught["x"]).view(heads).transpose(1, 2)
    keys = attention.k_proj(caught["x"]).view(heads).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, *caught["rope"])
    columns = (inputs["input_ids"][0] == 100).nonzero()[:, 0]
    queries = queries[0, :, columns]
    keys = keys[0, :, columns].repeat_interleave(len(queries) // keys.shape[1], dim=0)
    weights = (queries @ keys.transpose(1, 2) * attention.scaling).softmax(dim=-1)
    expected = weights.mean(dim=(0, 1))
    assert_close(pruner.seen[0].attention[0, "visual"][0], expected, 1e-5)


def test_raters_choose_whose_attention_counts(llava: Family) -> None:
    inputs = llava.make(ONE, "left")
    views: list[View] = []
    Masked(llava.model, {1: lambda view: views.append(view) or view.images}).logits(inputs)
    pruner = Layered(stages=((1, 5),), wants=LayerNeeds(attention=((0, "text"),)))
    embedded: list[LayerTokens] = []

    def raters(tokens: LayerTokens) -> Tensor:
        embedded.append(tokens)
        return torch.tensor([[True, False, True, False]])

    pruner.raters = raters  # type: ignore[method-assign]
    logits_of(llava, inputs, pruner)
    rows, columns = [views[0].text[0][0], views[0].text[0][2]], views[0].images[0][0]
    expected = views[0].weights[0].mean(dim=0)[rows][:, columns].mean(dim=0)
    assert_close(pruner.seen[0].attention[0, "text"][0], expected, 1e-5)
    words = inputs["input_ids"][0, views[0].text[0]]
    embed = llava.model.get_input_embeddings()
    assert embedded[0].text[0].equal(embed(words))


def test_hidden_states_keys_norms_and_text(llava: Family) -> None:
    inputs = llava.make(MIXED, "left")
    views: list[View] = []
    masked = Masked(llava.model, {2: lambda view: views.append(view) or view.images})
    masked.logits(inputs)
    wants = LayerNeeds(keys=(1,), text=True, normed=("final", "layer"))
    pruner = Layered(stages=((2, 5),), wants=wants)
    logits_of(llava, inputs, pruner)
    (tokens,) = pruner.seen
    columns = [(row, c) for row, images in enumerate(views[0].images) for c in images]
    hidden = torch.stack([views[0].hidden[row, c] for row, c in columns])
    assert_close(tokens.features, hidden, 1e-5)
    model = llava.model.model.language_model
    assert_close(tokens.normed["final"], model.norm(hidden), 1e-5)
    assert_close(tokens.normed["layer"], model.layers[2].input_layernorm(hidden), 1e-5)
    assert tokens.keys[1].shape == (3, 16, 2 * 12)
    assert tokens.num_heads == 2
    for image, (row, own) in enumerate(columns):
        real = tokens.text_valid[image]
        later = [c for c in text_of(llava, inputs)[row].nonzero()[:, 0].tolist() if c > own[-1]]
        assert_close(tokens.text[image][real], views[0].hidden[row, later], 1e-5)
        assert tokens.text_keys[1].shape[:2] == tokens.text.shape[:2]
    assert tokens.places.equal(torch.arange(16).repeat(3, 1))


# ------------------------------------------------------------------------ merging, ragged, stages


def test_mixtures_stand_in_the_places_of_what_stays(llava: Family) -> None:
    inputs = llava.make(ONE, "left")
    views: list[View] = []
    Masked(llava.model, {1: lambda view: views.append(view) or view.images}).logits(inputs)
    merge = torch.zeros(1, 3, 17)
    merge[0, 0, 1 + 2] = 1
    merge[0, 1, [1 + 8, 1 + 9]] = 0.5
    merge[0, 2, 1 + 5] = 1
    anchors = torch.tensor([[2, 9, 5]])
    chosen = Selection(torch.tensor([[2, 5, 9]]), merge=merge, anchors=anchors)
    caught: list[Tensor] = []
    layer = llava.model.model.language_model.layers[1]
    own = views[0].images[0][0]
    states = views[0].hidden[0, own]
    mixed = torch.stack([states[2], (states[8] + states[9]) / 2, states[5]])
    for pruner, rows in ((Renumbering, [0, 1, 2]), (Layered, [0, 2, 1])):
        cut = pruner(
            stages=((1, 3), (2, 3)),
            choose=lambda tokens, layer, _: chosen if layer == 1 else every_other(tokens, 3),
        )

        def catch(module: Any, args: Any, kwargs: Any) -> None:
            caught.append(kwargs["hidden_states"])

        handle = layer.self_attn.register_forward_pre_hook(catch, with_kwargs=True)
        logits_of(llava, inputs, cut)
        handle.remove()
        seen = caught[-1][0, own[0] : own[0] + 3]
        assert_close(seen, layer.input_layernorm(mixed[rows]), 1e-5)
        assert cut.seen[1].places.tolist() == [[[2, 9, 5][row] for row in rows]]


def test_images_that_keep_different_numbers(llava: Family) -> None:
    """As where a method lets go of all tokens of an image."""
    inputs = llava.make(MIXED, "left")
    valid = torch.tensor([[True] * 4, [False] * 4, [True, True, False, False]])
    keep = torch.tensor([[1, 3, 5, 7]]).repeat(3, 1)
    pruner = Layered(stages=((2, 4),), choose=lambda *_: Selection(keep, valid))

    def by_hand(view: View) -> list[list[list[int]]]:
        counts = iter([4, 0, 2])
        return [[image[1:8:2][: next(counts)] for image in images] for images in view.images]

    expected, text, prompts = Masked(llava.model, {2: by_hand}), text_of(llava, inputs), []
    actual = logits_of(llava, inputs, pruner, on_prune=prompts.append)
    assert_close(actual[text], expected.logits(inputs)[text], 1e-5)
    assert prompts[0].summary()["layers"] == [{"layer": 2, "visual_tokens_kept": [4, 0, 2]}]
    with pruner(llava.model):
        assert answer(llava, inputs).equal(expected.greedy(inputs, NUM_NEW))


def test_behind_a_pruner_of_the_input(llava: Family) -> None:
    """Compose: 8 tokens reach the language model, 3 of them its layers from 1 on."""
    inputs = llava.make(MIXED, "left")
    first = Scripted(choose=lambda tokens: every_other(tokens, 8))
    both = ocvtp.Compose([build_pruner("fastv", stages=((1, 3),)), first])
    prompts: list[Any] = []
    with both(llava.model, positions="original", on_prune=prompts.append):
        words = answer(llava, inputs)
    stages = {0: every_other_by_hand(8), 1: last_row(lambda size: 3)}
    assert words.equal(Masked(llava.model, stages).greedy(inputs, NUM_NEW))
    assert prompts[0].summary()["visual_tokens_kept"] == [8, 8, 8]
    assert prompts[0].summary()["layers"] == [{"layer": 1, "visual_tokens_kept": [3, 3, 3]}]


def test_what_the_tower_said_of_each_token(family: Family) -> None:
    """`tower` and `places` lead from what is left to what it was."""
    inputs, layer = family.make(MIXED, "left"), first_layer(family)

    class Looking(Layered):
        tower_needs = ocvtp.Needs(projected=True)

    first = Scripted(choose=lambda tokens: every_other(tokens, 7))
    inside = Looking(stages=((layer, 5),))
    with ocvtp.Compose([first, inside])(family.model), torch.no_grad():
        family.model(**inputs)
    seen = 0
    for tokens in inside.seen:
        is_token = tokens.places >= 0
        assert is_token.sum(dim=1).tolist() == [7] * len(is_token)
        assert tokens.tower.projected.shape[0] == tokens.batch_size
        order = tokens.places.masked_fill(~is_token, 10**6).sort(dim=1).values[:, :7]
        assert order.equal(torch.arange(1, 14, 2).repeat(len(order), 1))
        seen += len(order)
    assert seen == 3


# ------------------------------------------------------------------------------------- generating


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    ],
    ids=["beams", "several beams", "samples"],
)
@pytest.mark.parametrize("kind", [Layered, Renumbering])
def test_beams_and_samples(llava: Family, settings: Any, kind: Any) -> None:
    """Against the bare model made to look away from the columns in front of every layer.

    One image a row: of several, bare transformers 5.17 mixes up the beams.
    """
    inputs = llava.make(ROWS, "left")
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "use_cache": False} | settings
    expected = Masked(llava.model, TWICE, renumber=kind is Renumbering).generate(inputs, settings)
    torch.manual_seed(0)
    with kind()(llava.model), torch.no_grad():
        actual = llava.model.generate(**inputs, **settings | {"use_cache": True})
    assert actual.equal(expected)


@pytest.mark.parametrize("kind", [Layered, Renumbering])
def test_prompt_lookup(llava: Family, kind: Any) -> None:
    """Drafts are read beside the prompt, and taken out of the cache again."""
    for rows in (ONE, [(9, IMG, 30)]):
        inputs = llava.make(rows, "left")
        with kind()(llava.model):
            plain = answer(llava, inputs, max_new_tokens=12)
            assert answer(llava, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3).equal(plain)


@pytest.mark.covering(2)
@pytest.mark.slow
@pytest.mark.parametrize("kind", [Layered, Renumbering])
@pytest.mark.parametrize("copied", [False, True])
def test_a_later_turn(family: Family, kind: Any, copied: bool) -> None:
    layer = first_layer(family)
    stages = ((1, 7), (2, 4)) if layer == 1 else ((2, 4),)
    inputs = family.make(ROWS, "left")
    pruner = kind(stages=stages)
    with pruner(family.model), torch.no_grad():
        settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [100]}
        first = family.model.generate(**inputs, **settings, return_dict_in_generate=True)
        cache = deepcopy(first.past_key_values) if copied else first.past_key_values
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]] * 3)], dim=1)
        mask = torch.ones_like(more)
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        turn = {"input_ids": more, "attention_mask": mask, "past_key_values": cache}
        second = family.model.generate(**turn, max_new_tokens=NUM_NEW, do_sample=False)
    renumber = kind is Renumbering and not family.host.startswith("qwen")
    chosen = TWICE if layer == 1 else {2: every_other_by_hand(4)}
    masked = Masked(family.model, chosen, renumber)
    said = more[:, inputs["input_ids"].shape[1] :]
    expected = masked.greedy(inputs, NUM_NEW, said)
    assert second[:, more.shape[1] :].equal(expected)


def test_a_cache_that_is_emptied_and_used_again(llava: Family) -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    with Layered()(llava.model), torch.no_grad():
        llava.model(**llava.make(ONE, "left"), past_key_values=cache)
        assert cache.get_seq_length(1) < cache.get_seq_length(0)
        cache.crop(-cache.get_seq_length())
        text = llava.make([(6,)], "left")
        again = llava.model(**text, past_key_values=cache).logits
    with torch.no_grad():
        assert_close(again, llava.model(**text).logits)


def test_a_hand_written_loop(llava: Family) -> None:
    inputs = llava.make(MIXED, "left")
    with Renumbering()(llava.model), torch.no_grad():
        expected = answer(llava, inputs)
        output = llava.model(**inputs, use_cache=True)
        words = [output.logits[:, -1:].argmax(dim=-1)]
        mask = inputs["attention_mask"]
        for _ in range(NUM_NEW - 1):
            mask = torch.cat([mask, torch.ones_like(words[-1])], dim=1)
            output = llava.model(
                input_ids=words[-1],
                attention_mask=mask,
                past_key_values=output.past_key_values,
            )
            words.append(output.logits[:, -1:].argmax(dim=-1))
    assert torch.cat(words, dim=1).equal(expected)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_step_that_was_interrupted_is_over(llava: Family, layer: int) -> None:
    """After Ctrl-C torch runs no hooks, not even those that it always runs."""
    language_model = llava.model.model.language_model
    text = llava.make([(6,)], "left")
    with torch.no_grad():
        expected = llava.model(**text).logits

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with Renumbering()(llava.model), torch.no_grad():
        output = llava.model(**llava.make(ONE, "left"), use_cache=True)
        step = {"input_ids": text["input_ids"][:, :1], "past_key_values": output.past_key_values}
        hook = language_model.layers[layer].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            llava.model(**step)
        hook.remove()
        assert torch.equal(llava.model(**text).logits, expected)


CHANGES = [
    pytest.param("fastv", ((1, 5),), ((2, 4),), id="later"),
    pytest.param("fastv", ((2, 5),), ((1, 4),), id="earlier"),
    pytest.param("pyramiddrop", ((2, 4),), ((1, 7), (2, 4)), id="more"),
    pytest.param("pyramiddrop", ((1, 7), (2, 4)), ((2, 4),), id="fewer"),
    pytest.param("sparsevlm", ((2, 4),), ((1, 7), (2, 4)), id="with raters"),
]


@pytest.mark.parametrize(("name", "first", "then"), CHANGES)
def test_settings_that_are_changed_while_it_is_attached(
    llava: Family, name: str, first: Any, then: Any
) -> None:
    inputs = llava.make(ONE, "left")
    pruner: Any = build_pruner(name, stages=first)
    with pruner(llava.model), torch.no_grad():
        llava.model(**inputs)
        pruner.stages = then
        found = llava.model(**inputs).logits
    assert torch.equal(found, logits_of(llava, inputs, build_pruner(name, stages=then)))


def test_labels_and_gradients(llava: Family) -> None:
    """The loss is that of what is left: what follows an image is predicted from its last token."""
    model, inputs = deepcopy(llava.model), llava.make(MIXED, "left")
    labels = inputs["input_ids"].masked_fill(~text_of(llava, inputs), -100)
    with Layered()(model):
        output = model(**inputs, labels=labels)
        output.loss.backward()
    gradient = model.model.language_model.layers[2].self_attn.q_proj.weight.grad
    assert gradient.abs().max() > 0
    states = output.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(states, labels[:, 1:].flatten())
    assert_close(output.loss.detach(), expected.detach())


def test_bf16_and_autocast(llava: Family) -> None:
    model, inputs = deepcopy(llava.model).bfloat16(), llava.make(MIXED, "left")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    wants = LayerNeeds(attention=((1, "last"), (1, "text"), (2, "visual")), keys=(1,))
    pruner = Renumbering(stages=((2, 4),), wants=wants)
    with pruner(model), torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert all(v.dtype == torch.float32 for v in pruner.seen[0].attention.values())


@pytest.mark.slow
def test_threads_do_not_see_each_other(llava: Family) -> None:
    from concurrent.futures import ThreadPoolExecutor

    batches = [llava.make(rows, "left") for rows in (ONE, MIXED, ROWS)] * 4
    with Layered()(llava.model):
        expected = [answer(llava, inputs) for inputs in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: answer(llava, inputs), batches))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_peft(llava: Family) -> None:
    import peft

    inputs = llava.make(MIXED, "left")
    pruner = build_pruner("fastv", stages=((1, 5),))
    with pruner(llava.model):
        expected = answer(llava, inputs)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=2)
    wrapped = peft.get_peft_model(deepcopy(llava.model), config)
    with pruner(wrapped):
        assert answer(llava, inputs, wrapped).equal(expected)


# ---------------------------------------------------------------------------------------- refusals


def refused(family: Family, message: str, pruner: Any = None, model: Any = None) -> None:
    with pytest.raises(ValueError, match=message):
        ocvtp.attach(family.model if model is None else model, pruner or Layered()).remove()


def test_layers_that_do_not_exist(llava: Family) -> None:
    message = "drops tokens before layers 3, but the language model has 3; pass stages="
    refused(llava, message, build_pruner("fastv", stages=((3, 5),)))


def test_language_models_that_cannot(llava: Family) -> None:
    model = deepcopy(llava.model)
    model.model.language_model.layers[1].compile(backend="eager")
    refused(llava, "whose layers are compiled: hooks on them would be ignored", model=model)
    model = deepcopy(llava.model)
    model.model.language_model.config.sliding_window = 8
    refused(llava, "look no further back than 8 columns", model=model)
    qwen3 = next(family for family in FAMILIES if family.host == "qwen3_vl")
    refused(qwen3, "until layer 2 the language model adds to them what the tower has")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cache": False}, "only with a cache; leave use_cache=False out"),
        ({"cache_implementation": "static"}, "a static cache cannot hold; leave cache_impl"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8: .* read it at once; leave it out"),
    ],
    ids=["no cache", "static", "chunks"],
)
def test_settings_of_generate(llava: Family, settings: Any, message: str) -> None:
    model = deepcopy(llava.model)  # transformers notes down the length of a static cache
    with Layered()(model), pytest.raises(ValueError, match=message):
        answer(llava, llava.make(ONE, "left"), model, **settings)


def test_a_forward_without_a_cache(llava: Family) -> None:
    with Layered()(llava.model), pytest.raises(ValueError, match="only with a cache"):
        llava.model(**llava.make(ONE, "left"), use_cache=False)


def test_an_average_that_cannot_be_had(llava: Family) -> None:
    pruner = build_pruner("fastv", num_keep=5)
    message = "the first 2 of 3 layers read all 16. Pass num_keep=11 or more"
    with pruner(llava.model), pytest.raises(ValueError, match=message):
        llava.model(**llava.make(ONE, "left"))


def test_references_choose_as_the_library_does() -> None:
    tokens = VisualTokens(torch.zeros(1, 6, 2), (2, 3), attention={(0, "last"): torch.rand(1, 6)})
    scores = tokens.attention[0, "last"]
    assert top_k(scores, 3).keep_indices[0].tolist() == best(scores[0], list(range(6)), 3)


def test_offloaded_layers(llava: Family, tmp_path: Path) -> None:
    """Their weights are read in front of a layer, before accelerate brings them."""
    inputs = llava.make(MIXED, "left")
    wants = LayerNeeds(attention=((2, "last"), (1, "text")), keys=(1,), normed=("layer", "final"))
    with Layered(stages=((2, 4),), wants=wants)(llava.model):
        expected = answer(llava, inputs)
    llava.model.save_pretrained(tmp_path)
    model = type(llava.model).from_pretrained(
        tmp_path,
        device_map={"model": "disk", "lm_head": "cpu"},
        offload_folder=str(tmp_path / "offloaded"),
    )
    model.generation_config = llava.model.generation_config
    with Layered(stages=((2, 4),), wants=wants)(model):
        assert answer(llava, inputs, model).equal(expected)
