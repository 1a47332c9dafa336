"""What a budget may be, for every pruner that takes one."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from small_networks import network_setting

import ocvtp
from ocvtp.pruners import pruner_class
from ocvtp.pruners.budgets import Budget, check_stages, count_stages
from ocvtp.pruners.layer_pruner import LayerPruner, LayerStage, OneStagePruner
from ocvtp.pruners.specs import build_spec

NAMES = ocvtp.list_pruners()
STAGED = [name for name in NAMES if issubclass(pruner_class(name), LayerPruner)]
SEVERAL = [name for name in STAGED if not issubclass(pruner_class(name), OneStagePruner)]
HALVES = {"vitcop": {}, "vflowopt": {}, "visiondrop": {"later": True}}
NO_COUNTS = [1.5, 16.0, 1.0, math.nan, math.inf, "16", True, [16], 0, -3, np.float64(16)]
NO_COUNTS += [torch.tensor([16]), torch.tensor(16.0), torch.tensor(True), np.array([16])]
NO_SHARES = ["0.5", math.nan, math.inf, -math.inf, 0, 0.0, -0.5, 1.01, 2, True, [0.5]]
NO_SHARES += [torch.tensor([0.5]), torch.tensor(2), 10**400]


@pytest.fixture(params=NAMES)
def build(request):
    """Builds one pruner with a budget."""
    settings = network_setting(request.param, 8)
    return lambda **budget: ocvtp.build_pruner(request.param, **settings, **budget)


def test_what_counts_no_tokens_is_refused(build):
    more = [{}, {"adaptive": True}] if hasattr(build(num_keep=4), "adaptive") else [{}]
    for value, settings in product(NO_COUNTS, more):
        with pytest.raises(ValueError, match=r"num_keep=.*; pass (a whole number of|at least 1)"):
            build(num_keep=value, **settings)


def test_what_is_no_share_is_refused(build):
    for value in NO_SHARES:
        with pytest.raises(ValueError, match="keep_ratio=.*; pass the share of tokens KEPT"):
            build(keep_ratio=value)


def test_numbers_of_numpy_and_torch_become_plain_ones(build):
    for count in (np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)):
        assert type(build(num_keep=count).num_keep) is int
    for share in (np.float32(0.5), np.float64(0.5), 1, torch.tensor(0.5), torch.tensor(1)):
        assert type(build(keep_ratio=share).keep_ratio) is float


def test_a_cap_is_a_count_alone_or_of_a_share(build):
    for value in NO_COUNTS:
        with pytest.raises(ValueError, match=r"max_keep=.*; pass (a whole number of|at least 1)"):
            build(max_keep=value)
    with pytest.raises(ValueError, match="num_keep=4 and max_keep=9; pass one of them"):
        build(num_keep=4, max_keep=9)
    capped, share = build(max_keep=np.int64(9)), build(keep_ratio=0.5, max_keep=9)
    assert type(capped.max_keep) is int
    if capped.name == "none":
        return
    assert [capped.budget(n) for n in (4, 9, 30)] == [4, 9, 9]
    assert [share.budget(n) for n in (4, 18, 30)] == [2, 9, 9]
    assert not any(capped.exceeds(n) for n in (4, 9, 30))
    if capped.parts == (capped,):
        assert [capped.spares(n) for n in (4, 9, 10)] == [True, True, False]
        assert not any(share.spares(n) for n in (4, 9, 30))
        assert share.of_size(30).num_keep == 9
    for part in share.parts:
        if isinstance(part, LayerPruner) and part.layers(40)[0] < 16:
            (*_, last) = part.schedule(40, 16)
            assert last.num_keep <= 9


def test_another_budget_is_that_of_another_pruner(build):
    first = build(num_keep=4)
    if first.name == "none":
        return
    for budget in ({"num_keep": 9}, {"keep_ratio": 0.5}, {"max_keep": 9}):
        pruner, expected = first.with_budget(Budget(**budget)), build(**budget)
        assert type(pruner) is type(first)
        for part, own in zip(pruner.parts, expected.parts, strict=True):
            assert [part.budget(n) for n in (5, 30)] == [own.budget(n) for n in (5, 30)]
            assert [part.spares(n) for n in (5, 30)] == [own.spares(n) for n in (5, 30)]
            assert part.exact == own.exact
    assert first.num_keep == 4
    with pytest.raises(ValueError, match="num_keep=0; pass at least 1"):
        first.with_budget(Budget(num_keep=0))


@pytest.mark.parametrize(("name", "settings"), [("visiondrop", {"later": True}), ("vitcop", {})])
def test_halves_of_a_method_are_capped_as_counted(name, settings):
    capped = ocvtp.build_pruner(name, max_keep=64, **settings).parts
    counted = ocvtp.build_pruner(name, num_keep=64, **settings).parts
    shared = ocvtp.build_pruner(name, keep_ratio=0.5, max_keep=64, **settings).parts
    for first, later in (capped, shared):
        assert first.budget(576) == counted[0].budget(576) == 64
        assert later.schedule(32, 172) == counted[1].schedule(32, 172)
    assert capped[0].spares(64)
    assert capped[1].schedule(32, 64)[-1].num_keep == 64
    assert shared[0].budget(100) == 50


def test_a_chain_may_have_caps_of_any_size():
    def chain(*budgets):
        steps = [ocvtp.build_pruner("uniform", **budget) for budget in budgets]
        return ocvtp.Chain(steps)

    assert chain({"num_keep": 4}, {"max_keep": 9}).budget(30) == 9
    assert chain({"max_keep": 9}, {"num_keep": 4}).with_budget(Budget(num_keep=9)).num_keep == 9
    for first in ({"num_keep": 4}, {"max_keep": 4}, {"keep_ratio": 0.5, "max_keep": 4}):
        with pytest.raises(ValueError, match="num_keep=5 after 'uniform', which leaves 4"):
            chain(first, {"max_keep": 20}, {"num_keep": 5})


def test_other_counts_of_tokens():
    for name in ("visionzip", "visiondrop"):
        for value in (2.0, "2", True, -1):
            with pytest.raises(ValueError, match="num_contextual=.*; pass"):
                ocvtp.build_pruner(name, num_keep=8, num_contextual=value)
    for value in (math.nan, math.inf, "8", True, -1, 1.5, [4, math.nan], (4, "1"), (4, math.nan)):
        with pytest.raises(ValueError, match="r=.*; pass"):
            ocvtp.build_pruner("tome", r=value)


# ---------------------------------------------------------------------------------------- stages


def own_network(name):
    """The setting `network`, for layer 2, of a pruner that takes one."""
    return network_setting(name, 8, layer=2) if name == "learned_layers" else {}


@pytest.mark.parametrize("name", STAGED)
def test_a_float_is_a_share_and_an_int_a_count(name):
    def left(kept, num_tokens=40):
        pruner = ocvtp.build_pruner(name, stages=((2, kept),), **own_network(name))
        (stage,) = pruner.schedule(8, num_tokens)
        return stage.num_keep

    assert left(1.0) == left(np.float64(1)) == left(torch.tensor(1.0)) == 40
    assert left(1) == left(np.int64(1)) == left(torch.tensor(1)) == 1
    (layer,) = ocvtp.build_pruner(
        name, stages=((torch.tensor(2), torch.tensor(5)),), **own_network(name)
    ).layers(8)
    assert (type(layer), layer) == (int, 2)
    assert left(0.5) == 20
    assert left(0.001) == 1
    assert left(64) == 40  # as many as there are


@pytest.mark.parametrize("name", STAGED)
def test_specs_tell_floats_from_ints(name):
    for text, count in (("1.0", 40), ("1", 1), ("0.5", 20), ("K", 9)):
        pruner = build_spec(f"{name}:stages=[[2,{text}]]", num_keep=9, **own_network(name))
        assert pruner.schedule(8, 40) == (LayerStage(2, count),)


@pytest.mark.parametrize("name", HALVES)
def test_stages_of_later_halves(name):
    pruner = ocvtp.build_pruner(name, num_keep=30, stages=((2, 1.0), (4, 7)), **HALVES[name])
    assert pruner.parts[1].schedule(8, 30) == (LayerStage(2, 30), LayerStage(4, 7))
    with pytest.raises(ValueError, match=f"keep 31 before layer 2, but {name} leaves"):
        ocvtp.build_pruner(name, num_keep=30, stages=((2, 31),), **HALVES[name])


WRONG = [
    "[[2, 64]]",
    (2, 64),
    ((2,),),
    ((2, 64, 1),),
    {2: 64},
    64,
    (),
    ((2, True),),
    ((True, 3),),
    ((2, 0),),
    ((2, -4),),
    ((2, 0.0),),
    ((2, 64.0),),
    ((2, 1.5),),
    ((2, math.nan),),
    ((2, math.inf),),
    ((2, "0.5"),),
    ((2.0, 5),),
    ((2, None),),
    ((4, 5), (2, 3)),
    ((2, 5), (2, 3)),
]


@pytest.mark.parametrize("stages", WRONG)
@pytest.mark.parametrize("name", [*STAGED, *HALVES])
def test_what_names_no_stages_is_refused(name, stages):
    budget = {"num_keep": 80} if name in HALVES else {}
    with pytest.raises(ValueError, match=r"stages=.*pass \(layer, K\) pairs with ascending layers"):
        ocvtp.build_pruner(name, stages=stages, **budget, **HALVES.get(name, {}))


@pytest.mark.parametrize(
    "stages",
    [
        ((2, 5), (4, 9)),
        ((2, 0.25), (4, 0.5)),
        ((2, 9), (3, 0.5), (4, 10)),
        ((2, 0.5), (3, 9), (4, 1.0)),
    ],
)
@pytest.mark.parametrize("name", [*SEVERAL, *HALVES])
def test_stages_that_rise_are_refused(name, stages):
    budget = {"num_keep": 80} if name in HALVES else {}
    with pytest.raises(ValueError, match="what is dropped does not come back; pass K that do not"):
        ocvtp.build_pruner(name, stages=stages, **budget, **HALVES.get(name, {}))


def test_a_share_of_more_than_is_left_is_refused_for_that_image():
    stages = check_stages([[2, 100], [4, 0.5]])
    assert count_stages(stages, 200) == ((2, 100), (4, 100))
    assert count_stages(stages, 60) == ((2, 60), (4, 30))
    with pytest.raises(ValueError, match="keep 0.5 of 300 tokens, 150, .* where 100 are left"):
        count_stages(stages, 300)


def test_a_count_is_the_most_that_stays():
    stages = check_stages([[2, 0.5], [4, 64]])
    assert count_stages(stages, 200) == ((2, 100), (4, 64))
    assert count_stages(stages, 100) == ((2, 50), (4, 50))
    assert count_stages(check_stages(((2, 9), (3, 9), (5, 4))), 6) == ((2, 6), (3, 6), (5, 4))
