import json
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import distributed
from torch.utils.data import Dataset

from ocvtp.data.loader import ResumableLoader, StreamSampler
from ocvtp.data.module import CocoDataModule, SceneDataModule
from ocvtp.data.scenes import write_scenes
from ocvtp.images import limit_pixels, most_pixels, read_jpeg_on

NUM_TRAIN, BATCH = 23, 4
BATCHES = NUM_TRAIN // BATCH


class Identity:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    def instance_map(self, ids):
        return torch.from_numpy(ids.astype(np.int64))

    def describe(self):
        return {}


class Recorder(pl.LightningModule):
    """Notes the images of every training batch and a number of the global generator."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.val_seen, self.noise = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["image_ids"])
        self.noise.append(float(torch.rand(())))
        return self.layer(batch["pixel_values"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.val_seen.append((batch["image_ids"], batch.get("instances")))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "set"
    write_scenes(folder, num_train=NUM_TRAIN, num_val=3, size=48, seed=0)
    return folder


def data_module(root, **options):
    return CocoDataModule(str(root), **({"batch_size": BATCH, "transform": Identity()} | options))


def fit(data, folder, ckpt=None, saved="step", val=False, **options):
    """Fit; checkpoints go to `folder` as step=N.ckpt, and final.ckpt after the end."""
    every = {"step": {"every_n_train_steps": 1}, "epoch": {"every_n_epochs": 1}}[saved]
    callback = pl.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=None if val else 0,
            **({"max_epochs": -1} | options),
        )
        recorder = Recorder()
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt)
        trainer.save_checkpoint(folder / "final.ckpt")
    return recorder


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    """The batches of five epochs."""
    return fit(data_module(root), tmp_path_factory.mktemp("run"), max_epochs=5).seen


def test_an_epoch_shows_every_image_at_most_once(uninterrupted):
    assert len(uninterrupted) == 5 * BATCHES
    epochs = [sum(uninterrupted[i : i + BATCHES], []) for i in range(0, 5 * BATCHES, BATCHES)]
    for ids in epochs:
        assert len(set(ids)) == BATCHES * BATCH
        assert set(ids) <= set(range(1, NUM_TRAIN + 1))
    assert len({tuple(ids) for ids in epochs}) == 5


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_inside_an_epoch_goes_on_exactly(root, tmp_path, uninterrupted, num_workers):
    stop, steps = 2 * BATCHES + 2, round(2.5 * BATCHES) + 2
    options = {"num_workers": num_workers}
    first = fit(data_module(root, **options), tmp_path, max_steps=stop)
    assert first.seen == uninterrupted[:stop]
    checkpoint = tmp_path / f"step={stop}.ckpt"
    second = fit(data_module(root, **options), tmp_path, checkpoint, max_steps=steps)
    assert second.seen == uninterrupted[stop:steps]


@pytest.mark.covering(2)
@pytest.mark.sampled(4)
@pytest.mark.parametrize("val", [False, True])
@pytest.mark.parametrize("until", ["steps", "epochs"])
@pytest.mark.parametrize(
    ("saved", "name", "stop"),
    [
        ("step", "step=7.ckpt", 7),
        ("step", "step=10.ckpt", 10),
        ("epoch", "step=10.ckpt", 10),
        ("epoch", "step=7.ckpt", 7),
        ("step", "final.ckpt", 7),
    ],
)
def test_any_checkpoint_can_be_resumed(
    root, tmp_path, uninterrupted, saved, name, stop, until, val
):
    fit(data_module(root), tmp_path, saved=saved, val=val, max_steps=stop)
    limit = {"max_steps": 18} if until == "steps" else {"max_epochs": 4}
    second = fit(data_module(root), tmp_path, tmp_path / name, saved=saved, val=val, **limit)
    assert len(second.seen) >= 5
    assert second.seen == uninterrupted[stop : stop + len(second.seen)]


def test_resuming_twice(root, tmp_path, uninterrupted):
    seen = []
    for step in (3, 9, 12):
        checkpoint = tmp_path / f"step={len(seen)}.ckpt" if seen else None
        seen += fit(data_module(root), tmp_path, checkpoint, max_steps=step).seen
    assert seen == uninterrupted[:12]


def test_limited_epochs_go_on_exactly(root, tmp_path, uninterrupted):
    fit(data_module(root), tmp_path, max_steps=3, limit_train_batches=3)
    options = {"max_steps": 11, "limit_train_batches": 3}
    second = fit(data_module(root), tmp_path, tmp_path / "step=3.ckpt", **options)
    assert second.seen == uninterrupted[3:11]


def test_reloading_loaders_does_not_start_over(root, tmp_path, uninterrupted):
    options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    assert fit(data_module(root), tmp_path, **options).seen == uninterrupted[: 3 * BATCHES]


def test_a_data_module_starts_over_with_each_fit(root, tmp_path, uninterrupted):
    data = data_module(root)
    for _ in range(2):
        assert fit(data, tmp_path, max_steps=7).seen == uninterrupted[:7]


@pytest.mark.slow
def test_loading_draws_no_noise_of_the_model(root, tmp_path):
    """Workers or not: the global generator belongs to the model alone."""
    torch.manual_seed(0)
    expected = torch.rand(12).tolist()
    for options in ({}, {"num_workers": 1}):
        torch.manual_seed(0)
        recorder = fit(data_module(root, **options), tmp_path, val=True, max_steps=12)
        first = recorder.noise[0]
        start = expected.index(first)
        assert start == 2  # after the weight and the bias of the layer
        assert recorder.noise[: 12 - start] == expected[start:]


def test_overfitting_keeps_its_batches(root, tmp_path):
    seen = fit(data_module(root), tmp_path, max_epochs=3, overfit_batches=2).seen
    assert seen == [[1, 2, 3, 4], [5, 6, 7, 8]] * 3


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


def read(loader, batches=None):
    return [b.tolist() for b, _ in zip(loader, range(batches or 10**6), strict=False)]


def test_passes_of_a_loader_on_its_own():
    loader = ResumableLoader(Numbers(10), 3)
    epochs = [read(loader) for _ in range(2)]
    assert [len(e) for e in epochs] == [3, 3]
    assert epochs[0] != epochs[1]
    again = ResumableLoader(Numbers(10), 3)
    assert read(again) == epochs[0]
    state = again.state_dict()
    resumed = ResumableLoader(Numbers(10), 3)
    resumed.load_state_dict(state)
    assert read(resumed) == epochs[1]


def test_the_rest_of_an_epoch_comes_first():
    loader = ResumableLoader(Numbers(10), 3)
    whole = [read(loader) for _ in range(2)]
    stopped = ResumableLoader(Numbers(10), 3)
    iterator = iter(stopped)
    assert next(iterator).tolist() == whole[0][0]
    state = stopped.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 1)
    resumed = ResumableLoader(Numbers(10), 3)
    resumed.load_state_dict(state)
    assert len(resumed) == 3
    assert read(resumed) == whole[0][1:]
    assert read(resumed) == whole[1]


@pytest.mark.slow
def test_nothing_is_read_before_the_first_batch():
    loader = ResumableLoader(Numbers(10), 3, num_workers=1)
    iterator = iter(loader)
    loader.sampler.set_epoch(1)
    second = ResumableLoader(Numbers(10), 3)
    read(second)
    assert read(iterator) == read(second)


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = StreamSampler(Numbers(50), seed)
        sampler.seek(epoch, 0)
        return tuple(sampler)

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert {tuple(sorted(o)) for o in orders} == {tuple(range(50))}
    assert order(0, 1) == order(0, 1)


def test_processes_share_an_epoch(monkeypatch):
    """Three processes of one batch size see disjoint images, and resume from one state."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    shares, states = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        loader = ResumableLoader(Numbers(20), 2)
        shares.append(read(loader))
        loader = ResumableLoader(Numbers(20), 2)
        next(iter(loader))
        states.append(loader.state_dict())
        resumed = ResumableLoader(Numbers(20), 2)
        resumed.load_state_dict(states[0])
        assert read(resumed) == shares[rank][1:]
    assert [len(s) for s in shares] == [3, 3, 3]
    flat = [i for share in shares for batch in share for i in batch]
    assert len(set(flat)) == len(flat) == 18
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize(
    ("images", "options"), [(11, {"batch_size": 3}), (10, {"batch_size": 2}), (10, {"seed": 1})]
)
def test_other_batches_are_refused_inside_an_epoch(images, options):
    loader = ResumableLoader(Numbers(10), 3)
    next(iter(loader))
    other = ResumableLoader(Numbers(images), **({"batch_size": 3} | options))
    with pytest.raises(ValueError, match=r"inside an epoch with .*same data settings"):
        other.load_state_dict(loader.state_dict())


def test_other_batches_are_fine_between_epochs():
    loader = ResumableLoader(Numbers(10), 3)
    read(loader)
    other, fresh = ResumableLoader(Numbers(10), 2), ResumableLoader(Numbers(10), 2)
    other.load_state_dict(loader.state_dict())
    read(fresh)
    assert read(other) == read(fresh)


def test_whole_epochs_end_with_a_smaller_batch():
    """And a run that was stopped goes on with what is left."""
    loader = ResumableLoader(Numbers(10), 4, whole=True)
    epochs = [read(loader) for _ in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2], [4, 4, 2]]
    assert all(sorted(sum(epoch, [])) == list(range(10)) for epoch in epochs)
    assert epochs[0][:2] == read(ResumableLoader(Numbers(10), 4))  # whole batches are the same
    started = ResumableLoader(Numbers(10), 4, whole=True)
    batches = iter(started)
    assert [len(next(batches)), len(next(batches))] == [4, 4]
    resumed = ResumableLoader(Numbers(10), 4, whole=True)
    resumed.load_state_dict(started.state_dict())
    assert read(resumed) == epochs[0][2:]
    with pytest.raises(ValueError, match="inside an epoch"):
        ResumableLoader(Numbers(10), 4).load_state_dict(started.state_dict())


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batches_have_to_fit(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} does not fit the 10 training"):
        ResumableLoader(Numbers(10), batch_size)


def test_validation_batches(root, tmp_path):
    recorder = fit(data_module(root, val_batch_size=2), tmp_path, val=True, max_epochs=1)
    assert [ids for ids, _ in recorder.val_seen][-2:] == [[1, 2], [3]]
    instances = recorder.val_seen[-2][1]
    assert instances.shape == (2, 48, 48)
    assert instances.max() >= 3


def test_folders_without_annotations(root):
    data = data_module(root, train_annotations=None, val_annotations=None)
    data.setup("fit")
    assert len(data.train_dataloader()) == BATCHES
    batch = next(iter(data.val_dataloader()))
    assert batch["image_ids"] == [0, 1, 2]
    assert "instances" not in batch


def test_no_validation(root, tmp_path):
    data = data_module(root, val_images=None)
    assert fit(data, tmp_path, val=True, max_steps=2).val_seen == []


def test_limits(root):
    data = data_module(root, limit_train=9, limit_val=1)
    data.setup()
    assert len(data.train_dataloader()) == 2
    assert len(data.val_dataloader().dataset) == 1


def test_skipped_images_are_named(root, tmp_path):
    for name in ("train2017", "annotations"):
        (tmp_path / name).mkdir()
        for path in (root / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train2017/000000000002.jpg").write_text("no image")
    data = data_module(tmp_path, val_images=None, batch_size=NUM_TRAIN, on_error="skip")
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert len(batch["image_ids"]) == NUM_TRAIN - 1
    assert [e.split(":")[0] for e in batch["errors"]] == ["000000000002.jpg"]
    data = data_module(tmp_path, val_images=None, batch_size=NUM_TRAIN)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"000000000002\.jpg cannot be used"):
        list(data.train_dataloader())


def test_training_batches_have_instances_where_asked(root):
    for asked in (False, True):
        data = data_module(root, train_instances=asked)
        data.setup("fit")
        assert ("instances" in next(iter(data.train_dataloader()))) == asked
    with pytest.raises(ValueError, match="with_instances=True needs masks"):
        data_module(root, train_annotations=None, train_instances=True).setup("fit")


def test_validation_on_boxes_alone_has_no_instances(root, tmp_path):
    path = root / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for number, thing in enumerate(content["annotations"]):
        thing["segmentation"] = [] if number % 2 else None
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    data = data_module(root, val_annotations=str(tmp_path / "boxes.json"), on_error="skip")
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert (batch["image_ids"], batch["errors"]) == ([1, 2, 3], [])
    assert "instances" not in batch


def test_setup_says_what_is_missing(root, tmp_path):
    with pytest.raises(ValueError, match="CocoDataModule has no transform"):
        CocoDataModule(str(root)).setup("fit")
    with pytest.raises(ValueError, match=r"images folder .*nowhere/train2017 does not exist"):
        data_module(tmp_path / "nowhere").setup("fit")
    with pytest.raises(ValueError, match=r"call setup\(\) first"):
        data_module(root).train_dataloader()
    with pytest.raises(ValueError, match=r"call setup\(\) first"):
        data_module(root).val_dataloader()


def test_transform_may_be_set_later(root):
    data = CocoDataModule(str(root), batch_size=BATCH)
    data.transform = Identity()
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["pixel_values"].shape == (3, 3, 48, 48)
    assert data.train_set is None


def test_scenes_are_drawn_by_the_trainer(tmp_path):
    root = tmp_path / "scenes"
    data = SceneDataModule(
        str(root), num_train=6, num_val=2, image_size=48, batch_size=3, transform=Identity()
    )
    recorder = fit(data, tmp_path, val=True, max_epochs=1)
    assert sorted(sum(recorder.seen, [])) == [1, 2, 3, 4, 5, 6]
    assert recorder.val_seen[-1][0] == [1, 2]
    assert Image.open(root / "val2017/000000000002.jpg").size == (48, 48)


def test_scenes_have_a_level(tmp_path):
    counts = {}
    for level in ("easy", "hard", "both"):
        data = SceneDataModule(
            str(tmp_path / level),
            num_train=5,
            num_val=2,
            level=level,
            batch_size=5,
            train_instances=True,
            transform=Identity(),
        )
        data.prepare_data()
        data.setup("fit")
        instances = next(iter(data.train_dataloader()))["instances"]
        counts[level] = sorted(instances.flatten(1).amax(dim=1).tolist())
        assert len(data.val_set) == 2
    assert max(counts["easy"]) <= 6 <= min(counts["hard"]), counts
    assert counts["both"][2] <= 6 <= counts["both"][3], counts  # three are easy, two are hard
    assert len(list((tmp_path / "both/hard/train2017").iterdir())) == 2


def test_how_batches_are_loaded_is_a_setting(root):
    data = data_module(
        root, num_workers=2, prefetch_factor=3, persistent_workers=False, pin_memory=False
    )
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):  # nothing is started yet
        assert (loader.num_workers, loader.prefetch_factor, loader.pin_memory) == (2, 3, False)
        assert not loader.persistent_workers
    plain = data_module(root, num_workers=1)
    plain.setup()
    assert plain.train_dataloader().persistent_workers
    assert not plain.val_dataloader().persistent_workers
    assert plain.train_dataloader().prefetch_factor == 2


@pytest.mark.parametrize(
    "options",
    [
        {"prefetch_factor": 2},
        {"prefetch_factor": 0, "num_workers": 1},
        {"prefetch_factor": -1, "num_workers": 1},
    ],
)
def test_nothing_can_be_loaded_ahead_without_workers(root, options):
    with pytest.raises(ValueError, match="pass 1 or more batches that each of 1 or more workers"):
        data_module(root, **options)
    with pytest.raises(ValueError, match="num_workers=-1; pass 0 or more"):
        data_module(root, num_workers=-1)


def test_images_are_decoded_where_the_settings_say(root, monkeypatch):
    with pytest.raises(ValueError, match="decoder='jpeg' is unknown; pass one of"):
        data_module(root, decoder="jpeg")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds none here; pass decoder='pillow'"):
        data_module(root, decoder="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    asked = []

    def read(device, path, upright):
        asked.append((device, upright))
        return read_jpeg_on("cpu", path, upright)

    monkeypatch.setattr("ocvtp.data.coco.read_jpeg_on", read)
    found, wanted = data_module(root, decoder="cuda"), data_module(root)
    for data in (found, wanted):
        data.setup()
    difference = found.train_set[0]["pixel_values"] - wanted.train_set[0]["pixel_values"]
    assert difference.abs().max() < 1.5 / 255
    found.val_set[0]
    assert asked == [("cuda:3", True), ("cuda:3", False)]
    workers = data_module(root, decoder="cuda", num_workers=1, pin_memory=False)
    workers.setup()
    assert workers.train_dataloader().multiprocessing_context.get_start_method() == "spawn"


class Large(Dataset):
    """Sixteen megabytes in a batch of four."""

    names = ()

    def __len__(self):
        return 400

    def __getitem__(self, index):
        item = {"image_id": int(index), "image_size": (8, 8), "file_name": "x"}
        return {**item, "pixel_values": torch.full((3, 590, 590), float(index))}


@pytest.mark.slow
def test_a_loading_process_does_not_grow_with_its_batches(root):
    data = data_module(root, num_workers=1)
    data.setup()
    data.train_set = Large()
    data._batch([data.train_set[0]])  # also where the training process made a batch before
    loader = data.train_dataloader()
    grown = []
    for number, _ in enumerate(loader):
        if number in (10, 40):
            (worker,) = loader._iterator._workers
            status = Path(f"/proc/{worker.pid}/status").read_text().split("RssAnon:")[1]
            grown.append(int(status.split()[0]) / 1024)
        if number == 40:
            break
    assert grown[1] < grown[0] + 100  # 30 batches are 480 MB


def test_a_process_that_is_not_forked_is_told_how_many_pixels_an_image_may_have(root, monkeypatch):
    forked = data_module(root, num_workers=1)
    forked.setup()
    assert forked.train_dataloader().worker_init_fn is None
    monkeypatch.setattr(CocoDataModule, "worker_context", "spawn")
    data = data_module(root, num_workers=1)
    data.setup()
    limit_pixels(1000)
    start = ForkingPickler.dumps(data.train_dataloader().worker_init_fn)
    limit_pixels()
    try:
        ForkingPickler.loads(start)(0)
        assert most_pixels() == 1000
    finally:
        limit_pixels()
