"""Training by the objective `kept`: feature statistics, resuming, what an export holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_kept import SIZES
from test_training import checkpoints, data, module, trainer
from torch.testing import assert_close

from ocvtp.data.coco import collate
from ocvtp.data.scenes import write_scenes
from ocvtp.encoders.clip import CLIPEncoder
from ocvtp.export import export_checkpoint
from ocvtp.slots.kept import KeptObjective
from ocvtp.slots.matching import one_to_one
from ocvtp.slots.network import OCPruner
from ocvtp.structures import VisualTokens
from ocvtp.training.feature_statistics import measure_statistics
from ocvtp.training.metrics import reconstruction_residual
from ocvtp.training.module import OCPrunerModule
from ocvtp.training.object_masks import object_shares


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, num_train=40, num_val=8, size=96, seed=0)
    return root


def kept_module(**settings):
    settings = {"lr": 3e-3, "weight_decay": 0.0} | settings
    return module(objective=KeptObjective(), network=SIZES, **settings)


def val_loss(model, scenes, tmp_path):
    return trainer(tmp_path).validate(model, data(scenes, model), verbose=False)[0]["val/loss"]


@pytest.mark.slow
def test_fifty_steps_lower_the_loss_and_export_what_was_trained(tmp_path, scenes):
    model = kept_module(statistics_images=30)
    images = data(scenes, model)
    images.setup("fit")
    measure_statistics(model.network, model.tokens_of, images.train_set, collate, 30)
    state = model.network.state_dict().items()
    measured = {k: v for k, v in state if k.startswith(("inputs.", "targets."))}
    assert len(measured) == 6
    before = val_loss(model, scenes, tmp_path)
    model = kept_module(statistics_images=30)
    saver = checkpoints(tmp_path)
    run = trainer(tmp_path, max_steps=50, callbacks=[saver], check_val_every_n_epoch=5)
    run.fit(model, data(scenes, model))
    assert run.global_step == 50
    after = val_loss(model, scenes, tmp_path)
    assert after < 0.95 * before, (before, after)
    for name, value in measured.items():  # on_train_start measured the same, once
        assert_close(model.network.state_dict()[name], value, rtol=0, atol=0)
    assert model.network.targets.num_tokens == 30 * 144
    exported = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    assert (exported.config.objective, exported.config.target_layer) == ("kept", -2)
    for name, value in exported.state_dict().items():
        assert_close(value, model.network.state_dict()[name], rtol=0, atol=0)


def test_masks_of_objects_weigh_in_training_and_validation(tmp_path, scenes):
    model = module(objective=KeptObjective(objects=True), network=SIZES, statistics_images=8)
    masks = data(scenes, model, train_instances=True)
    run = trainer(tmp_path, max_steps=2, limit_val_batches=1)
    run.fit(model, masks)
    assert run.global_step == 2
    assert 0 < val_loss(model, scenes, tmp_path) < 2
    model = module(objective=KeptObjective(objects=True), network=SIZES, statistics_images=8)
    with pytest.raises(ValueError, match="train_instances of the data to true"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, data(scenes, model))


def test_objects_cover_a_share_of_each_patch():
    tokens = VisualTokens(torch.zeros(2, 6, 4), (2, 3))
    instances = torch.zeros(2, 8, 12, dtype=torch.long)
    instances[0, :4, 4:6], instances[1, 6:, 8:] = 3, 1  # half of token 1, half of token 5
    shares = object_shares({"instances": instances}, tokens)
    assert_close(shares, torch.tensor([[0, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.5]]))
    for several in ({"instances": [instances[0], instances[1, :4]]}, {"instances": instances}):
        grids = (
            tokens if isinstance(several["instances"], list) else replace(tokens, grid_hw=(1, 3))
        )
        with pytest.raises(ValueError, match="one token grid for all images"):
            object_shares(several, grids)


def test_a_resumed_run_measures_nothing_again(tmp_path, scenes, monkeypatch):
    model = kept_module(statistics_images=8)
    saver = checkpoints(tmp_path, monitor=None)
    run = trainer(tmp_path, max_steps=2, callbacks=[saver], limit_val_batches=1)
    run.fit(model, data(scenes, model))
    scale = model.network.inputs.scale.clone()
    monkeypatch.setattr("ocvtp.training.feature_statistics.Moments.add", None)  # would fail
    again = kept_module(statistics_images=30)
    run = trainer(tmp_path, max_steps=3, limit_val_batches=1)
    run.fit(again, data(scenes, again), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert run.global_step == 3
    assert_close(again.network.inputs.scale, scale, rtol=0, atol=0)


@pytest.mark.slow
def test_runs_are_the_same_and_bf16_trains(tmp_path, scenes):
    found = []
    for folder, precision in (("a", "32-true"), ("b", "32-true"), ("c", "bf16-mixed")):
        model = kept_module(statistics_images=8)
        run = trainer(tmp_path / folder, max_steps=3, precision=precision, limit_val_batches=1)
        run.fit(model, data(scenes, model))
        found.append({k: v.clone() for k, v in model.network.state_dict().items()})
        torch.manual_seed(99)  # what happened before does not matter
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert all(v.isfinite().all() for v in found[2].values())


@pytest.mark.slow
def test_compiled_steps_train_the_same_network(tmp_path, scenes, monkeypatch):
    """All graphs are of the objective's steps here, and few of them serve all budgets."""
    monkeypatch.setattr(OCPruner, "compiled", ())
    found = []
    for backend in (None, "eager"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        model = kept_module(statistics_images=8, num_slots=[4, 6, 8])
        if backend is not None:
            model.compile_network(backend)
        run = trainer(tmp_path, max_steps=6)
        run.fit(model, data(scenes, model))
        found.append({k: v.clone() for k, v in model.network.state_dict().items()})
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (graphs > 0) == (backend is not None)
        assert graphs <= 12
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_validation_reports_what_is_kept(tmp_path, scenes):
    model = kept_module()
    result = trainer(tmp_path).validate(model, data(scenes, model), verbose=False)[0]
    assert {"val/ridge_error", "val/teacher", "val/coverage_residual"} <= result.keys()
    with torch.no_grad():
        batch = collate([data_set(model, scenes)[i] for i in range(8)])
        tokens, outcome = model._run(batch, model.val_num_slots)
        keep = one_to_one(outcome.attention, model.val_num_slots)[1]
    wanted = reconstruction_residual(tokens.hidden[2], keep).mean()
    assert result["val/coverage_residual"] == pytest.approx(float(wanted), rel=1e-3)


def data_set(model, scenes):
    images = data(scenes, model)
    images.setup("validate")
    return images.val_set


def test_no_readable_image_is_an_error():
    model = kept_module()
    nothing = {"pixel_values": [], "image_sizes": []}
    for images, message in ((30, "no token was counted"), (0, "statistics_images=0")):
        with pytest.raises(ValueError, match=message):
            measure_statistics(model.network, model.tokens_of, [0, 1], lambda _: nothing, images)


def test_a_tower_without_a_cls_has_received_attention(tmp_path, scenes):
    tower = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64}
    tower |= {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 96, "patch_size": 16}
    for weights in ("received", "cls"):
        encoder = CLIPEncoder(tower, layer=1)
        objective = KeptObjective(weights=weights)
        model = OCPrunerModule(encoder, objective, SIZES, [4, 8], 6)
        run = trainer(tmp_path, max_steps=1, limit_val_batches=1)
        if weights == "received":
            run.fit(model, data(scenes, model))
            assert run.global_step == 1
        else:
            with pytest.raises(ValueError, match="no CLS token"):
                run.fit(model, data(scenes, model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": "winners"}, "network.choice to one_to_one or restore"),
        ({"truncation": "bilevel"}, "network.truncation to none"),
        ({"num_iterations": 1}, "num_iterations to at least 2"),
    ],
)
def test_networks_that_it_cannot_train_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        module(objective=KeptObjective(), network=replace(SIZES, **changes))
