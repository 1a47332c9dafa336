"""A scorer in an artifact: what config.json says, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from shutil import copytree

import pytest
import torch
from huggingface_hub import hub_mixin

import ocvtp
from ocvtp.pruners.checks import random_tokens
from ocvtp.selectors.network import SelectorConfig, SelectorNetwork
from ocvtp.selectors.scorer import Widths, scorer_class

SIZES = {"dim": 8, "blocks": 1, "heads": 2}
CONFIG = SelectorConfig(
    scorer="prompted",
    sizes=SIZES,
    widths=Widths(8, 6),
    stage="llm_layers",
    layer=3,
    choice={"mmr": 0.5},
    relaxation={"name": "hard_st", "tau": {"geometric": [1.0, 0.3]}},
    host={"model_type": "llava", "num_layers": 4},
    num_slots=(4, 8),
    objective="kl",
    tower="some/tower",
    grid_hw=(4, 3),
)


def test_a_saved_network_is_read_as_it_was(tmp_path):
    network = SelectorNetwork(CONFIG).eval()
    assert network.config.sizes == SIZES | {"text": True, "budget": "none"}
    network.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["format"], saved["format_version"]) == ("ocvtp.pruner", 1)
    again = SelectorNetwork.from_pretrained(tmp_path)
    assert again.config == network.config
    assert SelectorNetwork.read_config(asdict(network.config)) == network.config
    tokens = random_tokens(network.scorer.needs, 2, (4, 3))
    assert again(tokens, 4).values.equal(network(tokens, 4).values)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("learned", {"stage": "llm_input", "layer": None, "num_slots": (0.11, 8)}),
        ("learned_layers", {}),
    ],
)
def test_what_the_hub_gets_is_what_a_pruner_reads(name, changes, tmp_path, monkeypatch):
    network = SelectorNetwork(replace(CONFIG, **changes)).eval()
    stored = tmp_path / "me" / "selector"

    class Hub:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, **kwargs):
            self.repo_id = repo_id
            return self

        def upload_folder(self, folder_path, repo_id, **kwargs):
            assert repo_id == "me/selector"
            copytree(folder_path, stored)
            return "commit"

    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    assert network.push_to_hub("me/selector", token="secret") == "commit"
    files = sorted(path.name for path in stored.iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert "visual-token-pruning" in (stored / "README.md").read_text()
    pruner = ocvtp.build_pruner(name, checkpoint=str(stored), num_keep=4)
    assert pruner.trained.config == network.config
    for key, value in network.state_dict().items():
        assert value.equal(pruner.trained.state_dict()[key])


def test_it_says_where_it_acts():
    assert SelectorNetwork(CONFIG).describe() == "scorer 'prompted' before layer 3 of some/tower"


def test_an_untrained_one_has_the_statistics_of_the_trained():
    trained = SelectorNetwork(CONFIG)
    trained.scorer.inputs.mean += 3.0
    one, same, other = (SelectorNetwork.untrained(CONFIG, s, trained) for s in (1, 1, 2))
    assert one.scorer.inputs.mean.equal(trained.scorer.inputs.mean)
    assert one.scorer.reduce.weight.equal(same.scorer.reduce.weight)
    assert not one.scorer.reduce.weight.equal(other.scorer.reduce.weight)


def test_one_is_built_of_a_scorer_and_the_facts_of_a_run():
    scorer = scorer_class("prompted")(**SIZES)
    network = SelectorNetwork.build(scorer, None, widths=Widths(8, 6), num_slots=[4])
    assert network.config == SelectorConfig(
        scorer="prompted", sizes=scorer.sizes(), widths=Widths(8, 6), num_slots=(4,)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stage": "encoder"}, "stage='encoder'; pass one of llm_input, llm_layers"),
        ({"positions": "none"}, "positions='none'; pass one of contiguous, original"),
        ({"stage": "llm_input"}, "stage='llm_input', layer=3; pass a layer with the stage"),
        ({"layer": None}, "stage='llm_layers', layer=None; pass a layer"),
    ],
)
def test_what_does_not_go_together_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changed)


def test_a_column_after_the_prompt_is_not_there_before_the_language_model():
    vip = {"scorer": "vip", "widths": Widths(8, 6, 2), "sizes": {"learnt": True}}
    with pytest.raises(ValueError, match="'vip' reads a column .*pass the stage llm_layers"):
        SelectorNetwork(SelectorConfig(**vip))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": {"dims": 3}}, "scorer 'prompted' has no setting 'dims'"),
        ({"scorer": "prompter"}, "unknown scorer 'prompter'; did you mean 'prompted'"),
        ({"gait": {}}, r"unknown settings \['gait'\]"),
        ({"widths": {"projected": 8}}, "missing 1 required positional argument: 'tower'"),
    ],
)
def test_a_wrong_config_is_one_error(changed, message, tmp_path):
    SelectorNetwork(CONFIG).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"does not hold a learned selector: .*{message}"):
        SelectorNetwork.from_pretrained(tmp_path)


def test_other_tokens_are_refused():
    network = SelectorNetwork(CONFIG)
    tokens = random_tokens(network.scorer.needs, 2, (4, 3))
    wide = torch.zeros(2, 12, 9)
    where = r" is 9 wide, .* a width of 8 \(llava on some/tower\); pass a checkpoint"
    for name in ("projected", "text"):
        with pytest.raises(ValueError, match=name + where):
            network(replace(tokens, **{name: wide}))
    with pytest.raises(ValueError, match="'prompted' reads text, which the given visual tokens"):
        network(replace(tokens, text=None))
