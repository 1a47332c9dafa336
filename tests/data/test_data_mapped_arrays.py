"""Arrays of a file are made once, by one process, and mapped by all."""

import copy
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from ocvtp.data import mapped_arrays
from ocvtp.data.mapped_arrays import MappedArrays, TextArray, kept_arrays


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file that counts as large, and a user's folder."""
    monkeypatch.setattr(mapped_arrays, "KEPT_FROM", 1)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.json"
    path.write_text("abc")
    return path


class Made:
    """Arrays of the content, and how often they were made."""

    def __init__(self, path):
        self.path, self.count = path, 0

    def __call__(self):
        self.count += 1
        codes = np.frombuffer(self.path.read_bytes(), np.uint8)
        return {"codes": codes, "none": np.empty((0, 4)), "one": np.array([2**62])}


def test_they_are_made_once(source):
    make = Made(source)
    for _ in range(3):
        found = kept_arrays(source, "letters", make)
        assert found["codes"].tolist() == [97, 98, 99]
        assert (found["none"].shape, found["one"].tolist()) == ((0, 4), [2**62])
        assert found.path == source.with_name("a.json.letters.index")
    assert make.count == 1
    assert sorted(source.parent.iterdir()) == [source, found.path]
    assert kept_arrays(source, "others", make).path.name == "a.json.others.index"
    assert make.count == 2


def test_who_has_no_home_keeps_them_beside_the_file(source, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    make = Made(source)
    assert [kept_arrays(source, "codes", make)["codes"].tolist() for _ in range(2)] == [
        [97, 98, 99]
    ] * 2
    assert make.count == 1


def test_small_files_are_not_kept(source, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "KEPT_FROM", 4)
    assert kept_arrays(source, "letters", Made(source)).path is None
    assert [path.name for path in source.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("change", ["longer", "as long", "an older one of the same times"])
def test_they_are_made_again_of_another_file(source, change):
    make = Made(source)
    kept_arrays(source, "letters", make)
    times = source.stat()
    source.write_text("wxyz" if change == "longer" else "xyz")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + 10**7 * (change == "as long")))
    assert kept_arrays(source, "letters", make)["codes"][-1] == ord("z")
    assert make.count == 2


@pytest.mark.parametrize("left", [0, 5, 200, -8])
def test_a_damaged_file_is_made_again(source, left):
    make = Made(source)
    path = kept_arrays(source, "letters", make).path
    content = path.read_bytes()
    path.write_bytes(content[:left])
    assert kept_arrays(source, "letters", make)["codes"].tolist() == [97, 98, 99]
    assert (make.count, path.read_bytes()) == (2, content)


def test_a_link_shares_what_the_file_has(source, tmp_path):
    make = Made(source)
    (tmp_path / "link.json").symlink_to(source)
    assert kept_arrays(tmp_path / "link.json", "letters", make).path.parent == source.parent
    kept_arrays(source, "letters", make)
    assert make.count == 1


def test_the_cache_takes_what_the_folder_does_not(source, tmp_path, monkeypatch, caplog):
    real = mapped_arrays.replacing

    def refused(path):
        if path.parent in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(mapped_arrays, "replacing", refused)
    closed = [source.parent]
    make = Made(source)
    paths = [kept_arrays(source, "letters", make).path for _ in range(2)]
    assert paths[0] == paths[1]
    assert paths[0].is_relative_to(tmp_path / "home" / ".cache" / "ocvtp")
    assert (make.count, caplog.text) == (1, "")
    closed.append(paths[0].parent)
    paths[0].unlink()
    assert kept_arrays(source, "letters", make)["codes"].tolist() == [97, 98, 99]
    assert make.count == 2
    assert "cannot be kept" in caplog.text
    assert caplog.text.count("Permission denied") == 2


def test_one_makes_them_and_the_others_wait(source, caplog):
    make, entered, go_on = Made(source), threading.Event(), threading.Event()

    def slow():
        entered.set()
        assert go_on.wait(10)
        return make()

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(kept_arrays(source, "letters", slow)))
        for _ in range(3)
    ]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        assert entered.wait(10)
        while caplog.text.count("waiting for the process that reads") < 2:
            assert threading.active_count() > 2
        go_on.set()
        for thread in threads:
            thread.join(10)
    assert make.count == 1
    assert [arrays["codes"].tolist() for arrays in found] == [[97, 98, 99]] * 3


def test_an_error_leaves_nothing_and_the_next_one_goes_on(source):
    def wrong():
        raise ValueError("the file is broken")

    with pytest.raises(ValueError, match="the file is broken"):
        kept_arrays(source, "letters", wrong)
    assert not source.with_name("a.json.letters.index").exists()
    assert not list(source.parent.glob("*.tmp"))
    make = Made(source)
    kept_arrays(source, "letters", make)
    assert make.count == 1


def test_another_process_maps_them_too(source):
    found = kept_arrays(source, "letters", Made(source))
    assert found.__reduce__()[1] == (found.path,)  # all that is sent
    assert copy.copy(found)["codes"].tolist() == [97, 98, 99]
    found.path.unlink()
    with pytest.raises(ValueError, match=r"letters\.index is gone or damaged"):
        copy.copy(found)
    assert copy.deepcopy(MappedArrays({"a": np.arange(3)}))["a"].tolist() == [0, 1, 2]


def test_texts_come_back_as_they_were():
    texts = ["", "a", "ä€😀", "\ud800", "two\nlines", ""]
    found = TextArray.named(TextArray.of(texts).arrays("x"), "x")
    assert [found[place] for place in range(len(found))] == texts
    assert len(TextArray.of([])) == 0
