"""Every feature on every host, as far as it is to be had; `make hosts` records what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matrix.exclusions import EXCLUSIONS, find_exclusion
from matrix.families import FAMILIES, Family, untouched
from matrix.features import FEATURES, SLOW
from matrix.supplies import SUPPLIES, check_supply

from benchmarks import hosts, table
from ocvtp.hosts.registry import HOSTS

pytestmark = pytest.mark.versions
Record = Callable[[str, Any], None]
FEATURE_PARAMS = [
    pytest.param(title, id=check.__name__, marks=[pytest.mark.slow] if title in SLOW else [])
    for title, check in FEATURES.items()
]
TOWER_PARAMS = [
    pytest.param(family, tower, id=f"{family.host}-{tower}")
    for family in FAMILIES
    for tower in family.towers
]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.host)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """Its model is the same after the test as before it, but for what every call changes."""
    with untouched(request.param) as family:
        yield family


@pytest.mark.slow
@pytest.mark.parametrize("title", FEATURE_PARAMS)
def test_feature(family: Family, title: str, record_property: Record) -> None:
    exclusion = find_exclusion(family.host, title)
    outcome = "yes" if exclusion is None else exclusion.reason
    record_property("features", (family.host, title, outcome))
    check = FEATURES[title] if exclusion is None else exclusion.shows
    check(family)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "tower"), TOWER_PARAMS)
def test_supplies(family: Family, tower: str, record_property: Record) -> None:
    model = family.towers[tower]()
    for title, needs in SUPPLIES.items():
        supplied = check_supply(family, model, needs)
        record_property("supplies", (f"{family.host}, {tower}", title, supplied))


def test_every_host_is_here() -> None:
    types = {name for host in HOSTS.values() for name in host.model_types}
    assert types == {family.host for family in FAMILIES}


def test_exclusions_are_of_features_and_hosts() -> None:
    names = {family.host for family in FAMILIES}
    for exclusion in EXCLUSIONS:
        assert exclusion.title in FEATURES
        assert names.issuperset(exclusion.hosts)


def test_the_recorded_results_are_those_of_this_matrix() -> None:
    results = json.loads((table.RESULTS / "hosts.json").read_text())
    assert len({result["transformers"] for result in results}) == 2
    towers = [f"{family.host}, {tower}" for family in FAMILIES for tower in family.towers]
    for result in results:
        assert list(result["features"]) == [family.host for family in FAMILIES]
        assert all(list(row) == list(FEATURES) for row in result["features"].values())
        assert list(result["supplies"]) == towers
        assert all(list(row) == list(SUPPLIES) for row in result["supplies"].values())


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The tables of a feature's outcomes on a newer and an older version."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)

    def tables(newer: str, older: str, supplied: bool = True) -> str:
        results = [
            {"transformers": name, "features": {"llava": {"beams": outcome}}, "supplies": {
                "llava, CLIP": {"keys": supplied or name == "9.1"},
            }}
            for name, outcome in (("9.1", newer), ("9.0", older))
        ]  # fmt: skip
        (tmp_path / "hosts.json").write_text(json.dumps(results))
        return table.hosts_tables()

    return tables


@pytest.mark.parametrize(
    ("newer", "older", "cell", "notes"),
    [
        ("yes", "yes", "yes", []),
        ("yes", "it is wrong", "yes (1)", ["(1) transformers 9.0: it is wrong."]),
        ("it is slow", "it is slow", "no (1)", ["(1) it is slow."]),
        (
            "it is slow",
            "it is wrong",
            "no (1) (2)",
            ["(1) transformers 9.1: it is slow. (2) transformers 9.0: it is wrong."],
        ),
    ],
)
def test_tables_say_which_version_lacks_what(
    recorded: Callable[..., str], newer: str, older: str, cell: str, notes: list[str]
) -> None:
    lines = recorded(newer, older).splitlines()
    assert lines[0] == "Random tiny models, on transformers 9.1 and 9.0."
    assert f"| beams | {cell} |" in lines
    assert [line for line in lines if line.startswith("(")] == notes
    assert lines[-1] == "| `llava`, CLIP | yes |"


def test_what_one_version_lacks_is_not_supplied(recorded: Callable[..., str]) -> None:
    assert recorded("yes", "yes", supplied=False).splitlines()[-1] == "| `llava`, CLIP | - |"


def test_nothing_is_recorded_of_a_matrix_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda *args: pytest.ExitCode.TESTS_FAILED)
    with pytest.raises(ValueError, match="ended with status 1; mend what fails first"):
        hosts.record()
