"""The loss that the documentation adds in a file of one's own."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ocvtp.plugins import import_file
from ocvtp.selectors.losses import build_losses, list_losses, weighed
from ocvtp.selectors.losses.base import LOSSES
from tests.selectors.losses.steps import draw
from tests.test_extension_points import page


@pytest.fixture
def unlike(tmp_path, monkeypatch):
    """The page's file, imported as `ocvtp --import` does; forgotten after the test."""
    monkeypatch.setattr(LOSSES, "_classes", dict(LOSSES._classes))
    file = tmp_path / "unlike.py"
    file.write_text(page("add-a-loss.md"))
    import_file(str(file))
    yield build_losses({"unlike": {"free": 0.3}})[0]
    del sys.modules["unlike"]


def test_it_is_known_and_says_its_settings(unlike):
    assert "unlike" in list_losses()
    assert unlike.settings() == {"weight": 1.0, "free": 0.3}
    with pytest.raises(ValueError, match="no setting 'fre'; did you mean 'free'?"):
        build_losses({"unlike": {"fre": 1}})
    with pytest.raises(ValueError, match="the loss 'unlike' reads 'gates', which this step lacks"):
        unlike(replace(draw(), gates=None))


def test_its_value_is_that_of_a_loop_and_its_gradient_reaches_the_scores(unlike):
    step = draw((6, 4))
    found = unlike(step)
    for b, count in enumerate((6, 4)):
        total = weights = 0.0
        for i in range(count):
            for j in range(count):
                if i != j:
                    x, y = step.tokens.features[b, [i, j]]
                    weight = step.gates.values[b, i] * step.gates.values[b, j]
                    cosine = torch.cosine_similarity(x, y, dim=0)
                    total = total + weight * (cosine - 0.3).clamp(min=0)
                    weights = weights + weight
        assert_close(found.values[b], total / weights)
    losses = [unlike, *build_losses({"kl": {}})]
    weighed(losses, step)[0].backward()
    assert ((step.scores.grad != 0) == step.real).all()
