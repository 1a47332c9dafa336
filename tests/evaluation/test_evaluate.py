"""Every condition answers every question; stopped runs go on; what is wrong is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from ocvtp import build_pruner
from ocvtp.evaluation import conditions as made
from ocvtp.evaluation import runner
from ocvtp.evaluation.checkpoint_groups import grouped
from ocvtp.evaluation.conditions import Budget, Place
from ocvtp.evaluation.logs import Log
from ocvtp.evaluation.report import write
from ocvtp.evaluation.run import answers_of, evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.scenes import SceneTask
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.pruners import registry
from ocvtp.pruners.methods.uniform import Uniform
from ocvtp.slots import OCPruner, OCPrunerConfig

BUDGETS = [Budget(num_keep=4), Budget(keep_ratio=0.125)]


@pytest.fixture(scope="module")
def subject():
    return Subject(*load_model("random:tiny-llava", "float32"), "random:tiny-llava")


@pytest.fixture(scope="module")
def task():
    return SceneTask(num_images=3, questions=2, size=48)


@pytest.fixture(scope="module")
def few():
    """Questions of one batch."""
    return SceneTask(num_images=1, questions=2, size=48)


@pytest.fixture(scope="module")
def network():
    config = OCPrunerConfig(feature_dim=64, hidden_dim=16, slot_dim=16, ffn_dim=16, layer=1)
    return OCPruner.untrained(replace(config, grid_hw=(12, 12)), 0)


def ask(subject, task, folder, pruners=("fopru",), batch_size=4, **options):
    options = {"controls": ("random", "oracle"), "seeds": [0, 1], **options}
    return evaluate(subject, task, pruners, BUDGETS, folder, batch_size=batch_size, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(subject, task, folder):
    return ask(subject, task, folder)


@pytest.fixture
def finished(whole, folder, tmp_path):
    """A copy of the folder of a finished run."""
    return shutil.copytree(folder, tmp_path / "finished")


def by_hand(subject, task, item, pruner):
    """One answer, without batches, sharing or padding."""
    text = with_template(subject.processor, item.question, 1)
    image = task.image(item.owner)
    inputs = subject.processor(images=[image], text=[text], return_tensors="pt")
    with pruner(subject.model):
        made_ = subject.model.generate(**inputs, do_sample=False, max_new_tokens=4)
    new = made_[0, inputs["input_ids"].shape[1] :]
    return subject.processor.decode(new, skip_special_tokens=True).strip()


def test_every_condition_answers_every_question(whole, task):
    report, records = whole
    rows = {(row.label, round(144 * row.budget)): row for row in report.rows}
    labels = {(label, k) for label in ("fopru", "random", "oracle") for k in (4, 18)}
    assert set(rows) == labels | {("unpruned", 144), ("shuffled", 144)}
    assert all(len(some) == len(task.items) for some in records.values())
    assert rows["random", 4].seeds == 2
    assert {row.visual_tokens for (_, k), row in rows.items() if k == 18} == {18}
    assert rows["unpruned", 144].visual_tokens == 144
    assert rows["fopru", 18].budget == 0.125
    for row in report.rows:
        ratio = row.figures["all"]
        assert len(ratio.hits) == len(task.items)
        assert set(ratio.owners) == set(range(6))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("key", "name"), [("unpruned # 0", "none"), ("fopru @ 4 # 0", "fopru")])
def test_answers_are_those_of_one_question_at_a_time(whole, subject, task, key, name):
    _, records = whole
    pruner = build_pruner(name, **({} if name == "none" else {"num_keep": 4}))
    expected = [by_hand(subject, task, item, pruner) for item in task.items]
    assert [record["answer"] for record in records[key]] == expected


def test_figures_are_means_over_seeds(whole, task):
    report, records = whole
    row = next(row for row in report.rows if (row.label, row.num_keep) == ("random", 4))
    seeds = [task.ratios(records[f"random @ 4 # {seed}"])["all"].hits for seed in (0, 1)]
    np.testing.assert_allclose(row.figures["all"].hits, np.mean(seeds, axis=0))


class KilledError(Exception):
    """In place of the signal that ends a process."""


@pytest.mark.parametrize("after", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 22))])
@pytest.mark.slow
def test_a_killed_run_continues_and_ends_alike(whole, subject, task, tmp_path, monkeypatch, after):
    calls = []

    def ask_or_die(*arguments):
        if len(calls) == after:
            raise KilledError
        calls.append(1)
        return plain(*arguments)

    plain = runner._ask
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_ask", ask_or_die)
        with pytest.raises(KilledError):
            ask(subject, task, tmp_path)
    (cut,) = (path for path in (tmp_path / "answers").iterdir() if "unpruned" in path.name)
    cut.write_bytes(cut.read_bytes()[:-3])  # a line that was being written
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_ask", lambda *a: again.append(1) or plain(*a))
        report, records = ask(subject, task, tmp_path)
    assert records == whole[1]
    total = 10 * -(-len(task.items) // 4)
    assert len(again) == total - after + 1  # what was cut is asked again
    for row, expected in zip(report.rows, whole[0].rows, strict=True):
        assert row.label == expected.label
        assert row.figures["all"].value == expected.figures["all"].value


def test_a_finished_run_asks_for_new_pruners_alone(subject, task, finished, monkeypatch):
    count, plain = [], runner._ask
    monkeypatch.setattr(runner, "_ask", lambda *a: count.append(1) or plain(*a))
    report, _ = ask(subject, task, finished, pruners=["fopru", "uniform"])
    assert len(count) == 2 * -(-len(task.items) // 4)
    assert "uniform" in {row.label for row in report.rows}


@pytest.mark.slow
def test_answers_of_other_settings_are_refused(subject, task, finished):
    with pytest.raises(ValueError, match="other settings"):
        ask(subject, SceneTask(num_images=3, questions=2, size=48, seed=1), finished)
    with pytest.raises(ValueError, match=r"other settings \(batch_size was 4 and is 8\)"):
        ask(subject, task, finished, batch_size=8)


@pytest.mark.slow
def test_images_are_encoded_once_for_all_conditions(subject, few, tmp_path, monkeypatch):
    shared = []
    plain = SharedEncodings.of.__func__

    def of(cls, *arguments):
        shared.append(plain(cls, *arguments))
        return shared[-1]

    monkeypatch.setattr(SharedEncodings, "of", classmethod(of))
    ask(subject, few, tmp_path, pruners=["fopru", "uniform", "divprune"], batch_size=2)
    batches = -(-len(few.items) // 2)
    assert [one.num_encoded for one in shared] == [1, 2 * batches]  # tried; own and other


@pytest.mark.slow
def test_pruners_that_do_not_fit_are_named_before_anything_is_asked(subject, few, tmp_path):
    with pytest.raises(ValueError, match="trim @ 4: .*text_tower") as error:
        ask(subject, few, tmp_path, pruners=["trim", "fopru"])
    assert "fopru" not in str(error.value)
    assert not (tmp_path / "answers").exists()
    report, _ = ask(subject, few, tmp_path, pruners=["trim", "fopru"], skip_unfit=True)
    row = next(row for row in report.rows if row.label == "trim")
    assert "text_tower" in row.note
    assert not row.figures


@pytest.mark.slow
def test_budgets_beyond_every_image_are_named_before_anything_is_asked(subject, few, tmp_path):
    budgets = [Budget(num_keep=1000), Budget(num_keep=16)]
    message = "random @ 1000: num_keep=1000 exceeds the 144 visual tokens that every image"
    with pytest.raises(ValueError, match=message) as error:
        evaluate(subject, few, ["random"], budgets, tmp_path)
    assert "@ 16" not in str(error.value)
    options = {"controls": (), "seeds": [0], "batch_size": 4, "skip_unfit": True}
    report, _ = evaluate(subject, few, ["random"], budgets, tmp_path, **options)
    kept = {row.num_keep: (row.visual_tokens, bool(row.note)) for row in report.rows}
    assert kept[1000] == (None, True)
    assert kept[16] == (16.0, False)


def test_equal_budgets_are_refused(subject, few, tmp_path):
    twice = [Budget(num_keep=18), Budget(keep_ratio=0.125)]
    with pytest.raises(ValueError, match="pass each count once"):
        evaluate(subject, few, ["fopru"], twice, tmp_path)


def test_a_failing_batch_names_its_condition(subject, few, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "_ask", fail)
    with pytest.raises(RuntimeError, match="out of memory") as error:
        ask(subject, few, tmp_path)
    assert "'unpruned # 0' ran on items 0" in error.value.__notes__[0]


@pytest.mark.slow
def test_several_checkpoints_are_averaged_as_seeds(subject, few, tmp_path, network):
    folders = []
    for seed in (0, 1):
        folders.append(str(tmp_path / f"seed{seed}"))
        type(network).untrained(network.config, seed).save_pretrained(folders[-1])
    report, records = ask(
        subject,
        few,
        tmp_path,
        pruners=["ocvtp"],
        checkpoints=folders,
        controls=("untrained", "fill_only"),
        seeds=[5],
    )
    rows = {row.label: row for row in report.rows}
    assert rows["ocvtp"].seeds == 2
    assert rows["ocvtp"].trained
    assert not rows["fill_only"].trained
    assert rows["untrained"].control
    assert {f"ocvtp @ 4 # {number}" for number in (0, 1)} < set(records)
    order = r"checkpoint was '.*seed0' and is '.*seed1'.*in the order of that run, another --output"
    with pytest.raises(ValueError, match=order):
        ask(subject, few, tmp_path, pruners=["ocvtp"], checkpoints=folders[::-1])
    type(network).untrained(network.config, 7).save_pretrained(folders[0])  # other weights
    with pytest.raises(ValueError, match="other settings"):
        ask(subject, few, tmp_path, pruners=["ocvtp"], checkpoints=folders)


def test_a_method_of_yours_is_no_control(subject, few, tmp_path, monkeypatch):
    @dataclass(kw_only=True, eq=False)
    class Mine(Uniform):
        name = "mine"

    monkeypatch.setitem(registry._REGISTRY, "mine", Mine)
    report, _ = ask(subject, few, tmp_path, pruners=["mine"], controls=("uniform",))
    kinds = {row.label: (row.control, row.yours) for row in report.rows}
    assert kinds["mine"] == (False, True)
    assert kinds["uniform"] == kinds["unpruned"] == (True, False)


def checkpoints_of(folder, network, *configs, weights=None):
    """Networks of several seeds, and what their configs say of a training."""
    for number, config in enumerate(configs):
        own = type(network).untrained(
            network.config, number if weights is None else weights[number]
        )
        own.save_pretrained(folder / str(number))
        path = folder / str(number) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"noise_seed": 0, **config}))
    return [str(folder / str(number)) for number in range(len(configs))]


def trained(seed, **settings):
    return {"training": {"seed": seed, "epochs": 5, "validation": {"loss": seed / 7}, **settings}}


def test_checkpoints_that_differ_in_the_seed_alone_are_one_group(tmp_path, network):
    paths = checkpoints_of(tmp_path, network, trained(0), trained(1), trained(2))
    assert grouped(paths) == ([paths], "")
    assert grouped(paths[:1]) == ([paths[:1]], "")
    assert grouped([]) == ([[]], "")


def test_seeds_that_were_trained_with_other_versions_stay_seeds(tmp_path, network):
    configs = [trained(0), trained(1), trained(2)]
    for number, config in enumerate(configs):
        config["training"] |= {
            "versions": {"ocvtp": "0.2.0" if number else "0.1.0", "torch": "2.14.1"},
            "data": {"root": "features", "seed": number, "num_workers": number},
        }
    paths = checkpoints_of(tmp_path, network, *configs)
    found, said = grouped(paths)
    assert found == [paths]
    assert said == (
        f"checkpoints {paths[0]} and {paths[1]} are averaged as seeds of one training, and were"
        " trained with other versions (training.versions.ocvtp: 0.1.0 and 0.2.0)."
    )
    configs[1]["training"]["data"]["root"] = "other"
    assert grouped(checkpoints_of(tmp_path, network, *configs))[0] == [paths[::2], paths[1:2]]


@pytest.mark.parametrize(
    ("configs", "groups", "why"),
    [
        ([trained(0), trained(0, epochs=1)], [[0], [1]], "training.epochs: 5 and 1"),
        ([trained(0), trained(1, epochs=1)], [[0], [1]], "training.epochs: 5 and 1"),
        ([trained(0), trained(1, epochs=1), trained(1)], [[0, 2], [1]], "training.epochs"),
        ([trained(0), {**trained(1), "layer": 2}], [[0], [1]], "layer: 1 and 2"),
        ([trained(0), trained(0)], [[0], [1]], "both are of seed 0, and their weights differ"),
        ([trained(0), {}], [[0], [1]], "training.epochs: 5 and None"),
    ],
)
def test_other_checkpoints_are_told_apart(tmp_path, network, configs, groups, why):
    paths = checkpoints_of(tmp_path, network, *configs)
    found, said = grouped(paths)
    assert found == [[paths[number] for number in group] for group in groups]
    assert why in said


def test_one_run_is_not_two_seeds(tmp_path, network):
    paths = checkpoints_of(tmp_path, network, trained(0), trained(1), weights=[3, 3])
    for twice in (paths, [paths[0], paths[0]]):
        with pytest.raises(ValueError, match="hold the same weights"):
            grouped(twice)


def test_checkpoints_of_another_kind_are_never_averaged(tmp_path):
    paths = []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.bin").write_text(name)
        paths.append(str(tmp_path / name))
    found, said = grouped(paths)
    assert found == [[path] for path in paths]
    assert "cannot be read" in said


@pytest.mark.slow
def test_checkpoints_of_other_trainings_have_rows_of_their_own(subject, few, tmp_path, network):
    paths = checkpoints_of(tmp_path, network, trained(0), trained(1), trained(0, epochs=1))
    given = {"controls": (), "checkpoints": paths}
    report, records = ask(subject, few, tmp_path / "out", pruners=["ocvtp", "fopru"], **given)
    seeds = {row.label: row.seeds for row in report.rows if row.trained}
    assert seeds == {f"ocvtp:checkpoint={paths[0]}": 2, f"ocvtp:checkpoint={paths[2]}": 1}
    (remark,) = report.remarks
    assert "training.epochs: 5 and 1" in remark
    alone = f"ocvtp:checkpoint={paths[2]}"
    again, others = ask(subject, few, tmp_path / "out", pruners=[alone], controls=())
    assert again.rows[-1].label in seeds
    assert others[f"{alone} @ 4 # 0"] == records[f"{alone} @ 4 # 0"]


def write_all(task, report, records, folder):
    write(report, folder, answers_of(task, records))
    return json.loads((folder / "results.json").read_text())


def numbers(found):
    return {(row["label"], row["budget"]): row["figures"] for row in found["rows"]}


@pytest.mark.slow
def test_a_narrower_run_keeps_what_is_there(subject, few, tmp_path, monkeypatch):
    def go(pruners, budgets, **options):
        given = {"batch_size": 4, "seeds": [0, 1], "command": " ".join(pruners), **options}
        return write_all(
            few, *evaluate(subject, few, pruners, budgets, tmp_path, **given), tmp_path
        )

    wide = go(["fopru", "uniform"], BUDGETS, controls=("random", "oracle"))
    asked, plain = [], runner._ask
    monkeypatch.setattr(runner, "_ask", lambda *a: asked.append(1) or plain(*a))
    narrow = go(["fopru"], BUDGETS[:1], controls=())
    assert not asked
    assert numbers(narrow) == numbers(wide)
    kept = [row for row in wide["rows"] if row["label"] == "random"]
    assert [row for row in narrow["rows"] if row["label"] == "random"] == kept
    assert narrow["answers"]["conditions"] == wide["answers"]["conditions"]
    (remark,) = narrow["remarks"]
    assert "`fopru` at 12.5%; `uniform` at 2.78%, 12.5%; `random` at 2.78%, 12.5%" in remark
    assert narrow["settings"]["earlier_commands"] == ["fopru uniform"]
    assert "`uniform`" in (tmp_path / "report.md").read_text()

    other = go(["divprune"], [Budget(num_keep=9)], controls=())
    assert numbers(wide).items() <= numbers(other).items()
    assert ("divprune", 0.0625) in numbers(other)
    assert other["settings"]["earlier_commands"] == ["fopru uniform", "fopru"]


@pytest.mark.slow
@pytest.mark.slow
def test_rows_of_a_folder_of_other_settings_are_refused(subject, few, tmp_path):
    write_all(few, *ask(subject, few, tmp_path, controls=()), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    other = SceneTask(num_images=2, questions=3, size=48)
    with pytest.raises(ValueError, match="other settings"):
        ask(subject, other, tmp_path, pruners=["uniform"], controls=())
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.slow
def test_rows_whose_answers_are_gone_are_not_lost(subject, few, tmp_path):
    """As those of `ocvtp merge` are from the beginning."""
    write_all(few, *ask(subject, few, tmp_path, controls=()), tmp_path)
    for path in (tmp_path / "answers").glob("fopru*"):
        path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"not there.*lost: `fopru` at 2.78%, 12.5%\. Pass anoth"):
        ask(subject, few, tmp_path, pruners=["uniform"], controls=())
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ask(subject, few, tmp_path, controls=())  # which asks for all of them


@pytest.mark.slow
def test_what_cannot_be_run_this_time_keeps_its_figures(subject, few, tmp_path):
    towered = Subject(subject.model, subject.processor, subject.name, "random:tiny")
    wide = write_all(few, *ask(towered, few, tmp_path, pruners=["trim"], controls=()), tmp_path)
    report, _ = ask(subject, few, tmp_path, pruners=["trim"], controls=(), skip_unfit=True)
    rows = [row for row in report.rows if row.label == "trim"]
    assert len(rows) == 2
    assert all(row.figures and not row.note for row in rows)
    (tmp_path / "new").mkdir()
    skipped = ask(subject, few, tmp_path / "new", ["trim"], controls=(), skip_unfit=True)
    write_all(few, *skipped, tmp_path / "new")
    report, _ = ask(subject, few, tmp_path / "new", pruners=["uniform"], controls=())
    assert [row.label for row in report.rows if row.note] == ["trim", "trim"]
    assert report.remarks == []
    assert wide["rows"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "ocvtp bench", "schema": 1}'])
def test_results_that_cannot_be_read_are_not_written_over(subject, task, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results.json .*pass another --output"):
        ask(subject, task, tmp_path, controls=())
    assert (tmp_path / "results.json").read_text() == text


def test_k_in_a_spec_is_the_budget():
    place = Place(0, list)
    found = made.pruner_conditions("fastv:stages=[[1,K]]", BUDGETS, [0], [], 64)
    assert [condition.make(place).stages for condition in found] == [[[1, 4]], [[1, 8]]]
    assert {condition.label for condition in found} == {"fastv:stages=[[1,K]]"}
    (once,) = made.pruner_conditions("fastv:stages=[[1,7]]", BUDGETS, [0], [], 64)
    assert once.budget is None


def test_random_draws_anew_in_every_batch():
    (condition,) = made.pruner_conditions("random", BUDGETS[:1], [3], [], 64)
    assert condition.make(Place(0, list)).seed != condition.make(Place(32, list)).seed
    (other,) = made.pruner_conditions("random", BUDGETS[:1], [4], [], 64)
    assert condition.make(Place(32, list)).seed != other.make(Place(32, list)).seed
    (given,) = made.pruner_conditions("random:seed=9", BUDGETS[:1], [3, 4], [], 64)
    assert given.make(Place(32, list)).seed == 9


def test_untrained_networks_differ_by_seed_and_leave_random_numbers_alone(network):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    conditions = made.untrained_conditions(BUDGETS[:1], [0, 1], network)
    assert torch.rand(1) == expected
    first, second = (c.make(Place(0, list)).network for c in conditions)
    assert isinstance(first, OCPruner)
    assert not torch.equal(first.queries.mean, second.queries.mean) or not torch.equal(
        next(first.parameters()), next(second.parameters())
    )


def test_an_untrained_network_standardises_as_the_trained_one(network):
    like = OCPruner.untrained(replace(network.config, standardize=True, target_layer=-2), 3)
    like.inputs.mean.fill_(2.0)
    like.targets.mean.fill_(3.0)
    found = made.untrained_conditions(BUDGETS[:1], [0], like)
    networks = {c.label: c.make(Place(0, list)).network for c in found}
    assert set(networks) == {"untrained", "untrained:standardize=true"}
    assert networks["untrained"].inputs is None
    assert torch.equal(networks["untrained:standardize=true"].inputs.mean, like.inputs.mean)
    assert all(torch.equal(some.targets.mean, like.targets.mean) for some in networks.values())


def test_answers_depend_on_the_weights_and_the_configuration(tmp_path):
    assert made.content_hash("someone/model") == "someone/model"
    found = set()
    config = "config.json"
    for name, text in (("model.safetensors", b"1"), (config, b"{}"), (config, b"{ }")):
        (tmp_path / name).write_bytes(text)
        found.add(made.content_hash(str(tmp_path)))
    assert len(found) == 3


def test_the_paper_layer_in_towers_of_any_depth():
    assert made.default_layer(24) == 9
    assert made.default_layer(5) == 2
    assert made.default_layer(1) == 1


def test_a_log_forgets_what_was_cut_off(tmp_path):
    log = Log(tmp_path, "x @ 4 # 0", {"a": 1})
    log.append([{"answer": "yes"}, {"answer": "no\nway"}])
    with log.path.open("a") as file:
        file.write('{"answer": "ma')
    again = Log(tmp_path, "x @ 4 # 0", {"a": 1})
    assert again.records == [{"answer": "yes"}, {"answer": "no\nway"}]
    again.append([{"answer": "maybe"}])
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == again.records
    with pytest.raises(ValueError, match="pass another --output"):
        Log(tmp_path, "x @ 4 # 0", {"a": 2})


@pytest.mark.parametrize("line", ["{", "3", "[" * 5000, "\xff"])
def test_a_log_that_is_damaged_is_named(line, tmp_path):
    log = Log(tmp_path, "x @ 4 # 0", {"a": 1})
    log.append([{"answer": "yes"}])
    with log.path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match="jsonl is damaged .*; pass another --output, or delete"):
        Log(tmp_path, "x @ 4 # 0", {"a": 1})


def test_a_log_that_two_runs_wrote_to_is_named(tmp_path):
    log = Log(tmp_path, "x @ 4 # 0", {"a": 1})
    log.append([{"answer": "yes"}] * 3)
    log.refuse_more_than(3)
    with pytest.raises(ValueError, match=r"jsonl is damaged \(3 records of 2 items\)"):
        log.refuse_more_than(2)
