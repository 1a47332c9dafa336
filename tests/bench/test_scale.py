"""The benchmark of COCO's true size, at a small one."""

import json

import pytest

from benchmarks import scale
from ocvtp.data.annotations import CocoFile


@pytest.mark.slow
def test_the_data_is_a_coco_folder_and_is_measured(tmp_path):
    scale.write_data(tmp_path, images=40, instances=90)
    path = tmp_path / "annotations" / "instances_train2017.json"
    file = CocoFile(path, with_categories=True)
    assert (len(file.images), file.num_masks, len(file.categories)) == (40, 90, 80)
    image = next(number for number in file.images if file.masked(number))
    assert file.mask(file.masked(image)[0]).any()
    written = path.stat().st_mtime_ns
    scale.write_data(tmp_path, images=40, instances=90)
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds another data set"):
        scale.write_data(tmp_path, images=41, instances=90)
    found = {
        name: scale.MEASURED[name](tmp_path, 14) for name in ("later start", "memory of a rank")
    }
    assert 0 <= found["later start"]["seconds"] < 20
    assert found["memory of a rank"]["with masks"].keys() == {"own, MB", "mapped, MB"}
    own = scale.memory("self")
    kept = bytearray(b"x") * 2**25
    assert scale.memory("self")["own, MB"] - own["own, MB"] == pytest.approx(32, abs=4)
    del kept


def test_figures_are_held_against_the_goals():
    worker = {"own, MB": [50.0, 51.0], "own after all batches, MB": [52.0, 160.5]}
    results = {
        "parse once": {"seconds": 40.5},
        "later start": {"seconds": 0.1},
        "memory of a rank": {
            "without masks": {"own, MB": 2.0, "mapped, MB": 5.0},
            "with masks": {"own, MB": 400.0, "mapped, MB": 400.5},
        },
        "memory of a worker": {"with masks": worker},
        "first batch after resume": {"first batch after resume, seconds": 5.0},
    }
    found = scale.reached(json.loads(json.dumps(results)))
    assert {name: figure["measured"] for name, figure in found.items()} == {
        "parse once, seconds": 40.5,
        "later start, seconds": 0.1,
        "memory of a rank, MB": 7.0,
        "memory of a rank with masks, MB": 800.5,
        "growth of a worker, MB": 109.5,
        "first batch after resume, seconds": 5.0,
    }
    assert [figure["reached"] for figure in found.values()] == [
        False,
        True,
        True,
        False,
        False,
        True,
    ]
