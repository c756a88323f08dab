"""Files are complete or as they were, also after a failure; one process makes a file, and one holds a lock."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import Timeout

from qies import storage
from qies.config import RunConfig
from qies.errors import UserError
from qies.storage import exclusive, make_writable_folder, replacing
from qies.train.checkpoint import _partial
from qies.train.loop import _Run, build_model
from qies.train.run_directory import CHECKPOINTS, claim


def test_one_at_a_time(tmp_path: Path) -> None:
    marker = tmp_path / "new" / ".marker"
    with exclusive(marker.parent, marker.name), marker.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path, ".marker"):
        _ = 1 / 0
    assert (tmp_path / ".marker").exists()  # so that the next one knows whose remains these are
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), exclusive(tmp_path / "file", ".marker"):
        pass


def test_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new, but")
        _ = 1 / 0
    assert path.read_bytes() == b"old"


def test_no_folder_that_a_run_makes_can_be_written_by_everyone(tmp_path: Path) -> None:
    """Or the run refuses it when it goes on."""
    before = os.umask(0)
    try:
        make_writable_folder(tmp_path / "a" / "run")
        _partial(tmp_path / "a" / "run" / CHECKPOINTS, 1)
        with exclusive(tmp_path / "b" / "run" / "data", ".building"):
            pass
        assert claim(RunConfig(), tmp_path / "b" / "run") is None
        made = [path for path in tmp_path.rglob("*") if path.is_dir()]
        assert len(made) == 7 and not any(path.stat().st_mode & stat.S_IWOTH for path in made)
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_follow_the_umask(mask: int, mode: int, shards, tmp_path: Path) -> None:
    config = RunConfig("transformer", "50k")
    state = build_model(config, shards.manifest.vocab_size).state_dict()
    before = os.umask(mask)
    try:
        _Run._publish(SimpleNamespace(config=config, shards=shards, folder=tmp_path / "run"), state)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] == mode


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    storage.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (storage.write_text, storage.create):
        with pytest.raises(OSError, match="No space left"):
            write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [storage.write_text, storage.create])
def test_content_is_on_disk_before_it_has_its_name(write, tmp_path: Path, monkeypatch) -> None:
    calls = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    write(tmp_path / "file", "text")
    assert calls in (["fsync", "replace", "fsync"], ["fsync", "link", "fsync"])
    assert (tmp_path / "file").read_text() == "text" and len(os.listdir(tmp_path)) == 1


def test_of_many_processes_that_create_a_file_one_succeeds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: storage.create(tmp_path / "a" / "file", str(i) * 1000), range(32)))
    assert sum(made) == 1 and (tmp_path / "a" / "file").read_text() == str(made.index(True)) * 1000
    assert os.listdir(tmp_path / "a") == ["file"]


def test_a_directory_is_published_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "a").write_text("a")
    storage.publish(tmp_path / "new.partial", tmp_path / "new")
    assert (tmp_path / "new" / "a").read_text() == "a" and os.listdir(tmp_path) == ["new"]
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError):  # not over what is there
        storage.publish(tmp_path / "other", tmp_path / "new")


@pytest.mark.parametrize(
    ("content", "words"),
    [("[0, 1]", None), ("[" + "0," * 20 + "0]", "larger than 20 bytes"), ("[0", "not valid JSON"), (None, "missing")],
)
def test_reads_are_bounded(content, words, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    if words is None:
        assert storage.read_json(path, 20) == [0, 1]
    else:
        with pytest.raises(ValueError, match=f"x.json is {words}"):
            storage.read_json(path, 20)


def test_no_link_and_no_pipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("[]")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("link", "a symbolic link"), ("pipe", "not a regular file")):
        with pytest.raises(ValueError, match=words):
            storage.read_json(tmp_path / name, 20)


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; from qies.storage import file_lock\n"
        f"held = file_lock(pathlib.Path({str(tmp_path / 'lock')!r})); held.acquire(); print('held', flush=True)\n"
        "os.read(0, 1)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(Timeout):
        storage.file_lock(tmp_path / "lock").acquire(timeout=0.1)
    holder.kill()
    holder.wait()
    with storage.file_lock(tmp_path / "lock").acquire(timeout=10):
        pass


def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch) -> None:
    """A lock file, to which filelock would fall back, outlives a process that is killed."""

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match="not implemented"):
        storage.file_lock(tmp_path / "lock").acquire()
