"""Two writers of one folder are told apart; who ended, however, is in nobody's way."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from threading import Thread

import pytest

from ocvtp.cli import main
from ocvtp.commands import bench, evaluate, recommend
from ocvtp.reporting.folder_lock import claimed, in_turn

HOLDER = """
import sys, time
from ocvtp.reporting.folder_lock import claimed, in_turn
with claimed(sys.argv[1], "ocvtp evaluate"):
    print("claimed", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that writes to `folder`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "folder")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "claimed\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_told_whose_the_folder_is(other, tmp_path):
    message = rf"folder is being written to by ocvtp evaluate \(process {other.pid} on .+\); wait"
    for _ in range(2):
        with pytest.raises(ValueError, match=message), claimed(tmp_path / "folder", "ocvtp bench"):
            raise AssertionError
    with claimed(tmp_path / "folder", "ocvtp extract", "1-of-2"):  # a part of its own
        assert len(list((tmp_path / "folder").iterdir())) == 2


def test_a_writer_that_was_killed_is_in_nobodys_way(other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [".ocvtp.lock"]
    with claimed(tmp_path / "folder", "ocvtp bench"):
        (tmp_path / "folder/result").write_text("x")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["result"]


def forked(work):
    """A child that does something, and then nothing; it ends with 0 if that went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_a_child_does_not_keep_the_folder(tmp_path):
    with claimed(tmp_path / "folder", "ocvtp train"):
        child = forked(signal.pause)
    try:
        with claimed(tmp_path / "folder", "ocvtp train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_child_is_told_of_its_parent(tmp_path):
    parent = os.getpid()

    def second():
        with pytest.raises(ValueError, match=rf"\(process {parent} on "):
            claimed(tmp_path / "folder", "ocvtp bench").__enter__()

    with claimed(tmp_path / "folder", "ocvtp train"):
        assert os.waitpid(forked(second), 0)[1] == 0


def test_turns_are_waited_for_also_where_the_first_one_is_killed(tmp_path, caplog):
    entered, enter = os.pipe()
    path = tmp_path / "folder/made"

    def first():
        with in_turn(path, "makes it"):
            os.write(enter, b"x")
            signal.pause()

    child = forked(first)
    os.read(entered, 1)
    assert [lock.name for lock in path.parent.iterdir()] == [".made.lock"]

    def kill(seconds):
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("ocvtp.reporting.folder_lock.time.sleep", kill)
        with in_turn(path, "makes it"):
            path.write_text("x")
    assert caplog.messages == ["waiting for the process that makes it"]
    assert [made.name for made in path.parent.iterdir()] == ["made"]


def test_threads_are_told_apart_too(tmp_path):
    refused = []

    def second():
        try:
            with claimed(tmp_path / "folder", "ocvtp bench"):
                pass
        except ValueError as error:
            refused.append(str(error))

    with claimed(tmp_path / "folder", "ocvtp evaluate"):
        thread = Thread(target=second)
        thread.start()
        thread.join()
    assert "is being written to by this process" in refused[0]
    second()
    assert len(refused) == 1


def in_its_turn(folder, work):
    return in_turn(folder / "made", work)


@pytest.mark.parametrize("lock", [claimed, in_its_turn])
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_to_with_a_warning(
    number, lock, tmp_path, monkeypatch, caplog
):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ocvtp.reporting.folder_lock.fcntl.lockf", lockf)
    with caplog.at_level(logging.WARNING), lock(tmp_path / "folder", "ocvtp train"):
        (tmp_path / "folder/result").write_text("x")
    assert "folder knows no locks" in caplog.text
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["result"]


def test_where_the_system_has_no_locks_threads_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("ocvtp.reporting.folder_lock.fcntl", None)
    with claimed(tmp_path / "folder", "ocvtp train"):
        with pytest.raises(ValueError, match="by this process"):
            claimed(tmp_path / "folder", "ocvtp bench").__enter__()
        assert list((tmp_path / "folder").iterdir()) == []  # an open file could not be removed
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_folder_that_stays_empty(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path / "a/b/c", "ocvtp bench"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with claimed(tmp_path / "there", "ocvtp bench"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


WORDS = {
    "evaluate": ("--model", "random:tiny-llava", "--task", "scenes", "--num-keep", "8"),
    "bench": ("--random-weights", "llava-mid", "--pruners", "uniform", "--num-keep", "8"),
    "recommend": ("--model", "random:tiny-llava", "--task", "scenes"),
}


@pytest.mark.parametrize("command", WORDS)
def test_a_command_refuses_the_folder_of_another(command, other, tmp_path, capsys, monkeypatch):
    for module in (bench, evaluate, recommend):
        monkeypatch.setattr(module, "load_model", lambda *_: (None, None))
    assert main([command, *WORDS[command], "--output", str(tmp_path / "folder")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ocvtp: error: {tmp_path}/folder is being written to by ocvtp evaluate")
    assert said.count("\n") == 1


@pytest.mark.parametrize("part", ["accuracy", "speed"])
def test_what_is_recommended_is_measured_by_one_command_at_a_time(part, tmp_path, capsys):
    words = ["recommend", *WORDS["recommend"], "--output", str(tmp_path / "folder")]
    with claimed(tmp_path / "folder" / part, "ocvtp evaluate"):
        assert main(words) == 2
    assert (
        f"{tmp_path}/folder/{part} is being written to by this process" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []
