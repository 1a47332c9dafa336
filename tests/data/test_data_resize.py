import json

import numpy as np
import pytest
import torch
from PIL import Image

from ocvtp.data.coco import CocoImages
from ocvtp.data.resize import ResizeReport, resize_folder
from ocvtp.data.scenes import draw_scene, write_scenes
from ocvtp.images import open_image
from ocvtp.reporting.files import replacing


def save(path, width=120, height=90, index=0, **options):
    """A drawn scene, stretched to the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(draw_scene(0, index, 96).image).resize((width, height))
    image.save(path, **options)
    return image


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    save(root / "wide.jpg", 120, 90)
    save(root / "deep/er/tall.PNG", 64, 200, 1)
    save(root / "deep/small.webp", 40, 31, 2)
    return root


def sizes(root):
    return {p.relative_to(root).as_posix(): Image.open(p).size for p in root.rglob("*.jpg")}


def everything(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_shorter_edge_and_paths(source, tmp_path):
    output = tmp_path / "output"
    assert resize_folder(source, output, 48) == ResizeReport(3, 0)
    expected = {"wide.jpg": (64, 48), "deep/er/tall.jpg": (48, 150), "deep/small.jpg": (40, 31)}
    assert sizes(output) == expected
    assert everything(output) == sorted([*expected, "resize.json"])
    assert {Image.open(output / name).format for name in expected} == {"JPEG"}


def test_fast_decoding_gives_the_same_picture(tmp_path):
    cells = np.random.default_rng(0).integers(0, 255, (200, 200, 1), np.uint8)
    image = Image.fromarray(np.broadcast_to(cells, (200, 200, 3)).repeat(4, 0).repeat(4, 1))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a/large.jpg", quality=95)
    resize_folder(tmp_path / "a", tmp_path / "b", 200)
    result = np.asarray(Image.open(tmp_path / "b/large.jpg")).astype(int)
    direct = np.asarray(image.resize((200, 200), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(result - direct).mean() < 6


def test_finished_files_are_kept(source, tmp_path):
    output = tmp_path / "output"
    resize_folder(source, output, 48, num_workers=1)
    kept = output / "wide.jpg"
    time = kept.stat().st_mtime_ns
    (output / "deep/small.jpg").unlink()
    assert resize_folder(source, output, 48) == ResizeReport(written=1, skipped=2)
    assert resize_folder(source, output, 48) == ResizeReport(written=0, skipped=3)
    assert kept.stat().st_mtime_ns == time


def test_corrupt_files_are_named_and_leave_nothing(source, tmp_path, caplog):
    output = tmp_path / "output"
    (source / "text.jpg").write_text("no image")
    whole = (source / "wide.jpg").read_bytes()
    (source / "deep/cut.jpg").write_bytes(whole[: len(whole) // 2])
    report = resize_folder(source, output, 48)
    assert (report.written, report.skipped, report.failed) == (3, 0, 2)
    assert sorted(f.split(":")[0] for f in report.failures) == ["deep/cut.jpg", "text.jpg"]
    assert "truncated" in next(f for f in report.failures if "cut" in f)
    assert "deep/cut.jpg" in caplog.text
    assert "text.jpg" not in everything(output)
    assert "deep/cut.jpg" not in everything(output)
    (source / "deep/cut.jpg").write_bytes(whole)
    report = resize_folder(source, output, 48)
    assert (report.written, report.skipped, report.failed) == (1, 3, 1)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / f"in/{mode}.{'jpg' if mode in 'LCMYK' else 'png'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw_scene(0, 0).image).convert(mode).save(path)
    assert resize_folder(tmp_path / "in", tmp_path / "out", 20).written == 4
    assert {Image.open(p).mode for p in (tmp_path / "out").glob("*.jpg")} == {"RGB"}


def test_orientation_stays_as_stored_with_its_tag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    exif[0x010F] = "a camera"
    save(tmp_path / "in/turned.jpg", 120, 90, exif=exif)
    resize_folder(tmp_path / "in", tmp_path / "out", 45)
    image = Image.open(tmp_path / "out/turned.jpg")
    assert image.size == (60, 45)
    assert dict(image.getexif()) == {0x0112: 6}
    assert open_image(tmp_path / "out/turned.jpg").size == (45, 60)


def test_two_images_of_one_result_are_refused(source, tmp_path):
    save(source / "wide.png")
    with pytest.raises(ValueError, match=r"wide.* and wide.*would both become wide\.jpg"):
        resize_folder(source, tmp_path / "output", 48)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("change", [{"size": 40}, {"quality": 80}])
def test_one_folder_holds_one_setting(source, tmp_path, change):
    settings = {"size": 48, "quality": 95}
    resize_folder(source, tmp_path / "output", **settings)
    with pytest.raises(ValueError, match="was made with"):
        resize_folder(source, tmp_path / "output", **(settings | change))


def test_a_folder_of_other_images_is_refused(source, tmp_path):
    save(tmp_path / "output/mine.jpg")
    with pytest.raises(ValueError, match="came from elsewhere"):
        resize_folder(source, tmp_path / "output", 48)
    assert everything(tmp_path / "output") == ["mine.jpg"]


@pytest.mark.parametrize("name", [".", "deep", "new/er"])
def test_output_in_source_is_refused(source, name):
    before = everything(source)
    with pytest.raises(ValueError, match="lies in source"):
        resize_folder(source, source / name, 48)
    assert everything(source) == before


@pytest.mark.parametrize(
    "numbers", [{"size": 0}, {"quality": 0}, {"quality": 101}, {"num_workers": 0}]
)
def test_numbers_out_of_range(source, tmp_path, numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        resize_folder(source, tmp_path / "output", **({"size": 48} | numbers))


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        resize_folder(tmp_path / "absent", tmp_path / "output", 48)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        resize_folder(tmp_path / "empty", tmp_path / "output", 48)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"


class Identity:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    def instance_map(self, ids):
        return torch.from_numpy(ids.astype(np.int64))

    def describe(self):
        return {}


def test_masks_follow_resized_images(tmp_path):
    write_scenes(tmp_path / "full", num_train=3, num_val=0, size=192, seed=0)
    resize_folder(tmp_path / "full/train2017", tmp_path / "half", 96)
    annotations = tmp_path / "full/annotations/instances_train2017.json"
    full = CocoImages(tmp_path / "full/train2017", annotations, Identity(), with_instances=True)
    half = CocoImages(tmp_path / "half", annotations, Identity(), with_instances=True)
    for large, small in zip(full, half, strict=True):
        assert small["instances"].shape == (96, 96)
        assert torch.equal(small["instances"], large["instances"][1::2, 1::2])
        assert small["instances"].max() == large["instances"].max()


def test_renamed_suffixes_are_explained(tmp_path):
    save(tmp_path / "in/1.png")
    entry = {"id": 1, "file_name": "1.png", "width": 120, "height": 90}
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps({"images": [entry], "annotations": []}))
    resize_folder(tmp_path / "in", tmp_path / "out", 48)
    with pytest.raises(ValueError, match=r"looked for 1\.png.*only 1\.jpg"):
        CocoImages(tmp_path / "out", annotations, Identity())[0]
