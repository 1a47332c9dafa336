"""Official forms, beside which `select` is timed, keep what the pruners keep."""

from __future__ import annotations

import pytest
import torch

import ocvtp
from benchmarks import select
from benchmarks.official_forms import FORMS


@pytest.mark.parametrize("num_keep", [1, 9])
@pytest.mark.parametrize("name", FORMS)
def test_official_forms_keep_what_pruners_keep(name, num_keep):
    tokens = select.make_tokens(3, (6, 6), 24)
    pruner = ocvtp.build_pruner(name, num_keep=num_keep)
    with torch.inference_mode():
        form = FORMS[name](tokens, num_keep).sort(dim=1).values
        assert form.equal(pruner.select(tokens).keep_indices)
