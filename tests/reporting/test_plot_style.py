"""What tells lines apart in all plots."""

from __future__ import annotations

from ocvtp.reporting.plot_style import COLOURS, GREY, MARKERS, marks


def test_no_two_methods_look_alike_and_controls_are_grey():
    labels = [f"p{number}" for number in range(64)]
    found = marks([*labels, *labels], ["random", "pool"])
    assert list(found) == [*labels, "random", "pool"]
    looks = [(mark.colour, mark.marker) for mark in found.values()]
    assert len(set(looks)) == 66
    assert {colour for colour, _ in looks[:8]} == set(COLOURS)
    assert {marker for _, marker in looks[:8]} == set(MARKERS)
    assert [found[name].colour for name in ("random", "pool")] == [GREY, GREY]
    assert found["random"].style()["mfc"] == "white" != found["p0"].style().get("mfc")
