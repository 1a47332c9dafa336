"""Under a pruner that keeps all, calls give what the bare model gives, or are refused by name.

What the bare model itself refuses is refused in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from matrix.families import EVERY_FAMILY, Family, untouched
from matrix.forward_arguments import FORWARD
from matrix.generate_arguments import GENERATE
from matrix.keep_all import (
    OF_IMAGES,
    OF_THE_MODEL,
    PRUNERS,
    Table,
    differences,
    error_in,
    outcome,
    refusals,
)

INSTALLED = tuple(map(int, version("transformers").split(".")[:2]))
TABLES = (FORWARD, GENERATE)
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def calls() -> Iterator[Any]:
    """Every argument set; slow ones marked."""
    for table in TABLES:
        for title, entry in table.entries.items():
            marks = [pytest.mark.slow] if entry.slow else []
            yield pytest.param(table, title, id=f"{table.method}-{title}", marks=marks)


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """Its model is the same after all tests as before them, but for what every call changes."""
    outcome(request.param, FORWARD, "`output_hidden_states`", None)  # it installs hooks
    with untouched(request.param) as family:
        yield family


@cache
def bare(family: Family, number: int, title: str) -> Any:
    return outcome(family, TABLES[number], title, None)


@pytest.mark.covering(2)
@pytest.mark.sampled(40)
@pytest.mark.versions
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(("table", "title"), list(calls()))
def test_calls_are_those_of_the_bare_model(
    family: Family, table: Table, title: str, pruner: str
) -> None:
    if INSTALLED < table.entries[title].since:
        pytest.skip("this version of transformers is wrong without a pruner")
    entry, attached = table.entries[title], outcome(family, table, title, pruner)
    if entry.refused is not None:
        with pytest.raises(ValueError, match=entry.refused):
            raise error_in(attached) or AssertionError("it was not refused")
        return
    expected = bare(family, TABLES.index(table), title)
    if (error := error_in(expected)) is not None:
        with pytest.raises(type(error), match=entry.raises or "^$"):
            raise error
    left_out = OF_THE_MODEL if pruner == "none" else (*OF_IMAGES, *OF_THE_MODEL)
    assert differences(expected, attached, left_out=left_out) == []


def test_refusals_and_what_to_do_instead_are_documented() -> None:
    page = PAGE.read_text()
    for table in TABLES:
        assert refusals(table) in page, f"docs/compatibility.md lacks:\n{refusals(table)}"


def test_differences_are_found() -> None:
    """The comparison can fail."""
    import torch

    one = {"a": torch.arange(3.0), "b": [1, (torch.zeros(2), "x")]}
    assert differences(one, {"a": torch.arange(3.0), "b": [1, (torch.zeros(2), "x")]}) == []
    other = {"a": torch.arange(3), "b": [2, (torch.ones(2), "y"), 3]}
    assert differences(one, other) == [
        ".a: [3] torch.float32 and [3] torch.int64",
        ".b: 2 and 3 of them",
    ]
    other["b"] = [2, (torch.ones(2), "y")]
    found = [".b[0]: 1 and 2", ".b[1][0]: other numbers", ".b[1][1]: 'x' and 'y'"]
    assert differences(one, other)[1:] == found
    assert differences(one, {"b": 1}) == [": ['a', 'b'] and ['b']"]
    assert differences(ValueError("a"), ValueError("b")) == [
        ": ValueError('a') and ValueError('b')"
    ]
