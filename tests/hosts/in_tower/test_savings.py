"""What nobody reads does not run, and nothing changes by that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from threading import Thread
from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    IMG,
    ONE,
    Scripted,
    ask,
    assert_close,
    fingerprint,
    make_batch,
    num_registers,
)
from reference_internvl import make_internvl
from reference_next import make_next
from reference_onevision import make_onevision
from reference_tower import blocks_of
from tiny_models import DINOS, _llava, tiny_llava, tiny_vision
from tiny_onevision import tiny_onevision
from tiny_qwen import ONE as ONE_OF_ANY_SIZE
from tiny_qwen import make_batch as make_qwen_batch
from tiny_qwen import tiny_qwen
from torch import Tensor

from ocvtp import Needs, OCPruner, Pruner, attach, build_pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.base import Savings
from ocvtp.hosts.prompt.select import compiled
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.pruners.budgets import Budget
from ocvtp.slots import OCPrunerConfig
from ocvtp.towers import taps

pytestmark = pytest.mark.sampled(2)

NONE = Savings(cut_tower=False, project_kept=False)
ROWS = [(5, IMG, 4), (3, IMG, 2, IMG, 6)]
ANYWHERE, WITH_CLS = ["none", "divprune", "random"], ["fastervlm", "visionzip", "prumerge"]
IN_TOWER = ["early", "vprune"]
SERVED = {
    "llava": [*ANYWHERE, *WITH_CLS, *IN_TOWER],
    "llava_siglip": [*ANYWHERE, *IN_TOWER],
    "dinov3_vit": [*ANYWHERE, *WITH_CLS, *IN_TOWER],
    "llava_next": [*ANYWHERE, *WITH_CLS, *IN_TOWER],
    "internvl": [*ANYWHERE, *WITH_CLS],
    "onevision": [*ANYWHERE, *IN_TOWER],
    "qwen": ANYWHERE,
}


def build(name: str, num_keep: int = 5) -> Pruner:
    if name == "early":
        torch.manual_seed(0)
        sizes = {"feature_dim": 32, "hidden_dim": 16, "slot_dim": 8, "ffn_dim": 16}
        network = OCPruner(OCPrunerConfig(**sizes, grid_hw=(4, 4), layer=3)).eval()
        return build_pruner("ocvtp", num_keep=num_keep, network=network, early=True)
    return build_pruner(name, num_keep=num_keep)


@contextmanager
def counted(modules: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    """The rows that each of these modules is called on, all but their width."""
    found: dict[str, list[int]] = {name: [] for name in modules}

    def note(name: str) -> Any:
        return lambda _, args, out: found[name].append(out.numel() // out.shape[-1])

    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def halves(model: Any) -> dict[str, Any]:
    """A linear layer of every half of a block of a LLaVA's tower."""
    found: dict[str, Any] = {}
    for i, block in enumerate(blocks_of(model.model.vision_tower)):
        for half, part in ((f"attention {i}", first_half(block)), (f"MLP {i}", block.mlp)):
            found[half] = next(m for m in part.modules() if isinstance(m, torch.nn.Linear))
    return found


def first_half(block: Any) -> Any:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


@torch.no_grad()
def logits(model: Any, pruner: Pruner, inputs: Any, **options: Any) -> Tensor:
    with pruner(model, **options):
        output: Tensor = model(**inputs).logits
    return output


def left_out(model: Any, pruner: Pruner, inputs: Any, **options: Any) -> set[str]:
    with counted(halves(model)) as found:
        logits(model, pruner, inputs, **options)
    assert all(len(calls) < 2 for calls in found.values())
    return {name for name, calls in found.items() if not calls}


@pytest.mark.usefixtures("untouched")
@pytest.mark.sampled(4)
@pytest.mark.parametrize("tower", ["llava", "llava_siglip", *DINOS])
def test_blocks_run_as_far_as_somebody_reads(tower: str, request: pytest.FixtureRequest) -> None:
    model = tiny_llava(tower) if tower in DINOS else request.getfixturevalue(tower)
    inputs = make_batch(ONE, registers=num_registers(model))
    last = find_host(model).num_tower_blocks - 1  # layer -2 goes to the projector
    after = {f"attention {last}", f"MLP {last}"}

    def reads(**needs: Any) -> Pruner:
        return Scripted(wants=Needs(**needs))

    assert left_out(model, reads(), inputs) == after
    assert left_out(model, reads(hidden=(2,), keys=(1,)), inputs) == after
    assert left_out(model, reads(attention=((-1, "received"),)), inputs) == {f"MLP {last}"}
    assert left_out(model, reads(keys=(-1,)), inputs) == {f"MLP {last}"}
    assert left_out(model, reads(hidden=(-1,)), inputs) == set()
    assert left_out(model, reads(), inputs, savings=Savings(cut_tower=False)) == set()
    chosen = inputs | {"vision_feature_layer": 2}
    assert len(left_out(model, reads(), chosen)) == 2 * (last - 1)
    assert left_out(model, reads(), inputs | {"vision_feature_layer": [-1]}) == set()


def test_a_pooling_head_does_not_run() -> None:
    vision = tiny_vision("siglip")
    vision.vision_use_head = True
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"}
    model, inputs = _llava(vision, **settings), make_batch(ONE)
    tower = model.model.vision_tower
    with counted({"head": tower.head, "inside": tower.head.mlp}) as found:
        kept = logits(model, build("random"), inputs)
        assert found["inside"] == []
        with_head = logits(model, build("random"), inputs, savings=NONE)
        assert found["inside"] != []
    assert kept.equal(with_head)


@pytest.fixture(scope="session")
def cases(llava: Any, llava_siglip: Any, llava_next: Any, internvl: Any) -> dict[str, Any]:
    return {
        "llava": (llava, make_batch(ROWS)),
        "llava_siglip": (llava_siglip, make_batch(ROWS)),
        "dinov3_vit": (tiny_llava("dinov3_vit"), make_batch(ROWS, registers=4)),
        "llava_next": (llava_next, make_next(ROWS)),
        "internvl": (internvl, make_internvl(ROWS)),
        "onevision": (tiny_onevision(), make_onevision(ROWS)),
        "qwen": (tiny_qwen(), make_qwen_batch(ONE_OF_ANY_SIZE)),
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case, served in SERVED.items() for name in served]
)
@pytest.mark.filterwarnings("ignore:the processor")
def test_nothing_changes(cases: Any, case: str, name: str) -> None:
    model, inputs = cases[case]
    host, pruner, given = find_host(model), build(name), dict[str, Any]()
    if name in IN_TOWER:
        given["budget"] = "per_tile"
    expected = logits(model, pruner, inputs, savings=NONE, **given)
    cut = logits(model, pruner, inputs, savings=Savings(project_kept=False), **given)
    assert cut.equal(expected)
    saved = logits(model, pruner, inputs, **given)
    assert_close(saved, expected, 0 if name == "none" else 1e-5)
    with pruner(model, savings=NONE, **given) as handle:
        assert handle.savings == NONE
        answer = ask(model, inputs)
    with pruner(model, **given) as handle:
        assert ask(model, inputs).equal(answer)
        saves = handle.savings
    assert saves.project_kept == (case != "qwen" and not pruner.tower_needs.projected)
    assert host.savings_for(pruner.tower_needs) == saves or pruner.stage != "llm_input"


def test_internvl_is_cut_where_it_reads_an_earlier_layer(cases: Any) -> None:
    model, inputs = deepcopy(cases["internvl"][0]), cases["internvl"][1]
    blocks = model.model.vision_tower.encoder.layer
    modules = {str(i): block.attention.projection_layer for i, block in enumerate(blocks)}
    assert not find_host(model).savings_for(Needs()).cut_tower  # its last layer, after the norm
    for layer in (-1, -3):
        model.config.vision_feature_layer = layer
        full = logits(model, build("random"), inputs, savings=NONE)
        with counted(modules) as found:
            cut = logits(model, build("random"), inputs)
        assert [name for name, calls in found.items() if not calls] == [
            str(i) for i in range(len(blocks) + layer + 1, len(blocks))
        ]
        assert_close(cut, full, 1e-5)
    assert find_host(model).savings_for(Needs()).cut_tower


@pytest.mark.parametrize(
    ("case", "num_rows"), [("llava", 15), ("llava_next", 15), ("internvl", 15)]
)
def test_the_projector_runs_on_kept_rows(cases: Any, case: str, num_rows: int) -> None:
    model, inputs = cases[case]
    with counted({"projector": model.model.multi_modal_projector.linear_1}) as found:
        for name in ("fastervlm", "visionzip"):
            logits(model, build(name), inputs)
        assert found["projector"] == [num_rows, num_rows]
        found["projector"].clear()
        logits(model, build("divprune"), inputs)  # reads all
        logits(model, build("fastervlm"), inputs, savings=Savings(project_kept=False))
        whole, again = found["projector"]
        assert whole == again > num_rows
        logits(model, build("none"), inputs)  # all, as one product, also what unpadding removes
        assert found["projector"][2:] == [whole]


def test_images_whose_tokens_are_resized_are_projected_as_a_whole() -> None:
    model, inputs = tiny_onevision(), make_onevision(ONE, sizes=[(224, 224)])
    with counted({"projector": model.model.multi_modal_projector.linear_1}) as found:
        saved = logits(model, build("random"), inputs)
    assert found["projector"] == [17 * 16]
    assert saved.equal(logits(model, build("random"), inputs, savings=NONE))


def test_shared_encodings_project_for_each_pruner(cases: Any) -> None:
    model, inputs = cases["llava"]
    pruners = [build(name) for name in ("divprune", "fastervlm", "visionzip", "none")]
    shared = SharedEncodings.of(model, pruners)
    for pruner in pruners:
        for savings in (Savings(), NONE):
            alone = logits(model, pruner, inputs, savings=savings)
            assert logits(model, pruner, inputs, savings=savings, shared=shared).equal(alone)


@pytest.mark.usefixtures("untouched")
@torch.no_grad()
def test_the_tower_runs_whole_for_everybody_else(llava: Any) -> None:
    pixels = make_batch(ONE)["pixel_values"]

    def bare() -> Any:
        return llava.model.vision_tower(pixels, output_hidden_states=True)

    expected, found = bare(), []
    with build("fastervlm")(llava):
        found.append(bare())
        assert llava.model.get_image_features(pixels).pooler_output[0].abs().max() > 0
        with taps.recording() as record:  # as in a call of ours
            record.first_unread = 0
            assert bare().last_hidden_state.equal(expected.hidden_states[0])
            thread = Thread(target=lambda: found.append(bare()))
            thread.start()
            thread.join()
    assert len(found) == 2
    for output in found:
        assert output.pooler_output.equal(expected.pooler_output)
        for states, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert states.equal(wanted)


def test_training_the_tower_and_the_projector(llava: Any) -> None:
    inputs = make_batch(ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] % 100 == 0, -100)
    found = []
    for savings in (NONE, Savings()):
        model = deepcopy(llava).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with build("fastervlm")(model, savings=savings):
            model(**inputs, labels=labels, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, saved = found
    assert any("vision_tower" in name for name in saved)
    assert any("projector" in name for name in saved)
    for name, gradient in plain.items():
        if name in saved:
            assert_close(saved[name], gradient, 1e-5)
        else:
            assert not gradient.any(), name  # of a block that nobody read


@pytest.mark.slow
@torch.no_grad()
def test_compiled_modules_run_whole(llava: Any) -> None:
    inputs = make_batch(ONE)
    expected = logits(llava, build("random"), inputs)
    for when in ("before", "after"):
        model = deepcopy(llava)
        torch.compiler.reset()
        parts = (model.model.vision_tower, model.model.multi_modal_projector)
        if when == "before":
            [part.compile(backend="eager") for part in parts]
            assert find_host(model).savings_for(Needs()) == NONE
        with build("random")(model):
            if when == "after":
                parts[0].compile(backend="eager")
            assert_close(model(**inputs).logits, expected, 1e-5)


def test_copies_of_an_attached_model(llava: Any) -> None:
    inputs = make_batch(ONE)
    expected = logits(llava, build("fastervlm"), inputs)
    with build("fastervlm")(llava):
        copy = deepcopy(llava)
    blocks = copy.model.vision_tower.encoder.layers
    assert blocks[0].forward.__self__ is blocks[0]
    with torch.no_grad():
        assert copy(**inputs).logits.equal(expected)


def test_what_was_there_before_is_there_again(llava: Any) -> None:
    model = deepcopy(llava)
    block = model.model.vision_tower.encoder.layers[-1]
    plain = block.forward
    block.__dict__["forward"] = before = lambda *args, **kwargs: plain(*args, **kwargs)
    model(**make_batch(ONE))
    state = fingerprint(model)
    handle = attach(model, build("random"))
    assert block.__dict__["forward"] is not before
    handle.remove()
    handle.remove()
    assert fingerprint(model) == state
    handle = attach(model, build("random"))
    block.__dict__["forward"] = after = lambda *args, **kwargs: plain(*args, **kwargs)
    handle.remove()
    assert block.__dict__["forward"] is after


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cut_tower='no'; pass True or False"):
        Savings(cut_tower="no")  # type: ignore[arg-type]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_selections(llava: Any) -> None:
    """With the compiler that users have; one method, in calls of several shapes."""
    pruner = build("fastervlm")
    with pruner(llava, savings=Savings(compile_select=True)) as handle:
        assert handle.savings.compile_select
        found = [llava(**make_batch(rows)).logits for rows in (ONE, ROWS, BATCH)]
    for rows, compiled_logits in zip((ONE, ROWS, BATCH), found, strict=True):
        assert compiled_logits.equal(logits(llava, pruner, make_batch(rows)))


@pytest.mark.slow
def test_graphs_of_many_pruners(llava: Any) -> None:
    """Each has graphs of its own: dynamo makes but eight of one function."""
    seen: list[Any] = []
    for num_keep in range(2, 12):
        pruner = build("fastervlm", num_keep)
        with pruner(llava, on_prune=seen.append, savings=NONE):
            llava(**make_batch(ROWS))
        tokens, expected = seen[-1].encoded.tokens, seen[-1].selection.keep_indices
        run = compiled(pruner, "eager")
        assert compiled(pruner, "eager") is run
        assert run(pruner, tokens).keep_indices.equal(expected)
    run = compiled(pruner, "eager")  # and so has each budget that calls give one pruner
    for num_keep in (*range(2, 11), 10):
        own = pruner.with_budget(Budget(num_keep=num_keep))
        assert run(own, tokens).keep_indices.equal(own.select(tokens).keep_indices)


def test_only_pruners_in_front_of_the_language_model_compile(llava: Any) -> None:
    wanted = Savings(compile_select=True)
    for name, compiles in (("random", True), ("vprune", False)):
        with build(name)(llava, savings=wanted) as handle:
            assert handle.savings.compile_select == compiles


def test_a_selection_that_is_no_graph_is_refused(llava: Any) -> None:
    def choose(tokens: Any) -> Any:
        torch._dynamo.graph_break()

    pruner = Scripted(choose=choose)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        logits(llava, pruner, make_batch(ONE), savings=Savings(compile_select=True))
