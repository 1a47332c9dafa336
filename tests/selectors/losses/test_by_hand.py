"""Each loss against values worked out by hand, and what its gradient reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ocvtp.ops.ridge import ridge_error
from ocvtp.selectors.losses import build_losses
from ocvtp.selectors.losses.teachers import hard_ranks
from ocvtp.selectors.relaxations import Gates, build_relaxation
from tests.selectors.losses.steps import draw, seeded, written


def value(name, step, **given):
    return build_losses({name: given})[0](step).values


def only(name, step, **given):
    return float(value(name, step, **given)[0].detach())


def answers(full, pruned, targets=(0,)):
    return {
        "full_logits": torch.tensor(full),
        "pruned_logits": torch.tensor(pruned).requires_grad_(),
        "owner": torch.zeros(len(full), dtype=torch.long),
        "targets": torch.tensor(targets),
    }


def test_kl():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    step = written([0.0, 0.0], **answers([p.log().tolist()], [(q.log() + 3).tolist()]))
    expected = 0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()
    assert only("kl", step) == pytest.approx(float(expected))
    p2, q2 = (x.sqrt() / x.sqrt().sum() for x in (p, q))
    warmer = 4 * (p2 * (p2 / q2).log()).sum()
    assert only("kl", step, temperature=2.0) == pytest.approx(float(warmer))
    value("kl", step).sum().backward()
    assert_close(step.pruned_logits.grad[0], q - p)


def test_kl_is_zero_where_both_answer_alike():
    step = draw()
    same = replace(step, pruned_logits=step.full_logits.clone().requires_grad_())
    found = value("kl", same)
    found.sum().backward()
    assert_close(found, torch.zeros(3))
    assert_close(same.pruned_logits.grad, torch.zeros(6, 11), atol=1e-6, rtol=0)


def test_ce():
    step = written([0.0], **answers([[0.0, 0.0]] * 2, [[0.0, 0.0], [2.0, 1.0]], targets=(1, 0)))
    second = -torch.tensor([2.0, 1.0]).log_softmax(dim=0)[0]
    expected = (torch.tensor(2.0).log() + second) / 2
    assert only("ce", step) == pytest.approx(float(expected))


def test_hidden():
    states = {
        "full_states": torch.tensor([[3.0, 4.0], [1.0, 0.0]]),
        "pruned_states": torch.tensor([[3.0, 2.0], [1.0, 0.0]]),
        "owner": torch.zeros(2, dtype=torch.long),
    }
    assert only("hidden", written([0.0], **states)) == pytest.approx(4 / 25 / 2)


def test_attention():
    scores = [1.0, 0.0, -1.0]
    step = written(scores, teacher={2: torch.tensor([[0.4, 0.1, 0.0]])})
    logs = torch.tensor(scores).log_softmax(dim=0)
    expected = -(0.8 * logs[0] + 0.2 * logs[1])
    assert only("attention", step, layer=2) == pytest.approx(float(expected))
    value("attention", step, layer=2).sum().backward()
    assert_close(step.scores.grad[0], logs.exp() - torch.tensor([0.8, 0.2, 0.0]))
    warm = -(2 / 3 * logs[0] + 1 / 3 * logs[1])
    assert only("attention", step, layer=2, temperature=2.0) == pytest.approx(float(warm), abs=1e-5)


def test_attention_as_squared_error_to_its_standardised_log():
    step = written([1.0, -1.0], teacher={0: torch.tensor([[0.09, 0.01]])})
    assert only("attention", step, kind="mse") == pytest.approx(0.0, abs=1e-10)
    step = written([0.0, 0.5], teacher={0: torch.tensor([[0.09, 0.01]])})
    assert only("attention", step, kind="mse") == pytest.approx((1 + 2.25) / 2)


@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_the_scale_of_attention_does_not_matter(kind):
    step = draw()
    more = replace(step, teacher={0: 1e-3 * step.teacher[0]})
    assert_close(value("attention", step, kind=kind), value("attention", more, kind=kind))


def test_the_same_attention_to_all_is_a_target_of_ce_alone():
    step = written([1.0, 0.0], teacher={0: torch.tensor([[0.2, 0.2]])})
    assert build_losses({"attention": {}})[0](step).counts.all()
    for name, given in (
        ("attention", {"kind": "mse"}),
        ("rank", {}),
        ("rank", {"kind": "listnet"}),
    ):
        assert not build_losses({name: given})[0](step).counts.any()


def test_hinge():
    teacher = {0: torch.tensor([[0.4, 0.3, 0.2, 0.1]])}
    # K = 2; with the margin 3.0, 0.5, 1.8, 3.5: the first and the last are found for the first two.
    step = written([3.0, 0.5, 0.8, 2.5], teacher=teacher)
    assert only("rank", step) == pytest.approx((3.0 + 3.5 - 3.5) / 2)
    value("rank", step).sum().backward()
    assert_close(step.scores.grad, torch.tensor([[0.0, -0.5, 0.0, 0.5]]))
    assert only("rank", written([3.0, 2.5, 1.0, 0.0], teacher=teacher)) == 0.0
    assert only("rank", written([3.0, 2.5, 2.0, 0.0], teacher=teacher)) == pytest.approx(0.25)
    assert only("rank", written([3.0, 2.5, 2.0, 0.0], teacher=teacher), margin=0.0) == 0.0


def test_spearman():
    teacher = {0: torch.tensor([[0.1, 0.2, 0.3, 0.4]])}
    rising, falling = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    given = {"kind": "spearman", "temperature": 0.01}
    assert only("rank", written(rising, teacher=teacher), **given) == pytest.approx(0, abs=1e-4)
    assert only("rank", written(falling, teacher=teacher), **given) == pytest.approx(2, abs=1e-4)
    # Ranks 0, 2, 1, 3 against 0, 1, 2, 3: rho = 1 - 6 (1 + 1) / (4 (16 - 1)).
    swapped = written([1.0, 3.0, 2.0, 4.0], teacher=teacher)
    assert only("rank", swapped, **given) == pytest.approx(0.2, abs=1e-4)


def test_ranks_of_equals_are_shared():
    real = torch.tensor([[True, True, True, True, False]])
    ranks = hard_ranks(torch.tensor([[5.0, 1.0, 5.0, 9.0, 7.0]]), real)
    assert ranks[0, :4].tolist() == [1.5, 0.0, 1.5, 3.0]


def test_listnet():
    step = written([0.3, -0.3], teacher={0: torch.tensor([[0.09, 0.01]])})
    target, logs = torch.tensor([1.0, -1.0]), torch.tensor([0.3, -0.3]).log_softmax(dim=0)
    for temperature in (1.0, 0.5):
        expected = -((target / temperature).softmax(dim=0) * logs).sum()
        found = only("rank", step, kind="listnet", temperature=temperature)
        assert found == pytest.approx(float(expected))


def test_mask():
    known = {"objects": torch.tensor([[1.0, 0.25]]), "has_objects": torch.tensor([True])}
    step = written([0.0, 0.0], **known)
    log2 = float(torch.tensor(2.0).log())
    assert only("mask", step) == pytest.approx(1 - 2.25 / 3.25 + 0.1 * log2)
    assert only("mask", step, bce=0.0, threshold=0.25) == pytest.approx(1 - 3 / 4)
    assert only("mask", step, bce=0.0, threshold=0.3) == pytest.approx(1 - 2 / 3)
    assert only("mask", written([20.0, -20.0], **known), bce=0.0, threshold=0.5) < 1e-6


def test_rows_without_objects_do_not_count():
    step = replace(draw(), has_objects=torch.tensor([True, False, True]))
    found = build_losses({"mask": {}})[0](step)
    assert found.counts.tolist() == [True, False, True]
    assert found.values[1] == 0
    found.mean().backward()
    assert (step.scores.grad[1] == 0).all()


def gates(soft, hard):
    soft = torch.tensor([soft]).requires_grad_()
    return Gates(values=soft, hard=torch.tensor([hard]), soft=soft)


def test_binary():
    made = gates([0.8, 0.6, 0.6], [True, True, False])
    expected = -(torch.tensor([0.8, 0.6, 0.4]).log().mean())
    step = written([2.0, 1.0, 1.0], gates=made)
    assert only("binary", step) == pytest.approx(float(expected))
    value("binary", step).sum().backward()
    assert (made.soft.grad[0].sign() == torch.tensor([-1.0, -1.0, 1.0])).all()


def test_binary_reads_the_soft_gates_of_hard_ones():
    scores = draw().scores.detach()
    for name in ("soft_topk", "hard_st", "kept_st"):
        step = draw(scores=scores.clone(), relaxation=name)
        assert_close(value("binary", step), value("binary", draw(scores=scores.clone())))
    with pytest.raises(ValueError, match="this relaxation draws hard ones alone"):
        value("binary", draw(relaxation="sample"))


def test_ratio():
    step = written([0.0] * 4, gates=gates([1.0, 1.0, 1.0, 0.0], [True, True, False, False]))
    assert only("ratio", step) == pytest.approx((3 / 4 - 2 / 4) ** 2)
    assert_close(value("ratio", draw()), torch.zeros(3))  # soft_topk holds K by itself


def test_reward():
    log_prob = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]).requires_grad_()
    step = draw((3,) * 5, relaxation="sample")
    step = replace(
        step,
        gates=replace(step.gates, log_prob=log_prob),
        reward=torch.tensor([1.0, 3.0, 7.0, 7.0, 2.0]),
        groups=torch.tensor([4, 4, 9, 9, 1]),
    )
    found = build_losses({"reward": {}})[0](step)
    assert_close(found.values, torch.tensor([-1.0, 2.0, 0.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    assert found.counts.tolist() == [True, True, True, True, False]
    found.values.sum().backward()
    assert_close(log_prob.grad, torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0]), atol=1e-3, rtol=0)


def test_reward_raises_what_earned_more():
    scores = torch.zeros(64, 4).requires_grad_()
    real = torch.ones(64, 4, dtype=torch.bool)
    drawn = build_relaxation("sample")(scores, 2, real, 0.0, seeded())
    step = draw((4,) * 64, relaxation=None)
    reward = drawn.hard[:, 1].float()  # a set earns 1 with the second token in it
    step = replace(step, gates=drawn, reward=reward, groups=torch.zeros(64, dtype=torch.long))
    value("reward", step).mean().backward()
    moved = -scores.grad.sum(dim=0)
    assert moved[1] > 0
    assert (moved[[0, 2, 3]] < 0).all()
    with pytest.raises(ValueError, match="relaxation 'sample' alone has"):
        value("reward", draw())


# ------------------------------------------------------------------------- kept


def test_kept_does_not_see_the_scale_of_features_once_they_are_standardised():
    step = draw()
    scaled = 1 + torch.arange(5.0) ** 3
    tokens = replace(step.tokens, features=step.tokens.features * scaled)
    other = replace(step, tokens=tokens)
    assert_close(value("kept", step), value("kept", other), atol=3e-3, rtol=0)
    plain = [value("kept", one, standardize=False)[0] for one in (step, other)]
    assert abs(plain[0] - plain[1]) > 1e-2


def test_kept_is_the_error_of_the_hard_tokens():
    step = draw()
    for b, count in enumerate((6, 4, 1)):
        y = step.tokens.features[b : b + 1, :count]
        y = y - y.mean(dim=1, keepdim=True)
        kept = y[:, step.gates.hard[b, :count]]
        weights = torch.full((1, count), 1 / count)
        found = value("kept", step, standardize=False)
        assert_close(found[b : b + 1], ridge_error(y, kept, weights))


def test_all_kept_leaves_what_the_penalty_takes():
    few = value("kept", draw(num_keep=1))
    some = value("kept", draw(num_keep=3))
    whole = value("kept", draw(num_keep=6))
    assert (few[:2] > some[:2]).all()
    assert some[0] > whole[0]


@pytest.mark.parametrize("weights", ["none", "cls"])
@pytest.mark.parametrize("restored", ["features", "projected"])
def test_the_gradient_of_kept_is_that_of_counting_a_token_a_little_more(weights, restored):
    step = draw((6,), num_keep=3)
    given = {"weights": weights, "restored": restored, "standardize": False}
    (slopes,) = torch.autograd.grad(value("kept", step, **given).sum(), step.gates.values)
    y = getattr(step.tokens, restored).double()
    y = y - y.mean(dim=1, keepdim=True)
    omega = torch.ones(1, 6).double() / 6
    if weights == "cls":
        attention = step.tokens.attention[-1, "cls"].double()
        omega = (attention / attention.max()) ** (4 / 3)
        omega = omega / omega.sum()

    def error(count):
        return ridge_error(y, count.sqrt()[:, :, None] * y, omega)[0]

    hard = step.gates.hard.double()
    for n in range(6):
        moved = torch.zeros(1, 6).double()
        moved[0, n] = 1e-6
        if hard[0, n] == 0:  # a count is at least 0
            by_steps = (error(hard + moved) - error(hard)) / 1e-6
        else:
            by_steps = (error(hard + moved) - error(hard - moved)) / 2e-6
        assert float(slopes[0, n]) == pytest.approx(float(by_steps), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("relaxation", ["soft_topk", "hard_st"])
def test_kept_reaches_every_real_token_at_the_first_step(relaxation):
    step = draw((6, 4), relaxation=relaxation)
    (reached,) = torch.autograd.grad(value("kept", step).sum(), step.gates.values)
    assert ((reached != 0) == step.real).all()


def test_descent_finds_better_tokens_than_it_started_with():
    torch.manual_seed(0)
    scores = torch.zeros(8, 12).requires_grad_()
    base = draw((12,) * 8, relaxation=None)
    real = torch.ones(8, 12, dtype=torch.bool)
    relaxation, errors = build_relaxation("hard_st"), []
    for _ in range(60):
        step = replace(base, scores=scores, gates=relaxation(scores, 3, real, 0.0))
        loss = value("kept", step).mean()
        errors.append(float(loss.detach()))
        (gradient,) = torch.autograd.grad(loss, scores)
        scores = (scores - 20 * gradient).detach().requires_grad_()
    assert errors[-1] < 0.9 * errors[0]
