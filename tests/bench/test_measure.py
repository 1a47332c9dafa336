"""One cell on a tiny model: times go to the stage that spends them, memory is what it is."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from ocvtp import build_pruner
from ocvtp.bench import timeline as spans
from ocvtp.bench.measure import Bench
from ocvtp.bench.memory import Watch, cache_bytes, weight_bytes
from ocvtp.bench.samples import PARTS
from ocvtp.bench.timeline import Marks
from ocvtp.bench.variants import flops_of, network_for, variants
from ocvtp.bench.workload import Cell, make_request, tokens_of
from ocvtp.evaluation.runner import Subject
from ocvtp.flops import operations
from ocvtp.hosts.loading import load_model

STAGES = PARTS[:5] + ("decode",)
SPECS = ("ocvtp", "fopru", "fastv:stages=[[1,K]]", "tome", "vprune", "todre:later=true")


def subject_of(name):
    model, processor = load_model(name)
    return Subject(model, processor, name)


@pytest.fixture(scope="module")
def subject():
    return subject_of("random:tiny-llava")


@pytest.fixture(scope="module")
def request_of(subject):
    return make_request(Cell(2, 48, 1), subject.processor, (96, 96))


@pytest.fixture(scope="module")
def inputs(subject, request_of):
    return request_of.prepare(subject.processor, subject.model)


@pytest.fixture(scope="module")
def rows(subject, inputs):
    network = network_for(subject, inputs)
    return variants(SPECS[:5], [16], 144, network=network)


@pytest.fixture(scope="module")
def samples(subject, request_of, rows):
    fast = [row for row in rows if row.label != "ocvtp"]
    return Bench(subject, 4).rounds(request_of, fast, 1, 7, lambda _: None)


@pytest.mark.slow
def test_stages_sum_to_the_whole(samples):
    for name, parts in samples.items():
        assert set(parts) == set(PARTS)
        stages = np.sum([parts[stage] for stage in STAGES], axis=0)
        shares = stages / np.array(parts["whole"])
        assert 0.97 < np.median(shares) <= 1.0, (name, shares)


@pytest.mark.slow
def test_every_stage_is_seen_where_it_runs(samples):
    for name, parts in samples.items():
        for stage in STAGES:
            ran = stage != "select" or name != "unpruned"
            assert (min(parts[stage]) > 0) == ran, (name, stage)
        assert np.all(np.array(parts["around"]) < parts["prefill"])


@pytest.mark.slow
def test_the_timer_costs_less_than_a_hundredth(subject, request_of):
    row = variants(["fopru"], [16], 144)[1]
    whole = Bench(subject, 4).rounds(request_of, [row], 1, 3, lambda _: None)[row.key]["whole"]
    cost = 20e3 * spans.cost_of_a_mark(torch.device("cpu"))
    assert cost < 0.01 * np.median(whole)


def busy(milliseconds):
    def wait(*_):
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            pass

    return wait


@pytest.mark.sampled(2)
@pytest.mark.parametrize("savings", ["default", "none"])  # the projector before or behind
@pytest.mark.parametrize("stage", ["tower", "project", "model", "select", "decode"])
def test_work_is_the_stages_that_does_it(subject, inputs, stage, savings, monkeypatch):
    row = variants(["fopru"], [16], 144, rows=savings)[1]
    host, wait = Bench(subject, 3).host, busy(200)

    def plant(module, args, kwargs):
        given = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        if module is not host.language_model or (given.shape[1] == 1) == (stage == "decode"):
            wait()

    planted = []
    if stage == "select":
        choose = type(row.pruner)._select
        monkeypatch.setattr(type(row.pruner), "_select", lambda *a: (wait(), choose(*a))[1])
    else:
        module = (spans.modules_of(host) | {"decode": [host.language_model]})[stage][0]
        planted.append(module.register_forward_pre_hook(plant, with_kwargs=True))
    try:
        took = Bench(subject, 3)._time(row, inputs, 0.0)
    finally:
        for hook in planted:
            hook.remove()
    name = "prefill" if stage == "model" else stage
    assert took[name] >= 0.2
    slowest = max((s for s in STAGES if s != "preprocess"), key=lambda s: took[s])
    assert slowest == name, took


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_left_behind(subject, inputs, spec):
    row = variants([spec], [16], 144, network=network_for(subject, inputs))[1]
    before = {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m)))
              for m in subject.model.modules()}  # fmt: skip
    own = [dict(vars(part)) for part in row.parts]
    Bench(subject, 2)._time(row, inputs, 0.0)
    after = {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks), set(vars(m)))
             for m in subject.model.modules()}  # fmt: skip
    assert after == before
    assert [set(vars(part)) for part in row.parts] == [set(held) for held in own]


def test_answers_are_the_same_under_the_timer(subject, inputs):
    model, row = subject.model, variants(["fopru"], [16], 144)[1]
    lengths = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    with row.installed(subject):
        plain = model.generate(**inputs, **lengths)
        marks = Marks(time.perf_counter)
        tokens = spans.Tokens(marks, 4, 2, torch.device("cpu"))
        with spans.watching(Bench(subject, 4).host, row.parts, marks):
            marks.start()
            timed = model.generate(**inputs, **lengths, stopping_criteria=[tokens])
    assert torch.equal(plain, timed)
    assert tokens.count == 4


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", ["tiny-llava-next", "tiny-qwen2.5-vl", "tiny-llava-onevision", "tiny-internvl"]
)
def test_other_families_have_all_stages(name):
    subject = subject_of(f"random:{name}")
    request = make_request(Cell(2, 64, 2), subject.processor, (96, 96))
    row = variants(["random"], [4], 16)[1]
    inputs = request.prepare(subject.processor, subject.model)
    tries = [Bench(subject, 3)._time(row, inputs, 0.0) for _ in range(3)]
    stages = [stage for stage in STAGES if stage != "preprocess"]
    assert all(took[stage] > 0 for took in tries for stage in stages), tries
    left = min(1 - sum(took[stage] for stage in stages) / took["whole"] for took in tries)
    assert left < 0.03


def test_text_is_as_long_as_it_is_told_to_be(subject):
    host = Bench(subject, 2).host
    for length in (30, 64, 333):
        request = make_request(Cell(1, length, 2), subject.processor, (96, 96))
        made = request.prepare(subject.processor, subject.model)
        assert tokens_of(host, made) == {"image_tokens": 288, "text_tokens": length}
    with pytest.raises(ValueError, match=r"--text-length 3: the model's chat template alone is"):
        make_request(Cell(1, 3, 1), subject.processor, (96, 96))


def test_memory_of_tensors_that_live():
    weights = torch.zeros(1000)
    marks_read = []
    with Watch([weights], lambda: "tower") as watch:
        a = weights + 1  # 4000 bytes
        b = torch.cat([a, a])  # and 8000
        view = b.view(2, -1)
        marks_read.append(watch.take_peak())
        del a, b
        assert watch.bytes == 8000  # the view keeps it
        del view
        c = weights * 2
        marks_read.append(watch.take_peak())
        weights.t().mul_(1)
        assert watch.bytes == 4000
        del c
    assert marks_read == [12000, 12000]
    assert watch.take_peak() == 4000
    assert watch.bytes == 0


@pytest.mark.slow
def test_memory_and_operations_of_a_request(subject, inputs, rows):
    bench = Bench(subject, 4)
    by_name = {row.label: bench.look(row, inputs) for row in rows}
    text = subject.model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    per_token = 2 * 4 * width * text.num_hidden_layers * 2  # keys and values, fp32, batch 2
    for name, prompt in (("unpruned", 144 + 48), ("fopru", 16 + 48)):
        memory = by_name[name]["memory"]
        assert memory["kv_cache_prompt"] == per_token * prompt
        assert memory["kv_cache"] == per_token * (prompt + 3)  # the last token is not read
        parameters = sum(p.numel() for p in subject.model.parameters())
        assert 4 * parameters <= memory["weights"] == weight_bytes(subject.model)
        assert memory["weights"] < 4.1 * parameters
        assert memory["activations"] > 0
        assert memory["peak"] == max(memory["peak_of_stage"].values())
    assert (
        by_name["ocvtp"]["memory"]["pruner_weights"] > by_name["fopru"]["memory"]["pruner_weights"]
    )
    assert by_name["fopru"]["memory"]["peak"] < by_name["unpruned"]["memory"]["peak"]
    with operations.counter() as counter:
        subject.model(**inputs, logits_to_keep=1)
    found = by_name["unpruned"]["operations"]
    whole = sum(found[stage] for stage in ("tower", "project", "model"))
    true = counter.get_total_flops()  # positions are turned to angles by a product too
    assert whole == pytest.approx(true, rel=1e-4)
    for row in rows:
        formula = flops_of(subject.model, row, {"image_tokens": 144, "text_tokens": 48}, 1)
        seen = {k: v for k, v in by_name[row.label]["operations"].items() if k != "decode"}
        assert 2 * formula["total"] == pytest.approx(sum(seen.values()), rel=0.01), row.key
    kernels = by_name["unpruned"]["kernels"]
    assert all(names for names in kernels.values())
    assert {"tower", "model", "decode"} <= set(kernels)


def test_caches_of_layers_that_differ(subject, inputs):
    row = variants(["fastv:stages=[[1,K]]"], [16], 144)[1]
    memory = Bench(subject, 2).look(row, inputs)["memory"]
    text = subject.model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    layers = text.num_hidden_layers
    assert memory["kv_cache_prompt"] == 16 * width * (192 + (layers - 1) * 64)
    assert cache_bytes(None) == 0


def test_rows_of_savings():
    keys = [row.key for row in variants(["fopru"], [16], 144, rows="each")]
    assert keys == [
        "unpruned",
        "fopru K=16",
        "fopru K=16 [without cut_tower]",
        "fopru K=16 [without project_kept]",
        "fopru K=16 [with compile_select]",
    ]
    (none,) = (row.savings for row in variants(["fopru"], [16], 144, rows="none")[1:])
    assert not any(vars(none).values())


def test_a_pruner_of_halves_keeps_its_parts():
    row = variants(["todre:later=true"], [16], 144)[1]
    assert len(row.parts) > 1
    assert all(a is b for a, b in zip(row.parts, row.parts, strict=True))
    assert build_pruner("fopru", num_keep=4).parts[0] is not row.parts[0]


@pytest.mark.parametrize("name", ["learned", "learned_layers"])
def test_a_selector_to_be_timed_is_as_wide_as_the_model(subject, inputs, name):
    network = network_for(subject, inputs, name)
    assert network.config.widths.projected == subject.model.config.text_config.hidden_size
    pruner = build_pruner(name, num_keep=100, network=network)
    with torch.no_grad(), pruner(subject.model):
        assert subject.model(**inputs).logits.isfinite().all()
