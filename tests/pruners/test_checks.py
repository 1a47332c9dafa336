"""`check_pruner` passes what the library ships, and names each way of breaking the contract."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from small_networks import TRAINED, network_setting

import ocvtp
from ocvtp.ops.selection import top_k
from ocvtp.pruners import Pruner, pruner_class
from ocvtp.pruners.checks import check_pruner, random_tokens
from ocvtp.structures import STAGES, Needs, Selection

APART = {*TRAINED, "none"}  # take a network; keeps all
GOOD = [
    name
    for name in ocvtp.list_pruners()
    if name not in APART and pruner_class(name).stage in ("encoder", "llm_input")
    if len(pruner_class(name)(num_keep=2).parts) == 1
]


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_what_is_shipped_passes(name):
    check_pruner(ocvtp.build_pruner(name, num_keep=4), grid_hw=(4, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TRAINED if pruner_class(n).stage != "llm_layers"])
def test_what_takes_a_network_passes(name):
    check_pruner(ocvtp.build_pruner(name, num_keep=4, **network_setting(name, 8)), grid_hw=(4, 4))


@dataclass(kw_only=True, eq=False)
class Norm(Pruner):
    """A good one; faults are derived from it."""

    name = "norm"

    def scores(self, tokens):
        return tokens.features.float().norm(dim=2)

    def _select(self, tokens, num_keep):
        return top_k(self.scores(tokens), num_keep, tokens.valid)


class TooFew(Norm):
    def _select(self, tokens, num_keep):
        return super()._select(tokens, max(1, num_keep - 1))


class ByScore(Norm):
    def _select(self, tokens, num_keep):
        order = self.scores(tokens).masked_fill(~tokens.real, -1).sort(dim=1, descending=True)
        kept = order.indices[:, :num_keep]
        return Selection(kept, None if tokens.valid is None else tokens.valid.gather(1, kept))


class Twice(Norm):
    def _select(self, tokens, num_keep):
        kept = super()._select(tokens, num_keep)
        return Selection(kept.keep_indices[:, :1].expand(-1, num_keep), kept.valid)


class Int32(Norm):
    def _select(self, tokens, num_keep):
        kept = super()._select(tokens, num_keep)
        return Selection(kept.keep_indices.int(), kept.valid)


class AcrossImages(Norm):
    def scores(self, tokens):
        return (tokens.features.float() - tokens.features.float().mean(dim=(0, 1))).norm(dim=2)


class ReadsPadding(Norm):
    def scores(self, tokens):
        return (tokens.features - tokens.features.mean(dim=1, keepdim=True)).float().norm(dim=2)


class KeepsPadding(Norm):
    def _select(self, tokens, num_keep):
        return top_k(self.scores(tokens), num_keep)


class Unseeded(Norm):
    def scores(self, tokens):
        return torch.rand(tokens.features.shape[:2])


class InPlace(Norm):
    def scores(self, tokens):
        return tokens.features.mul_(2).float().norm(dim=2)


class Waits(Norm):
    def scores(self, tokens):
        return super().scores(tokens) * (2.0 if tokens.features.sum().item() > 0 else 1.0)


class BooleanIndex(Norm):
    def scores(self, tokens):
        scores = super().scores(tokens)
        return scores + scores[scores > 1].sum()


class InFp32Only(Norm):
    def scores(self, tokens):
        return (tokens.features @ torch.ones(8)).abs()


class DropsEqualOnes(Norm):
    def _select(self, tokens, num_keep):
        kept = super()._select(tokens, num_keep)
        differ = self.scores(tokens).std(dim=1, keepdim=True) > 1e-6
        counts = differ | (torch.arange(num_keep) < 1)
        return Selection(kept.keep_indices, counts if kept.valid is None else counts & kept.valid)


class Undeclared(Norm):
    def _select(self, tokens, num_keep):
        kept = super()._select(tokens, num_keep)
        weights = torch.ones(*kept.keep_indices.shape, 1 + tokens.num_tokens)
        return Selection(kept.keep_indices, kept.valid, merge=weights)


FAULTS = {
    TooFew: "keeps 1 tokens; keep 2",
    ByScore: "unique ascending",
    Twice: "unique ascending",
    Int32: r"keep_indices are torch.int32 \[3, 1\]; return int64",
    AcrossImages: "in a batch, but .* alone",
    ReadsPadding: "beside padding .* but .* alone",
    KeepsPadding: "keeps padding",
    Unseeded: "another selection; draw from a seeded",
    InPlace: "were changed; work on copies",
    Waits: "_local_scalar_dense in `_select`",
    BooleanIndex: "a boolean index in `_select`",
    InFp32Only: "bf16 tokens fail",
    DropsEqualOnes: "where all tokens are equal",
    Undeclared: "merging=False",
}


def test_the_one_that_faults_derive_from_passes():
    check_pruner(Norm(num_keep=2))


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_each_fault_is_named(fault, message):
    with pytest.raises(ValueError, match=message) as found:
        check_pruner(fault(keep_ratio=0.5))
    assert "pruner 'norm' with num_keep=" in str(found.value)


@pytest.mark.parametrize("name", ["fastv", "vprune"])
def test_other_stages_are_refused_with_the_remedy(name):
    with pytest.raises(ValueError, match="acts at stage (?s:.*)CONTRIBUTING.md"):
        check_pruner(ocvtp.build_pruner(name, num_keep=4))
    assert pruner_class(name).stage in STAGES


@pytest.mark.parametrize("sizes", [{"grid_hw": (1, 8)}, {"batch_size": 1}])
def test_sizes_that_check_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="pass at least 2 rows and 2 images"):
        check_pruner(Norm(num_keep=2), **sizes)


def test_random_tokens_hold_what_is_needed_and_no_more():
    needs = Needs(hidden=(2,), attention=((1, "cls"),), keys=(1,), projected=True)
    tokens = random_tokens(needs, 2, (3, 2), ragged=True)
    assert not tokens.missing(needs)
    assert tokens.missing(Needs(cls=True, text=True, clip=True)) == ["cls", "text", "clip"]
    assert tokens.valid.sum(dim=1).tolist() == [6, 4]
    one = random_tokens(needs, 1, (3, 2))
    assert torch.equal(one.hidden[2][0], tokens.hidden[2][0])
