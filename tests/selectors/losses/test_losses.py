"""What holds of every loss, and what settings may say of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ocvtp.selectors.losses import (
    KL,
    Loss,
    LossValue,
    Step,
    build_losses,
    list_losses,
    register_loss,
    weighed,
)
from ocvtp.selectors.losses.base import LOSSES, mean_of_rows
from tests.pruners.test_contract import NoSync
from tests.selectors.losses.steps import COUNTS, draw

SETTINGS = {
    "kl": [{}, {"temperature": 2.0}],
    "ce": [{}],
    "column_ce": [{}],
    "hidden": [{}],
    "attention": [{}, {"temperature": 4.0}, {"kind": "mse"}],
    "rank": [{}, {"kind": "spearman"}, {"kind": "listnet", "temperature": 0.5}],
    "mask": [{}, {"threshold": 0.5}],
    "binary": [{}],
    "ratio": [{}],
    "reward": [{}, {"earned": "right"}],
    "kept": [{}, {"restored": "projected", "weights": "cls", "standardize": False}],
}
CASES = [(name, given) for name, all_given in SETTINGS.items() for given in all_given]


def relaxation_of(name):
    return {"reward": "sample", "ratio": "gumbel_binary"}.get(name, "soft_topk")


def one(name, given):
    return build_losses({name: given})[0]


def graded(step):
    """What a loss may send a gradient to."""
    read = (step.scores, step.pruned_logits, step.pruned_states, step.column_logits)
    return [values for values in read if values is not None]


def test_all_are_known():
    assert set(SETTINGS) <= set(list_losses())


@pytest.mark.parametrize(("name", "given"), CASES)
def test_every_loss_is_a_value_of_each_row_with_a_finite_gradient(name, given):
    step = draw(relaxation=relaxation_of(name))
    loss = one(name, given)
    value = loss(step)
    assert value.values.shape == value.counts.shape == (len(COUNTS),)
    assert value.values.dtype == torch.float32
    assert value.counts[:2].all()
    assert (value.values[~value.counts] == 0).all()
    value.mean().backward()
    found = [t.grad for t in graded(step) if t.grad is not None]
    assert found
    assert all(grad.isfinite().all() for grad in found)
    assert any((grad != 0).any() for grad in found)
    assert step.scores.grad is None or (step.scores.grad[~step.real] == 0).all()


@pytest.mark.parametrize("name", ["attention", "rank"])
def test_what_attention_deposits_everywhere_is_divided_away(name):
    """A factor of each position changes nothing, and without one it does."""
    factor, kinds = torch.tensor([8.0, 1.0, 0.5, 3.0, 1.0, 0.1]), [{}, {"deposition": True}]
    if name == "attention":
        kinds.append({"deposition": True, "kind": "mse"})
    for given in kinds:
        loss, step = one(name, given), draw((6, 6, 6))
        mean = step.teacher[0].mean(dim=0)
        values = [
            loss(replace(step, teacher={0: step.teacher[0] * f}, deposition={0: mean * f})).values
            for f in (torch.ones(6), factor)
        ]
        assert torch.allclose(*values) == bool(given)
    with pytest.raises(ValueError, match=rf"loss '{name}' divides .* layer 0 .*supply deposition"):
        loss(step)
    with pytest.raises(ValueError, match=r"deposition=1; pass true or false"):
        one(name, {"deposition": 1})


@pytest.mark.parametrize(("name", "given"), CASES)
@pytest.mark.parametrize("most", [3, None])
def test_a_row_of_a_budget_of_its_own_is_as_where_all_have_it(name, given, most):
    counts = torch.tensor([3, 2, 1])
    loss, kind = one(name, given), relaxation_of(name)
    step = draw(num_keep=counts, relaxation=kind, most_kept=most)
    found = loss(step)
    found.mean().backward()
    for row, count in enumerate(counts.tolist()):
        alike = draw(num_keep=count, relaxation=kind)
        value = loss(alike)
        assert_close(found.values[row], value.values[row])
        value.mean().backward()
        for own, other in zip(graded(step), graded(alike), strict=True):
            if own.grad is not None and len(own) == len(counts):
                assert_close(own.grad[row], other.grad[row])


@pytest.mark.parametrize(("name", "given"), CASES)
@pytest.mark.parametrize("case", ["equal", "all kept", "one kept", "huge", "nothing known"])
def test_gradients_are_finite_at_the_edges(name, given, case):
    scores = {"equal": torch.zeros(3, 6), "huge": 1e4 * torch.ones(3, 6).cumsum(dim=1)}
    changes = {"scores": scores[case]} if case in scores else {}
    step = draw(
        relaxation=relaxation_of(name),
        num_keep={"all kept": 6, "one kept": 1}.get(case, 3),
        **changes,
    )
    if case == "nothing known":
        step = replace(
            step,
            teacher={0: torch.zeros(3, 6)},
            objects=torch.zeros(3, 6),
            reward=torch.zeros(3),
            full_states=torch.zeros(6, 4),
            tokens=replace(
                step.tokens, features=torch.zeros(3, 6, 5), projected=torch.zeros(3, 6, 4)
            ),
        )
    value = one(name, given)(step)
    assert value.values.isfinite().all()
    value.mean().backward()
    for tensor in graded(step):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    if case == "nothing known" and name in ("attention", "rank", "mask", "kept"):
        assert not value.counts.any()


def row(step, b):
    """One row of a step without padding, and without draws."""
    count = COUNTS[b]
    answers = step.owner == b
    tokens = replace(step.tokens.map(lambda t: t[b : b + 1, :count]), valid=None)
    changes = {
        name: getattr(step, name)[answers]
        for name in (
            "full_logits",
            "pruned_logits",
            "targets",
            "full_states",
            "pruned_states",
            "column_logits",
        )
    }
    cut = {name: getattr(step, name)[b : b + 1, :count] for name in ("scores", "objects")}
    gates = step.gates
    return replace(
        step,
        tokens=tokens,
        owner=torch.zeros(int(answers.sum()), dtype=torch.long),
        teacher={0: step.teacher[0][b : b + 1, :count]},
        has_objects=step.has_objects[b : b + 1],
        gates=replace(
            gates,
            values=gates.values[b : b + 1, :count],
            hard=gates.hard[b : b + 1, :count],
            soft=gates.soft[b : b + 1, :count],
        ),
        **changes,
        **cut,
    )


@pytest.mark.parametrize(("name", "given"), [case for case in CASES if case[0] != "reward"])
@pytest.mark.parametrize("filling", [7.0, -1e4])
def test_batch_mates_and_padding_change_nothing(name, given, filling):
    step = draw(filling=filling)
    loss = one(name, given)
    together = loss(step)
    for b in range(len(COUNTS)):
        alone = loss(row(step, b))
        assert_close(together.values[b : b + 1], alone.values, atol=1e-5, rtol=1e-5)
        assert bool(together.counts[b]) == bool(alone.counts[0])


@pytest.mark.parametrize(("name", "given"), CASES)
def test_half_precision_and_autocast_change_no_type(name, given):
    step = draw(relaxation=relaxation_of(name))
    names = ("full_logits", "pruned_logits", "full_states", "pruned_states", "column_logits")
    half = replace(step, **{n: getattr(step, n).bfloat16() for n in names})
    back = replace(step, **{n: getattr(half, n).float() for n in names})
    loss = one(name, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(half)
    assert found.values.dtype == torch.float32
    assert_close(found.values, loss(back).values)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_nothing_waits_for_the_device(name, given):
    step = draw(relaxation=relaxation_of(name))
    loss = one(name, given)
    with NoSync():
        weighed([loss], step)[0].backward()


@pytest.mark.parametrize(("name", "given"), CASES)
def test_settings_make_the_same_again(name, given):
    loss = one(name, {"weight": {"linear": [2.0, 0.2]}, **given})
    assert loss.settings()["weight"] == {"linear": [2.0, 0.2]}
    assert {k: loss.settings()[k] for k in given} == given
    assert one(name, loss.settings()).settings() == loss.settings()


@pytest.mark.parametrize(("name", "given"), CASES)
def test_what_a_loss_reads_must_be_there(name, given):
    step = draw(relaxation=relaxation_of(name))
    bare = Step(
        tokens=replace(step.tokens, projected=None),
        num_keep=3,
        share=0.0,
        scores=step.scores,
    )
    with pytest.raises(ValueError, match=f"the loss '{name}' reads '.*', which this step lacks"):
        one(name, given)(bare)


def test_needs_of_the_tower_are_said_and_held_to():
    loss = one("kept", {"restored": "projected", "weights": "cls"})
    assert loss.needs.projected
    assert loss.needs.attention == ((-1, "cls"),)
    step = draw()
    bare = replace(step, tokens=replace(step.tokens, projected=None, attention={}))
    words = r"reads attention\[-1, cls\], projected, which the tokens lack"
    with pytest.raises(ValueError, match=words):
        loss(bare)


def test_a_layer_that_nobody_read_is_named():
    with pytest.raises(ValueError, match="of layer 3, and the step has that of 0; pass one"):
        one("rank", {"layer": 3})(draw())
    assert one("rank", {"layer": 3}).layers == (3,)


# ------------------------------------------------------------------------- sums


def test_the_sum_is_weighed_by_schedules_and_logs_are_not():
    losses = build_losses({"kl": {"weight": {"linear": [0.0, 2.0]}}, "ce": {"weight": 3.0}})
    step = draw()
    total, logs = weighed(losses, step)
    kl, ce = (loss(step).mean() for loss in losses)
    assert_close(total, 1.0 * kl + 3.0 * ce)
    assert_close(logs["kl"], kl.detach())
    assert not logs["ce"].requires_grad
    total.backward()
    assert step.pruned_logits.grad.isfinite().all()


def test_rows_that_do_not_count_are_left_out_of_the_mean():
    value = LossValue(torch.tensor([4.0, 0.0, 2.0]), torch.tensor([True, False, True]))
    assert float(value.mean()) == 3.0
    assert float(LossValue(torch.zeros(2), torch.zeros(2, dtype=torch.bool)).mean()) == 0.0


def test_an_image_with_a_long_answer_weighs_as_much_as_one_with_a_short():
    values, owner = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 2])
    found = mean_of_rows(values, owner, 3)
    assert found.values.tolist() == [2.0, 0.0, 10.0]
    assert found.counts.tolist() == [True, False, True]
    assert float(found.mean()) == 6.0


# ------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "losses={}; name at least one"),
        (None, "losses=None; name at least one"),
        ({"atention": {}}, "losses.atention: unknown loss 'atention'; did you mean 'attention'"),
        ({"kl": 2.0}, "losses.kl=2.0; pass a mapping"),
        ({"kl": {"wieght": 1}}, "losses.kl: .*no setting 'wieght'; did you mean 'weight'?"),
        ({"kl": {"weight": -1}}, "losses.kl: weight=-1; pass a number of at least 0."),
        ({"kl": {"weight": {"linear": [1, -1]}}}, "pass numbers of at least 0."),
        ({"kl": {"temperature": 0}}, "losses.kl: temperature=0; pass a number above 0."),
        ({"kl": {"weight": 0}, "ce": {"weight": 0}}, "all losses weigh 0"),
        ({"rank": {"kind": "pairs"}}, "kind='pairs'; pass one of 'hinge', 'spearman', 'listnet'."),
        ({"attention": {"rows": "all"}}, "rows='all'; pass one of 'text', 'last'."),
        ({"attention": {"layer": 1.5}}, "layer=1.5; pass the number of a layer"),
        ({"attention": {"layer": True}}, "layer=True; pass the number of a layer"),
        ({"mask": {"threshold": 0}}, "threshold=0; pass a number above 0 and of at most 1."),
        ({"kept": {"penalty": 0}}, "penalty=0; pass a number above 0."),
        ({"kept": {"standardize": 1}}, "standardize=1; pass true or false."),
        ({"kept": {"weight_block": "last"}}, "weight_block='last'; pass the number of a block"),
        ({"kept": {"weights": "mine"}}, "weights='mine'; pass one of 'cls', 'received', 'none'."),
        ({"reward": {"earned": 1}}, "earned=1; pass one of 'likelihood', 'right'."),
        ({"attention": {}, "rank": {"rows": "last"}}, "attention reads rows='text' and rank reads"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        build_losses(settings)
    assert "\n" not in str(caught.value)


def test_arguments_may_be_left_out():
    assert [loss.name for loss in build_losses({"kl": None, "ce": {}})] == ["kl", "ce"]
    assert build_losses({"kl": None})[0].weight.at(0.3) == 1.0


# ------------------------------------------------------------------------- one more loss


@pytest.fixture
def registered():
    """Losses that a test registers are gone after it."""
    before = dict(LOSSES._classes)
    yield
    LOSSES._classes.clear()
    LOSSES._classes.update(before)


def make(reads, values):
    return type("Mine", (Loss,), {"reads": reads, "_values": values})


def test_a_loss_of_ones_own_returns_rows(registered):
    cls = make(frozenset(), lambda self, step: step.scores.sum(dim=1))
    assert register_loss("mine")(cls) is cls
    value = one("mine", {})(draw())
    assert value.counts.all()
    assert value.values.shape == (3,)


@pytest.mark.parametrize(
    ("name", "cls", "words"),
    [
        ("kl", KL, "loss 'kl' is registered already; choose another name."),
        ("my loss", KL, "pass letters, digits, - and _"),
        ("mine", dict, "derive it from ocvtp.selectors.losses.base.Loss"),
        ("mine", make({"gates"}, lambda *_: None), "frozenset of words among full, pruned"),
        ("mine", make(frozenset({"gate"}), lambda *_: None), "frozenset of words among full"),
        ("mine", type("Mine", (Loss,), {"_values": lambda *_: None}), "reads=None"),
        ("mine", type("Mine", (Loss,), {"reads": frozenset()}), "lacks _values; define"),
    ],
)
def test_what_is_no_loss_is_not_registered(registered, name, cls, words):
    with pytest.raises(ValueError, match=words):
        register_loss(name)(cls)


def test_a_loss_that_forgets_an_argument_is_told(registered):
    def __init__(self, free=0.0):
        Loss.__init__(self)

    cls = make(frozenset(), lambda self, step: step.scores.sum(dim=1))
    cls.__init__ = __init__
    register_loss("mine")(cls)
    with pytest.raises(ValueError, match="Mine did not keep its argument 'free'; set self.free"):
        one("mine", {}).settings()


def test_a_loss_that_returns_one_number_is_refused(registered):
    register_loss("mine")(make(frozenset(), lambda self, step: step.scores.sum()))
    words = r"returned values of shape \(\) .* return one of each for every row: \(3,\)"
    with pytest.raises(ValueError, match=words):
        one("mine", {})(draw())


@pytest.mark.parametrize(
    ("name", "setting", "given", "wanted"),
    [
        ("kept", "standardize", "false", False),
        ("rank", "deposition", "True", True),
        ("rank", "layer", "2", 2),
        ("rank", "kind", "spearman", "spearman"),
        ("kept", "penalty", "1e-4", 1e-4),
        ("mask", "threshold", "null", None),
        ("mask", "threshold", "0.5", 0.5),
    ],
)
def test_the_command_line_says_settings_as_texts(name, setting, given, wanted):
    found = getattr(one(name, {setting: given}), setting)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(("given", "at"), [("0", 0.0), ("{linear: [0.2, 2]}", 1.1), ("1e-1", 0.1)])
def test_so_it_does_weights(given, at):
    settings = {"ce": {"weight": given}, "kl": {}}
    assert build_losses(settings)[0].weight.at(0.5) == pytest.approx(at)
    with pytest.raises(ValueError, match="weight='heavy'; pass a number"):
        build_losses({"ce": {"weight": "heavy"}})
