"""Published settings by name."""

from __future__ import annotations

from typing import ClassVar

import pytest

import ocvtp
from ocvtp.evaluation.conditions import Budget, pruner_conditions
from ocvtp.pruners import pruner_class
from ocvtp.pruners.catalog import catalog, markdown_table
from ocvtp.pruners.layer_pruner import LayerStage
from ocvtp.pruners.methods.fastervlm import FasterVLM
from ocvtp.pruners.registry import _REGISTRY, register
from ocvtp.pruners.specs import build_spec, known_settings

NAMED = [(n, s) for n in ocvtp.list_pruners() for s in pruner_class(n).named_settings]


def scheduled(pruner, num_tokens=576, num_layers=32):
    """What each half leaves; the first by its budget."""
    *first, later = pruner.parts
    counts = [part.budget(num_tokens) for part in first]
    stages = later.schedule(num_layers, *counts or [num_tokens])
    return [*counts, *((stage.layer, stage.num_keep) for stage in stages)]


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("fastv", "paper", [(2, 288)]),
        ("fastv", "paper-192", [(2, 166)]),
        ("fastv", "paper-64", [(2, 30)]),
        ("fastv", "layer3-128", [(3, 82)]),
        ("pyramiddrop", "paper", [(8, 288), (16, 144), (24, 72)]),
        ("sparsevlm", "paper-192", [(3, 309), (7, 204), (16, 113)]),
        ("sparsevlm", "plus-64", [(3, 66), (7, 34), (16, 20)]),
        ("vitcop", "paper-192", [288, (2, 253), (22, 51)]),
        ("vitcop", "paper-128", [230, (2, 165), (22, 33)]),
        ("vitcop", "paper-64", [172, (2, 77), (22, 15)]),
        ("visiondrop", "paper-32", [48, (8, 35), (16, 26), (24, 19)]),
    ],
)
def test_published_counts(name, setting, expected):
    for pruner in (
        ocvtp.build_pruner(name, setting=setting),
        build_spec(f"{name}:setting={setting}"),
        build_spec(f"{name}:setting={setting}", num_keep=7, keep_ratio=None),
    ):
        assert scheduled(pruner) == expected


def test_counts_of_fastv_are_those_of_its_averages():
    for count in (192, 128, 64):
        for setting, layer in ((f"paper-{count}", 2), (f"layer3-{count}", 3)):
            ((_, left),) = scheduled(ocvtp.build_pruner("fastv", setting=setting))
            assert abs((layer * 576 + (32 - layer) * left) / 32 - count) < 0.6


@pytest.mark.parametrize("count", [192, 128, 64])
def test_published_shares_of_merged_tokens_and_anchors(count):
    pruner = ocvtp.build_pruner("visionzip", setting=f"paper-{count}")
    expected = {192: (162, 30), 128: (108, 20), 64: (54, 10)}[count]
    assert (pruner.num_keep - pruner.num_contextual, pruner.num_contextual) == expected
    pruner = ocvtp.build_pruner("hiprune", setting=f"paper-{count}")
    anchors = {192: 4, 128: 3, 64: 1}[count]
    assert (pruner.num_keep, round(count * pruner.alpha / 5)) == (count, anchors)
    assert ocvtp.build_pruner("cdpruner", setting=f"paper-{count}").num_keep == count


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus", "trim"])
def test_papers_that_count_by_themselves(name):
    pruner = ocvtp.build_pruner(name, setting="paper")
    assert (pruner.exact, pruner.num_keep, pruner.keep_ratio) == (False, None, None)
    assert not build_spec(f"{name}:setting=paper", num_keep=7).has_budget


def test_every_pruner_lists_its_own():
    rows = {row.name: row for row in catalog()}
    assert rows["sparsevlm"].settings[:3] == ("paper-192", "paper-128", "paper-64")
    assert rows["divprune"].settings == ()
    line = next(line for line in markdown_table().splitlines() if "`pyramiddrop`" in line)
    assert "| `paper` |" in line


@pytest.mark.parametrize(("name", "setting"), NAMED)
def test_a_setting_is_a_budget_of_its_own(name, setting):
    own = pruner_class(name).named_settings[setting]
    passed = {"num_keep": 4, "keep_ratio": 0.5, "max_keep": 4, "stages": ((2, 5),)}
    for key, value in passed.items():
        message = f"'{name}' got setting='{setting}' and {key}; pass one of them: .*stands for"
        with pytest.raises(ValueError, match=message):
            ocvtp.build_pruner(name, setting=setting, **{key: value})
    for key in own.keys() - passed:
        with pytest.raises(ValueError, match=f"and {key}; pass one of them"):
            ocvtp.build_pruner(name, setting=setting, **{key: own[key]})
    nothing = dict.fromkeys(passed.keys() & known_settings(name))
    assert ocvtp.build_pruner(name, setting=setting, **nothing).parts
    assert "setting" in known_settings(name)


def test_vitcops_settings_are_those_of_its_budgets():
    for count in (192, 128, 64):
        named = ocvtp.build_pruner("vitcop", setting=f"paper-{count}").parts
        budget = ocvtp.build_pruner("vitcop", num_keep=count).parts
        left = named[0].budget(576)
        assert named[1].schedule(32, left) == budget[1].schedule(32, left)
        assert named[1]._num_clusters(left) == budget[1]._num_clusters(left)


def test_small_images_keep_what_they_have():
    pruner = ocvtp.build_pruner("sparsevlm", setting="paper-64")
    assert pruner.schedule(32, 20) == (LayerStage(3, 20), LayerStage(7, 20), LayerStage(16, 18))


def test_a_count_that_no_paper_published_has_no_name():
    message = (
        "'pyramiddrop' has no published setting 'paper-64'; pass one of paper, or num_keep.*does"
        r" not say before which layers.*stages=\(\(2, 109\), \(8, 20\), \(16, 3\)\)"
    )
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("pyramiddrop", setting="paper-64")
    with pytest.raises(ValueError, match=message):
        build_spec("pyramiddrop:setting=paper-64", num_keep=64)
    stages = scheduled(ocvtp.build_pruner("pyramiddrop", stages=((2, 109), (8, 20), (16, 3))))
    assert stages == [(layer, int(576 * 0.19**n)) for n, layer in enumerate((2, 8, 16), 1)]
    assert round((2 * 576 + 6 * 109 + 8 * 20 + 16 * 3) / 32) == 63


@pytest.mark.parametrize("setting", ["paper-65", 64, ["paper-64"], ""])
def test_unknown_settings_name_the_known_ones(setting):
    message = "'sparsevlm' has no published setting .*; pass one of paper-192, paper-128, paper-64"
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("sparsevlm", setting=setting)


def test_methods_without_any_say_so():
    message = "'divprune' has no published settings; pass num_keep or keep_ratio in place of"
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("divprune", setting="paper-64")
    assert "setting" not in known_settings("divprune")
    assert ocvtp.build_pruner("divprune", num_keep=4, setting=None).num_keep == 4


def test_a_method_names_its_own_with_one_line(monkeypatch):
    monkeypatch.setattr("ocvtp.pruners.registry._REGISTRY", dict(_REGISTRY))

    @register("named")
    class Named(FasterVLM):
        named_settings: ClassVar = {"half": {"keep_ratio": 0.5, "block": -1}}

    pruner = ocvtp.build_pruner("named", setting="half")
    assert (pruner.keep_ratio, pruner.block, pruner.num_keep) == (0.5, -1, None)
    assert build_spec("named:setting=half", num_keep=3).keep_ratio == 0.5


def test_an_evaluation_runs_them_once():
    budgets = [Budget(num_keep=64), Budget(num_keep=32)]
    (one,) = pruner_conditions("sparsevlm:setting=paper-64", budgets, [0], [], 576)
    assert one.budget is None
    assert scheduled(one.make(None)) == [(3, 82), (7, 32), (16, 18)]
    swept = pruner_conditions("sparsevlm:setting=paper-K", [Budget(64), Budget(128)], [0], [], 576)
    assert [scheduled(one.make(None))[0] for one in swept] == [(3, 82), (3, 312)]
