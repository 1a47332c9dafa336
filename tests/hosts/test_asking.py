"""Questions with answers are what the model itself would read, from any layer on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from asked_questions import HOSTS, SAID, questions, tiny
from reference import fingerprint
from torch import Tensor

from ocvtp import Pruner
from ocvtp.hosts.asking import (
    Asked,
    Asker,
    after_column,
    attention_rows,
    before_layer,
    drop,
    read,
)
from ocvtp.hosts.attach import attached
from ocvtp.hosts.gating import checkpointed
from ocvtp.structures import Needs, Selection

pytestmark = pytest.mark.sampled(3)

TEXT = Needs(projected=True, text=True)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
ANOTHER_BATCH = {"atol": 1e-4, "rtol": 1e-4}
"""Of logits after a tower that was given another batch, which some processors round otherwise."""


@dataclass(kw_only=True, eq=False)
class These(Pruner):
    """Keeps what it is told."""

    keep: Tensor | None = None

    name: ClassVar[str] = "these"
    stage: ClassVar[Any] = "llm_input"

    @property
    def needs(self) -> Needs:
        return Needs()

    def __post_init__(self) -> None: ...

    def select(self, tokens: Any) -> Selection:
        assert self.keep is not None
        return selection_of(self.keep)

    _select = select


def selection_of(keep: Tensor) -> Selection:
    counts = keep.sum(dim=1, keepdim=True)
    order = (~keep).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
    valid = torch.arange(order.shape[1]) < counts
    return Selection(order, None if bool(valid.all()) else valid)


def some(asked: Asked, seed: int = 0, share: float = 0.4) -> Tensor:
    """[B, N] tokens, not equally many of each image, at least one."""
    drawn = torch.rand(asked.columns.shape, generator=torch.Generator().manual_seed(seed))
    keep = (drawn < share) & (asked.columns >= 0)
    keep[:, 1] = True
    return keep


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = (labels[:, 1:] >= 0).nonzero().unbind(dim=1)
    return rows, columns


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", HOSTS)
def test_answers_are_predicted_as_by_the_model_itself(name: str, side: str) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name, side=side)
    with Asker(model, processor) as asker, torch.no_grad():
        asked = asker.ask(inputs, answers)
        answered = read(asker.host, asked)
        rows, columns = predicting(torch.where(answers, inputs["input_ids"], -100))
        expected = model(**inputs).logits[rows, columns]
    torch.testing.assert_close(answered.logits, expected, **TOLERANCE)
    assert torch.equal(answered.targets, inputs["input_ids"][rows, columns + 1])
    assert torch.equal(answered.owner, rows)
    assert answered.owner.bincount().tolist() == [len(answer) for _, answer in SAID]
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(answered.states), answered.logits)


@pytest.mark.parametrize("name", HOSTS)
def test_columns_are_those_of_the_projected_tokens(name: str) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name)
    with Asker(model, processor, TEXT) as asker:
        asked = asker.ask(inputs, answers)
    there = asked.columns >= 0
    assert torch.equal(there, asked.tokens.real)
    owners = there.nonzero()[:, 0]
    found = asked.embeddings[owners, asked.columns[there]]
    torch.testing.assert_close(found, asked.tokens.projected[there])
    placeholders = inputs["input_ids"] == asker.host.image_token_id
    assert torch.equal(asked.image, placeholders)
    alone, text = asked.text(), (asked.labels < 0) & asked.mask & ~asked.image
    after = text & (torch.arange(text.shape[1]) > placeholders.long().cumsum(1).argmax(1)[:, None])
    assert [row[ok].tolist() for row, ok in zip(*alone, strict=True)] == [
        row.nonzero()[:, 0].tolist() for row in after
    ]
    assert torch.equal(asked.last, (asked.labels >= 0).long().argmax(dim=1) - 1)


@pytest.mark.parametrize("name", HOSTS)
def test_a_scorer_does_not_read_the_answer(name: str) -> None:
    model, processor = tiny(name)
    found = []
    for answer in ("A dog.", "A cat."):
        said = [(question, answer) for question, _ in SAID]
        with Asker(model, processor, TEXT) as asker:
            found.append(asker.ask(*questions(name, said)))
    one, other = found
    assert not torch.equal(one.embeddings, other.embeddings)
    assert torch.equal(one.tokens.text, other.tokens.text)
    assert one.tokens.text_valid.sum(dim=1).tolist() == [len(question) for question, _ in SAID]
    for raters in ("text", "last"):
        rows, others = (attention_rows(asker.host, asked, [1], raters)[1] for asked in found)
        torch.testing.assert_close(rows, others)


@pytest.mark.parametrize("name", HOSTS)
def test_a_row_is_read_alone_as_in_a_batch(name: str) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name)
    single, alone = questions(name, SAID[:1])
    with Asker(model, processor, TEXT) as asker, torch.no_grad():
        asked, other = asker.ask(inputs, answers), asker.ask(single, alone)
        mine = read(asker.host, asked, layers=[2])
        theirs = read(asker.host, other, layers=[2])
    mine_alone = mine.logits[mine.owner == 0]
    torch.testing.assert_close(mine_alone, theirs.logits, **TOLERANCE)
    count = int(other.tokens.real.sum())
    torch.testing.assert_close(mine.attention[2][0, :count], theirs.attention[2][0, :count])
    assert int(mine.attention[2][0, count:].count_nonzero()) == 0


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("name", HOSTS)
def test_dropped_tokens_are_as_if_a_pruner_had_dropped_them(name: str, positions: Any) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name)
    with Asker(model, processor) as asker, torch.no_grad():
        asked = asker.ask(inputs, answers)
        keep = some(asked)
        short = drop(asked, keep, positions)
        answered = read(asker.host, short)
    labels = torch.where(answers, inputs["input_ids"], -100)
    with attached(model, These(keep=keep), positions=positions), torch.no_grad():
        output = model(**inputs, labels=labels)
    rows, columns = predicting(output.labels)
    expected = output.logits[rows, columns]
    torch.testing.assert_close(answered.logits, expected, **TOLERANCE)
    assert short.embeddings.shape[1] < asked.embeddings.shape[1]
    assert torch.equal(short.columns >= 0, keep)
    owners = keep.nonzero()[:, 0]
    places = asked.embeddings[owners, asked.columns[keep]]
    assert torch.equal(short.embeddings[owners, short.columns[keep]], places)


def test_gradients_run_through_what_is_left() -> None:
    model, processor = tiny("llava")
    with Asker(model, processor) as asker:
        asked = asker.ask(*questions("llava"))
    weights = torch.ones(asked.embeddings.shape[:2], requires_grad=True)
    keep = some(asked)
    answered = read(asker.host, drop(asked.weighted(weights), keep))
    answered.logits.square().sum().backward()
    there = asked.columns.clamp(min=0)
    assert torch.equal(weights.grad.gather(1, there) != 0, keep)


@pytest.mark.parametrize("name", HOSTS)
def test_attention_is_what_the_model_attends_to(name: str) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name)
    own = model.model.language_model.config._attn_implementation
    with Asker(model, processor) as asker, torch.no_grad():
        asked = asker.ask(inputs, answers)
        runs = []
        hooks = [layer.register_forward_hook(lambda *_: runs.append(1))
                 for layer in asker.host.language_model.layers]  # fmt: skip
        text = attention_rows(asker.host, asked, [0, 2])
        last = attention_rows(asker.host, asked, [1], "last")
        assert len(runs) == 3, "two layers below layer 2, one below layer 1"
        for hook in hooks:
            hook.remove()
        while_reading = read(asker.host, asked, layers=[0, 1, 2]).attention
        model.set_attn_implementation("eager")
        try:
            whole = model(**inputs, output_attentions=True).attentions
        finally:
            model.set_attn_implementation(own)
    for number, rows in (*text.items(), *last.items()):
        shares = whole[number].float().mean(dim=1)  # [B, L, L]
        columns, valid = asked.text()
        if number == 1:
            columns, valid = asked.last[:, None], torch.ones(len(shares), 1, dtype=torch.bool)
        for row, found in enumerate(rows):
            real = asked.columns[row] >= 0
            expected = shares[row, columns[row][valid[row]]].mean(dim=0)[asked.columns[row][real]]
            torch.testing.assert_close(found[real], expected, **TOLERANCE)
            assert not found[~real].any()
        if number != 1:
            torch.testing.assert_close(while_reading[number], rows)


@pytest.mark.parametrize("name", HOSTS)
def test_what_a_scorer_reads_of_the_attention_before_a_layer(name: str) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name)
    own = model.model.language_model.config._attn_implementation
    keys: list[Any] = [(1, "last_heads"), (1, "last"), (2, "last_heads"), (2, "text")]
    with Asker(model, processor) as asker, torch.no_grad():
        asked = asker.ask(inputs, answers)
        found = before_layer(asker.host, asked, 2, keys)
        assert not before_layer(asker.host, asked, 2).tokens.attention
        model.set_attn_implementation("eager")
        try:
            whole = model(**inputs, output_attentions=True).attentions
        finally:
            model.set_attn_implementation(own)
    assert list(found.tokens.attention) == keys
    text, counts = asked.text()
    for key, rows in found.tokens.attention.items():
        for row, values in enumerate(rows):
            real = found.columns[row] >= 0
            asking = text[row][counts[row]] if key[1] == "text" else asked.last[row][None]
            expected = whole[key[0]].float()[row][:, asking][:, :, found.columns[row][real]]
            expected = expected.mean(dim=1).T  # [N, H]
            if key[1] != "last_heads":
                expected = expected.mean(dim=1)
            torch.testing.assert_close(values[real], expected, **TOLERANCE)
            assert not values[~real].any()


@pytest.mark.parametrize("name", HOSTS)
def test_a_column_after_the_prompt_is_as_one_that_the_model_reads_there(name: str) -> None:
    """Put into the prompt of one question; with others in a batch it changes nothing."""
    model, processor = tiny(name)
    language = model.model.language_model
    width, own = language.config.hidden_size, language.config._attn_implementation
    drawn = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    vectors = (0.3 * drawn).requires_grad_()
    with Asker(model, processor) as asker:
        asked = asker.ask(*questions(name))
        found = after_column(asker.host, asked, vectors)
        inside = before_layer(asker.host, asked, 2, column=2)
        rows = [inside.tokens.column(vectors[: block + 1]) for block in (0, 1, 2)]
        expected = read(asker.host, asked)
        assert after_column(asker.host, inside, vectors).logits.equal(found.logits)
    assert read(asker.host, asked).logits.equal(expected.logits)
    found.logits.square().sum().backward()
    assert (vectors.grad.abs().amax(dim=1) > 0).all()
    grads = torch.autograd.grad(rows[2].square().sum(), vectors)[0]
    assert (grads.abs().amax(dim=1) > 0).all()
    assert all(weight.grad is None for weight in model.parameters())
    for row in range(2):
        logits, attention = literally(model, asked, row, vectors.detach())
        told = found.logits[found.owner == row]  # by another kernel
        torch.testing.assert_close(told, logits, atol=5e-5, rtol=1e-4)
        real = inside.columns[row] >= 0
        for block, values in enumerate(rows):
            wanted = attention[block][:, inside.columns[row][real]].T
            torch.testing.assert_close(values[row][real], wanted, **TOLERANCE)
            assert not values[row][~real].any()
    assert language.config._attn_implementation == own


def literally(model: Any, asked: Asked, row: int, vectors: Tensor) -> tuple[Tensor, Any]:
    """Logits of a row's answer [T, V], and attention [H, L] of the column, that stands in it."""
    language, at = model.model.language_model, int(asked.last[row]) + 1
    own = language.config._attn_implementation
    columns = asked.mask[row].nonzero()[:, 0]

    def with_one(values: Tensor, more: Tensor) -> Tensor:
        return torch.cat([values[..., :at], more, values[..., at:]], dim=-1)

    numbers = asked.positions
    if numbers is None:
        numbers = torch.arange(asked.mask.shape[1]).expand_as(asked.mask)
    numbers = numbers[..., row, columns]
    more = numbers[..., at - 1 : at] + 1
    numbers = torch.cat([numbers[..., :at], more, numbers[..., at:] + 1], dim=-1)
    embeddings = with_one(asked.embeddings[row, columns].T, vectors[:1].T).T[None]
    hooks = []
    for layer, vector in zip(language.layers[1:3], vectors[1:], strict=True):

        def add(layer: Any, args: Any, kwargs: Any, vector: Tensor = vector) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[:, at] += vector
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        hooks.append(layer.register_forward_pre_hook(add, with_kwargs=True))
    arguments = {} if asked.deepstack is None else deepstack_of(asked, row, at)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = language(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(1, embeddings.shape[1]).long(),
                position_ids=numbers[..., None, :],
                output_attentions=True,
                **arguments,
            )
    finally:
        model.set_attn_implementation(own)
        for hook in hooks:
            hook.remove()
    labels = asked.labels[row, columns]
    predicting_columns = (labels >= 0).nonzero()[:, 0]  # each a column later now
    states = output.last_hidden_state[0, predicting_columns]
    return model.get_output_embeddings()(states), [a[0, :, at] for a in output.attentions]


def deepstack_of(asked: Asked, row: int, at: int) -> dict[str, Any]:
    assert asked.deepstack is not None
    places = asked.deepstack.places[row][asked.mask[row]]
    places = torch.cat([places[:at], places.new_full((1,), -1), places[at:]])
    return replace(asked.deepstack, places=places[None]).arguments()


def test_attention_that_no_question_has_is_refused() -> None:
    model, processor = tiny(HOSTS[0])
    with Asker(model, processor) as asker:
        asked = asker.ask(*questions(HOSTS[0]))
        for kind in ("visual", "cls"):
            with pytest.raises(ValueError, match=rf"attention '{kind}' is not read .* last_heads"):
                before_layer(asker.host, asked, 1, [(1, kind)])
        with pytest.raises(ValueError, match="does not run here"):
            before_layer(asker.host, asked, 1, [(9, "last")])
        column = before_layer(asker.host, asked, 1, column=1).tokens.column
        assert column is not None
        with pytest.raises(ValueError, match="is 7 wide, and this language model 96; pass a check"):
            column(torch.zeros(2, 7))
        with (
            checkpointed(model),
            pytest.raises(ValueError, match="do not keep; leave checkpointing out"),
        ):
            before_layer(asker.host, asked, 1, column=1)


@pytest.mark.parametrize("name", HOSTS)
def test_reading_goes_on_from_a_layer(name: str) -> None:
    model, processor = tiny(name)
    inputs, answers = questions(name)
    with Asker(model, processor) as asker, torch.no_grad():
        asked = asker.ask(inputs, answers)
        inside = before_layer(asker.host, asked, 2)
        expected = read(asker.host, asked)
        found = read(asker.host, inside, layers=[2])
        given: list[Tensor] = []
        layer = model.model.language_model.layers[2]
        hook = layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        model(**inputs)
        hook.remove()
    (whole,) = given
    torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
    tokens: Any = inside.tokens
    for row in range(len(whole)):
        own = whole[row, inputs["input_ids"][row] == asker.host.image_token_id]
        real = tokens.real[row]
        torch.testing.assert_close(tokens.features[row][real], own, **TOLERANCE)
        places = tokens.places[row][real]
        assert places[places >= 0].tolist() == [*range(int(asked.tokens.real[row].sum()))]
    assert tokens.projected is tokens.features
    assert tokens.text.shape[:2] == tokens.text_valid.shape
    again = read(asker.host, asked, layers=[2])
    found_rows = found.attention[2][tokens.places >= 0]
    torch.testing.assert_close(found_rows, again.attention[2][asked.tokens.real], **TOLERANCE)
    assert (
        len(model.model.language_model.layers) == model.config.get_text_config().num_hidden_layers
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", HOSTS)
def test_an_image_of_several_questions_is_encoded_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny(name)
    said = (*SAID, ("Why?", "No."), ("Who is it?", "You."))
    inputs, answers = questions(name, said, pictures=(0, 0, 1, 2, 2))
    with Asker(model, processor, TEXT) as asker, torch.no_grad():
        encode, given = asker.host.encode, list[Any]()
        monkeypatch.setattr(
            asker.host,
            "encode",
            lambda images, needs: given.append(images) or encode(images, needs),
        )
        asked = asker.ask(inputs, answers)
        monkeypatch.undo()
        answered = read(asker.host, asked, layers=[1])
        short = read(asker.host, drop(asked, some(asked)))
    (images,) = given
    counts = (inputs["input_ids"] == asker.host.image_token_id).sum(dim=1)
    share = counts[[0, 2, 3]].sum() / counts.sum()
    few, many = (len(some["pixel_values"]) for some in (images, inputs))
    assert few == 3 if many == 5 else few == many * share
    rows, columns = predicting(torch.where(answers, inputs["input_ids"], -100))
    with torch.no_grad():
        expected = model(**inputs).logits[rows, columns]
    torch.testing.assert_close(answered.logits, expected, **ANOTHER_BATCH)
    assert asked.tokens.text_valid.sum(dim=1).tolist() == [len(question) for question, _ in said]
    keep = some(asked)
    for row in range(len(said)):  # as if there were no others
        alone, own = questions(name, said[row : row + 1], pictures=[(0, 0, 1, 2, 2)[row]])
        with Asker(model, processor, TEXT) as asker, torch.no_grad():
            other = asker.ask(alone, own)
            count = other.columns.shape[1]
            mine = read(asker.host, drop(other, keep[row : row + 1, :count])).logits
            attention = read(asker.host, other, layers=[1]).attention[1]
        torch.testing.assert_close(short.logits[short.owner == row], mine, **ANOTHER_BATCH)
        torch.testing.assert_close(
            answered.attention[1][row, :count], attention[0], **ANOTHER_BATCH
        )
        text = other.tokens.text[0]
        torch.testing.assert_close(asked.tokens.text[row, : len(text)], text)


def test_repeated_questions_are_answered_alike() -> None:
    for name in ("llava", "qwen3-vl"):
        model, processor = tiny(name)
        with Asker(model, processor) as asker, torch.no_grad():
            asked = asker.ask(*questions(name))
            once, twice = read(asker.host, asked), read(asker.host, asked.repeat(2))
        for row in range(3):
            mine = once.logits[once.owner == row]
            for other in (2 * row, 2 * row + 1):
                torch.testing.assert_close(
                    twice.logits[twice.owner == other], mine, **ANOTHER_BATCH
                )


def test_nothing_stays_in_the_model() -> None:
    model, processor = tiny("qwen3-vl")
    inputs, answers = questions("qwen3-vl")
    with Asker(model, processor) as asker:  # the first call, in which transformers adds to it
        asked = asker.ask(inputs, answers)
        read(asker.host, asked)
    before, layers = fingerprint(model), model.model.language_model.layers
    asker = Asker(model, processor, TEXT)
    with asker:
        asked = asker.ask(inputs, answers)
        before_layer(asker.host, asked, 2)
        attention_rows(asker.host, asked, [1])
    hook = layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    for stops, more in (
        (read, {"layers": [2]}),
        (before_layer, {"layer": 2}),
        (attention_rows, {"layers": [2]}),
    ):
        with pytest.raises(ZeroDivisionError):
            stops(asker.host, asked, **more)
    hook.remove()
    assert dict(fingerprint(model).items() ^ before.items()) == {}
    assert model.model.language_model.layers is layers


def test_wrong_questions_are_refused() -> None:
    model, processor = tiny("llava")
    inputs, answers = questions("llava")
    asker = Asker(model, processor)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        asker.ask(inputs, answers)
    with asker:
        for wrong in (answers[:, 1:], answers.long()):
            with pytest.raises(ValueError, match="pass equal shapes, of torch.bool"):
                asker.ask(inputs, wrong)
        of_image = inputs["input_ids"] == asker.host.image_token_id
        for wrong in (of_image, inputs["attention_mask"] == 0, torch.arange(len(answers[0])) == 0):
            with pytest.raises(ValueError, match="True on tokens of answers alone"):
                asker.ask(inputs, answers | wrong)
        without = {k: v.clone() for k, v in inputs.items()}
        without["input_ids"][1][of_image[1]] = 5
        without["pixel_values"] = without["pixel_values"][[0, 2]]
        with pytest.raises(ValueError, match=r"\[1, 0, 1\] images; pass questions about one"):
            asker.ask(without, answers)
        asked = asker.ask(inputs, answers)
        for layers in ([3], [-1]):
            with pytest.raises(ValueError, match="does not run here; pass 0 to "):
                attention_rows(asker.host, asked, [layers[0] * 99])
        with pytest.raises(ValueError, match="raters='first'; pass one of text, last"):
            attention_rows(asker.host, asked, [0], "first")
        inside = before_layer(asker.host, asked, 1)
        with pytest.raises(ValueError, match="layer 0 of the language model does not run"):
            attention_rows(asker.host, inside, [0])
    model, processor = tiny("qwen3-vl")
    with Asker(model, processor) as asker:
        asked = asker.ask(*questions("qwen3-vl"))
        with pytest.raises(ValueError, match="pass a layer from there on"):
            before_layer(asker.host, asked, 0)
