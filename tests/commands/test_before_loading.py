"""What is wrong with a command is told before the weights of its model are read."""

from __future__ import annotations

import pytest
import transformers
from small_networks import TRAINED, network_setting

from ocvtp import build_pruner
from ocvtp.cli import main
from ocvtp.hosts.loading import RANDOM_MODELS, check_model, empty_model, load_model, load_processor
from ocvtp.shipped import ROOT

DEMO = "checkpoints/demo-vlm"
IMAGE = str(ROOT / "docs" / "images" / "scene.png")
EVALUATE = ["evaluate", "--model", DEMO, "--task", "scenes", "--num-images", "1"]
RECOMMEND = ["recommend", "--model", DEMO, "--task", "scenes", "--num-images", "1"]
BENCH = ["bench", "--model", DEMO]
EXPLORE = ["explore", "--model", DEMO, "--images", IMAGE]
SHOW = ["show", "--model", DEMO, "--image", IMAGE]
ANSWER = ["answer", "--model", DEMO, "--image", IMAGE, "--prompt", "?"]
DIVPRUNE = ["--pruners", "divprune", "--num-keep", "16"]
TRIM = ["--pruners", "trim", "--num-keep", "16"]
UNREAD = "--checkpoint here would not count: divprune takes no checkpoint; leave it out"
NO_CLIP = "; pass --text-tower checkpoints/demo-vlm/clip, which lies in the model's folder."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*RECOMMEND, "--metric", "nope"], "--metric nope: the figures of this task are easy/"),
        ([*RECOMMEND, *DIVPRUNE, "--checkpoint", "here"], UNREAD),
        ([*RECOMMEND, "--pruners", "divprune", "--checkpoint", "here"], UNREAD),
        ([*EVALUATE, *DIVPRUNE, "--checkpoint", "here"], UNREAD),
        ([*EVALUATE, *DIVPRUNE, "--questions", "0"], "--questions 0: pass at least one of each"),
        ([*EVALUATE, *DIVPRUNE, "--device", "nowhere"], "--device nowhere cannot be used"),
        ([*EVALUATE, "--num-keep", "0"], "--num-keep 0; pass at least 1 token."),
        ([*EVALUATE, "--pruners", "ocvtp", "--num-keep", "9"], "needs a trained network: pass"),
        ([*EVALUATE, "--pruners", "divprune:k=1", "--num-keep", "9"], "has no setting 'k'"),
        ([*EVALUATE, *TRIM], NO_CLIP),
        ([*BENCH, *DIVPRUNE, "--checkpoint", "here"], UNREAD),
        ([*BENCH, "--pruners", "ocvtp:k=1", "--num-keep", "16"], "has no setting 'k'"),
        ([*BENCH, *DIVPRUNE, "--attention", "nope"], "--attention nope cannot be had ("),
        ([*BENCH, *DIVPRUNE, "--image-size", "0", "5"], "--image-size 0 5; pass a width and a"),
        ([*EXPLORE, "--pruners", "zspaprune", "--num-keep", "9", "4"], "error: zspaprune reads"),
        ([*EXPLORE, "--pruners", "zspaprune"], "'zspaprune' says no budget of its own; pass"),
        ([*BENCH, "--pruners", "learned:network=abc", "--num-keep", "9"], "'abc' is no Selector"),
        ([*SHOW, "--pruner", "zspaprune", "--num-keep", "9"], "reads the prompt; pass --prompt"),
        ([*ANSWER, "--pruner", "trim", "--num-keep", "9"], NO_CLIP),
        ([*ANSWER, "--pruner", "none", "--max-new-tokens", "0"], "--max-new-tokens 0; pass"),
        (["probe", "--model", DEMO, "--num-keep", "0"], "--num-keep 0; pass at least 1"),
        (["probe", "--model", DEMO, "--device", "nowhere"], "--device nowhere cannot be used"),
        (["list", "--model", DEMO, "--text-tower", "/no/such"], "/no/such cannot be loaded ("),
        (
            [*ANSWER, "--pruner", "trim", "--num-keep", "9", "--text-tower", "/no/such"],
            "--text-tower /no/such cannot be loaded (",
        ),
        (
            [*ANSWER, "--pruner", "trim", "--num-keep", "9", "--text-tower", DEMO],
            "cannot be loaded (it is a llava, no whole CLIP); pass --text-tower, the hub id",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_weights_are_read(capsys, monkeypatch, tmp_path, words, message):
    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
    monkeypatch.chdir(ROOT)
    writes = words[0] not in ("answer", "probe", "list")
    words = [*words, "--output", str(tmp_path / "out")] if writes else words
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_a_model_without_weights_is_of_the_same_class(name):
    assert type(empty_model(name)) is type(load_model(name)[0])


def test_a_clip_that_no_pruner_reads_is_not_looked_for():
    check_model(DEMO, "auto", "cpu", [build_pruner("divprune", num_keep=4)], "/no/such")


@pytest.mark.parametrize("name", TRAINED[:2])
def test_a_checkpoint_of_another_pruner_is_not_left_aside(capsys, tmp_path, name):
    """One that a pruner reads, and one that none of those named does."""
    paths = {own: str(tmp_path / own) for own in TRAINED[:2]}
    for own, path in paths.items():
        network_setting(own, 8)["network"].save_pretrained(path)
    words = [*EXPLORE, "--pruners", name, "--num-keep", "9", "--checkpoint", *paths.values()]
    assert main([*words, "--output", str(tmp_path / "a.html")]) == 2
    (other,) = paths.keys() - {name}
    told = f"--checkpoint {tmp_path / other} would not count: it is a network of pruner {other}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", [DEMO, "random:tiny-qwen2.5-vl", "random:llava-mid"])
def test_a_processor_alone_is_that_of_the_model(name):
    own = load_processor(name)
    if name != "random:llava-mid":  # whose weights take long to make
        assert own.to_json_string() == load_model(name)[1].to_json_string()
    assert own.tokenizer("a").input_ids
