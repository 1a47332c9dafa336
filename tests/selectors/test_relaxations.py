"""Gates: sums, gradients, draws, and what each relaxation lets learn."""

from __future__ import annotations

import itertools

import jsonargparse
import pytest
import torch
from torch.testing import assert_close

from ocvtp.selectors.relaxations import (
    GumbelBinary,
    GumbelTopK,
    HardST,
    KeptST,
    Relaxation,
    Sample,
    SoftTopK,
    build_relaxation,
    gumbel,
    list_relaxations,
    order_log_prob,
    register_relaxation,
    soft_topk,
)
from tests.pruners.test_contract import NoSync

NAMES = ["gumbel_binary", "gumbel_topk", "hard_st", "kept_st", "sample", "soft_topk"]
COUNTS = (12, 5, 1, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(counts=COUNTS, scale=1.0, dtype=torch.float32):
    most = max(counts)
    real = torch.arange(most) < torch.tensor(counts)[:, None]
    scores = scale * torch.randn(len(counts), most, generator=seeded(), dtype=dtype)
    return scores.masked_fill(~real, 50.0), real


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_budget_of_its_own_is_as_it_is_alone(name):
    scores, real = draw((12, 7, 5, 1))
    relaxation, counts = build_relaxation(name), [3, 7, 2, 4]
    together = scores.clone().requires_grad_()
    made = relaxation(together, torch.tensor(counts), real, 0.5, training=False)
    for row, count in enumerate(counts):
        alone = scores[row : row + 1].clone().requires_grad_()
        own = relaxation(alone, count, real[row : row + 1], 0.5, training=False)
        assert_close(made.values[row : row + 1], own.values)
        assert own.hard.equal(made.hard[row : row + 1])
        if own.log_prob is not None:
            assert_close(made.log_prob[row : row + 1], own.log_prob)
            continue
        up = torch.arange(12.0)
        slopes = torch.autograd.grad((made.values[row] * up).sum(), together, retain_graph=True)
        assert_close(slopes[0][row], torch.autograd.grad((own.values[0] * up).sum(), alone)[0][0])
    assert made.hard.sum(dim=1).tolist() == [3, 7, 2, 1]


# ------------------------------------------------------------------------- soft_topk


@pytest.mark.parametrize("num_keep", [1, 3, 4, 5, 11, 12, 20])
@pytest.mark.parametrize("tau", [0.01, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_gates_sum_to_k(num_keep, tau, scale):
    scores, real = draw(scale=scale)
    gates = soft_topk(scores, num_keep, real, tau)
    assert_close(
        gates.sum(dim=1), real.sum(dim=1).clamp(max=num_keep).float(), atol=1e-4, rtol=1e-5
    )
    assert (gates[~real] == 0).all()
    assert ((gates >= 0) & (gates <= 1)).all()
    whole = real.sum(dim=1) <= num_keep
    assert (gates[whole] == real[whole]).all()  # exactly 1 where all are kept


def test_gates_rise_with_scores_and_do_not_see_where_these_are():
    scores, real = draw()
    gates = soft_topk(scores, 4, real, 0.7)
    assert (gates[0].argsort() == scores[0].argsort()).all()
    assert_close(soft_topk(scores + 3, 4, real, 0.7), gates)
    assert_close(soft_topk(2 * scores, 4, real, 1.4), gates)


@pytest.mark.parametrize("outlier", [1e6, -1e6])
def test_a_score_far_off_costs_the_others_no_precision(outlier):
    scores = torch.tensor([[outlier, 0.1, 0.2, 0.3, 0.4]])
    real = torch.ones_like(scores, dtype=torch.bool)
    alone = soft_topk(scores[:, 1:], 2, real[:, 1:], 0.1)
    others = soft_topk(scores, 3 if outlier > 0 else 2, real, 0.1)[:, 1:]
    assert_close(others, alone, atol=1e-5, rtol=0)


def test_batch_mates_and_padding_change_nothing():
    scores, real = draw((12, 5, 7))
    together = soft_topk(scores, 4, real, 0.5)
    for b, count in enumerate((12, 5, 7)):
        alone = soft_topk(scores[b : b + 1, :count], 4, real[b : b + 1, :count], 0.5)
        assert_close(together[b : b + 1, :count], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_keep", [1, 4, 5, 11])
@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_gradient_is_that_of_finite_differences(num_keep, tau):
    scores, real = draw(dtype=torch.float64)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: soft_topk(s, num_keep, real, tau), scores, eps=1e-5, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("num_keep", [1, 4, 11])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_gradient_is_that_of_newton_steps(num_keep, tau):
    scores = torch.randn(3, 12, generator=seeded(), dtype=torch.float64, requires_grad=True)
    real = torch.ones(3, 12, dtype=torch.bool)
    up = torch.randn(3, 12, generator=seeded(1), dtype=torch.float64)
    gates = soft_topk(scores, num_keep, real, tau)
    (closed,) = torch.autograd.grad((gates * up).sum(), scores)
    t = (tau * gates.detach().logit() - scores.detach()).mean(dim=1, keepdim=True)
    for _ in range(3):
        by_steps = ((scores + t) / tau).sigmoid()
        slope = (by_steps * (1 - by_steps) / tau).sum(dim=1, keepdim=True)
        t = t - (by_steps.sum(dim=1, keepdim=True) - num_keep) / slope
    by_steps = ((scores + t) / tau).sigmoid()
    (stepped,) = torch.autograd.grad((by_steps * up).sum(), scores)
    assert_close(gates, by_steps, atol=1e-9, rtol=0)
    assert_close(closed, stepped, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("case", ["equal", "all kept", "one token", "nearly hard", "hard", "huge"])
def test_gradients_are_finite(case):
    scores, real = draw()
    scores = {"equal": torch.zeros_like(scores), "huge": 1e30 * scores}.get(case, scores)
    num_keep = 12 if case == "all kept" else 1 if case == "one token" else 4
    tau = {"nearly hard": 1e-3, "hard": 1e-12}.get(case, 1.0)
    scores = scores.clone().requires_grad_()
    gates = soft_topk(scores, num_keep, real, tau)
    gates[:, 0].sum().backward()
    assert gates.isfinite().all()
    assert scores.grad.isfinite().all()
    assert (scores.grad[~real] == 0).all()
    if case == "equal":
        assert_close(gates[0], torch.full((12,), 4 / 12))
        assert scores.grad[0, 0] > 0
    if case in ("all kept", "hard"):
        assert (scores.grad == 0).all()


def test_half_precision_and_autocast_are_left_at_the_door():
    scores, real = draw()
    expected = soft_topk(scores.bfloat16().float(), 4, real, 0.5)
    half = scores.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = soft_topk(half, 4, real, 0.5)
    assert gates.dtype == torch.float32
    assert_close(gates, expected)
    gates[:, 0].sum().backward()
    assert half.grad.dtype == torch.bfloat16


# ------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_keep", [1, 4, 12, 20])
@pytest.mark.parametrize("training", [True, False])
def test_every_relaxation_names_exactly_k(name, num_keep, training):
    scores, real = draw()
    scores.requires_grad_()
    gates = build_relaxation(name)(scores, num_keep, real, 0.5, seeded(), training)
    assert gates.values.shape == gates.hard.shape == scores.shape
    assert gates.values.dtype == torch.float32
    assert gates.hard.dtype == torch.bool
    assert (gates.hard.sum(dim=1) == real.sum(dim=1).clamp(max=num_keep)).all()
    for tensor in (gates.values, gates.soft):
        assert tensor is None or (tensor[~real] == 0).all()
        assert tensor is None or tensor.isfinite().all()
    if not training:
        assert gates.hard[0, scores[0].topk(min(num_keep, 12)).indices].all()
    graded = gates.values.sum() if gates.log_prob is None else gates.log_prob.sum()
    (gates.values.square().sum() + graded).backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[~real] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_validation_is_deterministic_and_training_follows_its_generator(name):
    scores, real = draw((12, 9))
    relaxation = build_relaxation(name)
    state = torch.get_rng_state()
    plain = [relaxation(scores, 4, real, 0.5, training=False) for _ in range(2)]
    assert (plain[0].values == plain[1].values).all()
    drawn = [relaxation(scores, 4, real, 0.5, seeded(seed)) for seed in (1, 1, 2)]
    assert (drawn[0].values == drawn[1].values).all()
    is_drawn = name in ("gumbel_binary", "gumbel_topk", "sample")
    assert (drawn[0].values != drawn[2].values).any() == is_drawn
    assert (torch.get_rng_state() == state).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_the_device(name, training):
    scores, real = draw()
    scores.requires_grad_()
    with NoSync():
        gates = build_relaxation(name)(scores, 4, real, 0.5, seeded(), training)
        (gates.values if gates.log_prob is None else gates.log_prob).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_lower_number(name):
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0, 2.0]])
    real = torch.ones_like(scores, dtype=torch.bool)
    hard = build_relaxation(name)(scores, 3, real, 0.0, training=False).hard
    assert hard.tolist() == [[False, True, True, False, True]]


def test_schedules_are_followed():
    scores, real = draw((12,))
    relaxation = HardST(tau={"linear": [1.0, 0.2]}, floor={"geometric": [0.1, 0.001]})
    gates = relaxation(scores, 4, real, 0.5)
    assert_close(gates.soft, soft_topk(scores, 4, real, 0.6))
    assert_close(gates.values[~gates.hard], torch.full((8,), 0.01))
    noisy = GumbelTopK(beta={"linear": [1.0, 0.0]})
    assert_close(noisy(scores, 4, real, 1.0, seeded()).values, soft_topk(scores, 4, real, 1.0))


def test_settings_make_the_same_again():
    made = HardST(tau={"geometric": [1.0, 0.3]}, floor=0.01)
    assert made.settings() == {"tau": {"geometric": [1.0, 0.3]}, "floor": 0.01}
    assert build_relaxation(made.name, **made.settings()).settings() == made.settings()
    assert repr(made) == "HardST(tau={'geometric': [1.0, 0.3]}, floor=0.01)"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SoftTopK(tau=0), "tau=0; pass a number above 0."),
        (lambda: HardST(floor=1.5), "floor=1.5; pass a number of at least 0 and of at most 1."),
        (lambda: GumbelTopK(beta=-1), "beta=-1; pass a number of at least 0."),
        (lambda: build_relaxation("hard"), "unknown relaxation 'hard'; did you mean 'hard_st'?"),
        (lambda: build_relaxation("soft_topk", taw=1), "no setting 'taw'; did you mean 'tau'?"),
        (lambda: SoftTopK()(draw()[0], 0, draw()[1], 0.5), "num_keep=0; pass at least 1."),
        (lambda: SoftTopK()(draw()[0], 2, draw()[1][:1], 0.5), r"pass both as \[B, N\]"),
        (lambda: register_relaxation("hard_st")(SoftTopK), "is registered already"),
        (lambda: register_relaxation("a b")(SoftTopK), "pass letters, digits, - and _"),
        (lambda: register_relaxation("mine")(dict), "derive it from ocvtp.selectors.relaxations"),
        (lambda: register_relaxation("mine")(type("M", (Relaxation,), {})), "lacks _gates"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, words):
    with pytest.raises((ValueError, AttributeError), match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_names():
    assert set(NAMES) <= set(list_relaxations())


def test_a_file_of_settings_names_one_by_its_class():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--relaxation", type=Relaxation)
    text = (
        "{class_path: ocvtp.selectors.relaxations.HardST,"
        " init_args: {tau: {geometric: [1.0, 0.3]}, floor: 1.0e-2}}"
    )
    read = parser.parse_args([f"--relaxation={text}"])
    found = getattr(parser, "instantiate", parser.instantiate_classes)(read).relaxation
    assert isinstance(found, HardST)
    assert found.settings() == {"tau": {"geometric": [1.0, 0.3]}, "floor": 0.01}


# ------------------------------------------------------------------------- what each lets learn


def answer(gates: torch.Tensor, logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One query of attention, with the gates as biases of keys; token 0 is text."""
    bias = torch.cat([torch.zeros(1), gates.clamp(min=torch.finfo(gates.dtype).tiny).log()])
    return ((logits + bias).softmax(dim=0) * values).sum()


@pytest.mark.parametrize(("floor", "learn"), [(0.0, 4), (1e-3, 12)])
def test_a_floor_lets_dropped_tokens_learn(floor, learn):
    """Of a hard 0 on a key softmax's derivative is 0: without a floor only kept tokens learn."""
    scores, real = draw((12,))
    logits, values = torch.randn(13, generator=seeded(1)), torch.randn(13, generator=seeded(2))
    gates = HardST(floor=floor)(scores.requires_grad_(), 4, real, 0.0)
    gates.values.retain_grad()
    answer(gates.values[0], logits, values).backward()
    learning = gates.values.grad[0] != 0
    assert int(learning.sum()) == learn
    assert learning[gates.hard[0]].all()


def test_hard_forward_soft_backward():
    scores, real = draw((12, 5))
    up = torch.randn(2, 12, generator=seeded(1))
    a, b = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    gates = HardST(tau=0.5, floor=0.0)(a, 4, real, 0.0)
    assert (gates.values == gates.hard).all()
    (gates.values * up).sum().backward()
    (soft_topk(b, 4, real, 0.5) * up).sum().backward()
    assert_close(a.grad, b.grad)
    assert (a.grad[real] != 0).all()


def test_only_kept_tokens_pass_the_gradient_of_kept_st():
    scores, real = draw((12,))
    gates = KeptST()(scores.requires_grad_(), 4, real, 0.0)
    assert (gates.values == gates.hard).all()
    (passed,) = torch.autograd.grad(gates.values.sum(), gates.soft)
    assert (passed == gates.hard).all()


def test_a_binary_draw_keeps_each_token_by_its_own_chance():
    scores = torch.tensor([[-2.0, 0.0, 1.0]]).expand(20000, 3).clone().requires_grad_()
    real = torch.ones_like(scores, dtype=torch.bool)
    gates = GumbelBinary(tau=0.5)(scores, 1, real, 0.0, seeded())
    assert set(gates.values.unique().tolist()) == {0.0, 1.0}
    assert_close(
        gates.values.detach().mean(dim=0), scores[0].detach().sigmoid(), atol=0.015, rtol=0
    )
    assert ((gates.soft > 0.5) == (gates.values == 1)).all()
    gates.values.sum().backward()
    assert (scores.grad != 0).float().mean() > 0.99


# ------------------------------------------------------------------------- draws


def test_noise_is_gumbel():
    noise = gumbel(torch.empty(100000, dtype=torch.float64), seeded())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.03)
    assert noise.isfinite().all()


def test_probabilities_of_all_orders_sum_to_one():
    scores = torch.randn(1, 4, generator=seeded(), dtype=torch.float64).expand(24, 4)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    real = torch.ones_like(orders, dtype=torch.bool)
    for num_keep, repeats in ((1, 6), (2, 2), (3, 1), (4, 1)):
        total = order_log_prob(scores, orders, num_keep, real).exp().sum() / repeats
        assert float(total) == pytest.approx(1.0)


def test_probability_of_an_order_by_hand():
    scores = torch.tensor([[1.0, 0.0, 2.0, 99.0]])
    real = torch.tensor([[True, True, True, False]])
    order = torch.tensor([[2, 1, 0, 3]])
    e = torch.tensor([1.0, 0.0, 2.0]).exp()
    expected = (e[2] / e.sum()).log() + (e[1] / (e[0] + e[1])).log()
    for num_keep in (2, 3, 4):  # the last one left is certain
        assert_close(order_log_prob(scores, order, num_keep, real)[0], expected)


def test_the_gradient_of_a_probability_is_that_of_finite_differences():
    scores, real = draw((6, 3, 1), dtype=torch.float64)
    order = scores.masked_fill(~real, -1e9).argsort(dim=1, descending=True)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: order_log_prob(s, order, 3, real), scores)


def test_sets_are_drawn_as_often_as_their_probability_says():
    scores = torch.tensor([[0.5, -0.5, 0.0]]).expand(30000, 3)
    real = torch.ones_like(scores, dtype=torch.bool)
    gates = Sample(tau=0.5)(scores, 2, real, 0.0, seeded())
    p = (scores[0] / 0.5).softmax(dim=0)
    left_out = torch.tensor(
        [
            sum(p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations({0, 1, 2} - {c}))
            for c in range(3)
        ]
    )
    assert_close((~gates.hard).float().mean(dim=0), left_out, atol=0.015, rtol=0)
    assert (gates.values == gates.hard).all()
    assert gates.soft is None
