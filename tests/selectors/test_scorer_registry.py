"""Scorers by name, those of a file of one's own, and what is none."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from ocvtp.cli import main
from ocvtp.learning import artifact
from ocvtp.plugins import import_file
from ocvtp.pruners.checks import random_tokens
from ocvtp.selectors import scorer as scorers
from ocvtp.selectors.network import SelectorConfig, SelectorNetwork
from ocvtp.selectors.scorer import Scorer, Scores, Widths, register_scorer, scorer_class

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add-a-scorer.md").read_text()
MINE = '''
from dataclasses import dataclass, field

from torch import nn

from ocvtp.selectors.scorer import Scorer, Scores, register_scorer


@register_scorer("mine_of_a_file")
@dataclass(eq=False)
class Mine(Scorer):
    """One linear map."""

    bias: bool = True
    signs: list[int] = field(default_factory=lambda: [1])

    def build(self, widths):
        self.out = nn.Linear(widths.projected, 1, bias=self.bias)

    def forward(self, tokens, num_keep=None):
        return Scores(self.signs[0] * self.out(tokens.projected.float()).squeeze(2))
'''


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    scorers.list_scorers()  # imports those of the package, once
    monkeypatch.setattr(scorers.SCORERS, "_classes", dict(scorers.SCORERS._classes))
    return scorers.SCORERS._classes


def test_one_of_a_file_is_built_saved_and_read(registry, tmp_path):
    (tmp_path / "my_scorer.py").write_text(MINE)
    import_file(str(tmp_path / "my_scorer.py"))
    assert "mine_of_a_file" in scorers.list_scorers()
    config = SelectorConfig(scorer="mine_of_a_file", sizes={"signs": [-1]}, widths=Widths(8, 8))
    network = SelectorNetwork(config)
    assert network.config.sizes == {"bias": True, "signs": [-1]}
    network.save_pretrained(tmp_path / "out")
    again = SelectorNetwork.from_pretrained(tmp_path / "out")
    tokens = random_tokens(again.scorer.needs, 2, (4, 3))
    assert again(tokens).values.equal(network(tokens).values)
    del registry["mine_of_a_file"]
    with pytest.raises(ValueError, match=r"unknown scorer 'mine_of_a_file'; .* --import FILE"):
        SelectorNetwork.from_pretrained(tmp_path / "out")


def block(language):
    return re.search(rf"```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.slow
def test_the_page_runs(registry, tmp_path, monkeypatch, capsys):
    """Trained, exported and evaluated beside its untrained self, by the words of the page."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("outlying.py").write_text(block("py"))
    Path("outlying.yaml").write_text(block("yaml"))
    for command in block("bash").splitlines():
        assert main(shlex.split(command)[1:]) == 0, command
    said = "scorer 'outlying' before the language model of checkpoints/demo-vlm"
    assert said in capsys.readouterr().out
    config = artifact.config_of("outputs/outlying/exported")
    assert (config["scorer"], config["sizes"]) == ("outlying", {"dim": 32})
    found = json.loads(Path("outputs/outlying/evaluated/results.json").read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert rows["learned"]["trained"]
    assert rows["learned"]["visual_tokens"] == rows["untrained:learned"]["visual_tokens"] == 16


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match="unknown scorer 'promted'; did you mean 'prompted'"):
        scorer_class("promted")


def test_what_is_no_scorer_is_refused(registry):
    class Whole(Scorer):
        def build(self, widths):
            self.out = nn.Linear(1, 1)

        def forward(self, tokens, num_keep=None):
            return Scores(torch.zeros(1, 1))

    @dataclass(eq=False)
    class Half(Scorer):
        def build(self, widths): ...

    for name, cls, message in (
        ("a name", Whole, "scorer name 'a name' is none"),
        ("prompted", dataclass(eq=False)(Whole), "'prompted' is registered already"),
        ("other", nn.Linear, "is no Scorer; derive it"),
        ("other", Half, "'other' lacks forward"),
        (
            "other",
            type("Derived", (scorer_class("pointwise"),), {}),
            "Derived is no dataclass of its",
        ),
        ("other", dataclass(type("Equal", (Whole,), {})), r"write @dataclass\(eq=False\)"),
    ):
        with pytest.raises(ValueError, match=message):
            register_scorer(name)(cls)
    assert "other" not in registry


def test_scores_of_another_shape_are_refused(registry):
    @register_scorer("summed")
    @dataclass(eq=False)
    class Summed(Scorer):
        def build(self, widths): ...

        def forward(self, tokens, num_keep=None):
            return Scores(tokens.projected.sum(dim=(1, 2)))

    network = SelectorNetwork(SelectorConfig(scorer="summed", widths=Widths(8, 8)))
    with pytest.raises(ValueError, match=r"'summed' gave scores of shape \[2\]; return \[B, N\]"):
        network(random_tokens(network.scorer.needs, 2, (4, 3)))
