"""Checkpoints: sealed, found by what they hold, never overwritten, and safe against what others put there."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest
import torch

from qies.errors import Stopped
from qies.train import checkpoint


def save(folder, step, value=None, **options):
    tensors = {"w": torch.full((5,), float(step if value is None else value)), "n": torch.tensor(float(step))}
    return checkpoint.save(folder, step, tensors, {"n": step}, **options)


def load(folder, upto=None):
    path, meta = checkpoint.newest(folder, upto)
    return meta, checkpoint.load(path, lambda names: {"w": torch.empty(5), "n": torch.empty(())})


def steps(folder):
    return sorted(json.loads((p / "meta.json").read_text())["step"] for p in folder.iterdir())


def tensor_file(path):
    return next(p for p in path.iterdir() if p.suffix == ".safetensors")


def test_what_is_saved_is_read_again_whatever_its_name(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    second.rename(tmp_path / "step-000000000")
    first.rename(tmp_path / "step-999999999")
    meta, tensors = load(tmp_path)
    assert meta == {"step": 2, "n": 2} and torch.equal(tensors["w"], torch.full((5,), 2.0)) and tensors["n"] == 2
    assert load(tmp_path, upto=1)[0]["step"] == 1


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    names = {p.name for p in save(tmp_path, 1).iterdir()}
    assert names == {"seal.json", "meta.json", "shard-00001-model-00001-of-00001.safetensors"}


@pytest.mark.parametrize("file", ["tensors", "meta.json", "seal.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_passed_over(file, damage, tmp_path, caplog):
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    path = tensor_file(last) if file == "tensors" else last / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content) if damage == "flip" else bytes(content[:-1]))
    meta, tensors = load(tmp_path)
    assert meta["step"] == 1 and torch.equal(tensors["w"], torch.ones(5))
    assert str(last) in caplog.text and ("seal" in caplog.text or path.name in caplog.text)


def test_every_bit_of_the_small_files_is_guarded(tmp_path):
    path = save(tmp_path, 1)
    for name in ("meta.json", "seal.json"):
        content = (path / name).read_bytes()
        for i in range(len(content)):
            (path / name).write_bytes(content[:i] + bytes([content[i] ^ 2]) + content[i + 1 :])
            assert checkpoint.newest(tmp_path) is None, (name, i)
        (path / name).write_bytes(content)
    assert checkpoint.newest(tmp_path) is not None


def test_the_last_k_and_the_milestones_stay_and_partial_ones_go(tmp_path):
    (tmp_path / "step-000000009.partial").mkdir()
    for step in range(1, 8):
        save(tmp_path, step, keep=2, milestones={3, 4})
    assert steps(tmp_path) == [3, 4, 6, 7]
    checkpoint.remove(tmp_path, {3})
    assert steps(tmp_path) == [3]
    checkpoint.remove(tmp_path)
    assert not tmp_path.exists()


def test_a_checkpoint_is_never_written_over(tmp_path):
    path = save(tmp_path, 1, value=5)
    before = tensor_file(path).stat()
    tensor_file(path).chmod(0o600)
    again = save(tmp_path, 1, value=6)
    assert again != path and tensor_file(path).stat().st_mtime_ns == before.st_mtime_ns
    assert checkpoint.broken(path) is None and checkpoint.broken(again) is None


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_a_pickle_in_the_folder_is_ignored_and_named(tmp_path, caplog):
    path = save(tmp_path / "c", 1)
    for name in (".metadata", "model.pt"):
        (path / name).write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    assert load(tmp_path / "c")[0]["step"] == 1
    assert not (tmp_path / "ran").exists()
    assert ".metadata" in caplog.text and "model.pt" in caplog.text


def test_a_pickle_in_the_place_of_tensors_is_refused(tmp_path):
    path = save(tmp_path / "c", 1)
    tensor_file(path).write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    assert checkpoint.newest(tmp_path / "c") is None and not (tmp_path / "ran").exists()


def test_tensors_that_the_seal_does_not_name_are_refused(tmp_path):
    path = save(tmp_path, 1)
    (path / "more.safetensors").write_bytes(tensor_file(path).read_bytes())
    assert "more.safetensors" in checkpoint.broken(path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".."])
def test_a_path_in_a_seal_is_refused(name, tmp_path):
    path = save(tmp_path, 1)
    files = json.loads((path / "seal.json").read_text())["files"] | {name: "0" * 64}
    (path / "seal.json").write_text(json.dumps({"files": files, "sha256": checkpoint._of_files(files)}))
    assert "outside" in checkpoint.broken(path)


def test_symbolic_links_are_refused(tmp_path, caplog):
    path = save(tmp_path / "c", 1)
    (tmp_path / "c" / "step-000000007").symlink_to(path)
    real = tensor_file(path)
    real.rename(tmp_path / "elsewhere")
    real.symlink_to(tmp_path / "elsewhere")
    assert checkpoint.newest(tmp_path / "c") is None
    assert "symbolic link" in caplog.text and "step-000000007" in caplog.text


@pytest.mark.parametrize("name", ["seal.json", "meta.json"])
@pytest.mark.parametrize("bomb", ["long", "deep", "pipe"])
def test_a_bomb_is_refused(name, bomb, tmp_path):
    path = save(tmp_path, 1)
    if bomb == "pipe":
        (path / name).unlink()
        os.mkfifo(path / name)
    else:
        (path / name).write_text("[" * 200_000 if bomb == "deep" else "[" + "0," * (1 << 20) + "0]")
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_full_disk_leaves_the_checkpoint_before(limit, tmp_path):
    """A file-size limit fails writes as a full disk does, at the first byte beyond it."""
    save(tmp_path, 1)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(Stopped, match="those before it are intact") as caught:
            checkpoint.save(tmp_path, 2, {"w": torch.zeros(20_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.code == 1 and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"] and load(tmp_path)[0]["step"] == 1


def test_a_full_file_system_leaves_the_checkpoint_before(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        save(tmp_path, 1)
        with pytest.raises(Stopped, match="No space left"):
            checkpoint.save(tmp_path, 2, {"w": torch.zeros(100_000)}, {})
        assert load(tmp_path)[0]["step"] == 1
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_copy_holds_what_is_sealed_and_nothing_else(tmp_path):
    path = save(tmp_path / "a", 3)
    (path / "stray.pt").write_text("x")
    checkpoint.copy(path, tmp_path / "b")
    assert load(tmp_path / "b")[0]["step"] == 3
    assert not list((tmp_path / "b").rglob("stray.pt"))


@pytest.mark.slow
def test_killed_inside_a_save_the_one_before_is_found(tmp_path):
    """The process is killed at each of the calls that a save makes to the disk, in turn."""
    code = """
import os, signal, sys, torch
from pathlib import Path
from qies import storage
from qies.train import checkpoint
folder, after, calls = Path(sys.argv[1]), int(sys.argv[2]), [0]
def count(original):
    def call(*a, **k):
        calls[0] += 1
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **k)
    return call
for step in (1, 2):
    if step == 2:
        storage.sync, checkpoint._digest = count(storage.sync), count(checkpoint._digest)
        os.replace, checkpoint.shutil.rmtree = count(os.replace), count(checkpoint.shutil.rmtree)
    checkpoint.save(folder, step, {"w": torch.full((5,), float(step)), "n": torch.tensor(0.0)}, {}, keep=1)
"""
    found = []
    for after in range(1, 20):
        folder = tmp_path / str(after)
        killed = subprocess.run([sys.executable, "-c", code, str(folder), str(after)], check=False).returncode
        meta, tensors = load(folder)
        found.append(meta["step"])
        assert torch.equal(tensors["w"], torch.full((5,), float(meta["step"])))
        if killed != -signal.SIGKILL:
            break
    assert killed == 0 and len(found) > 6  # two digests, three files and folders flushed, the renaming
    assert found == sorted(found) and set(found) == {1, 2}


def test_later_ones_that_were_passed_over_push_out_no_good_one(tmp_path):
    save(tmp_path, 1)
    later = tensor_file(save(tmp_path, 9))
    later.write_bytes(later.read_bytes()[:-1])
    assert load(tmp_path)[0]["step"] == 1
    save(tmp_path, 2, keep=1)
    assert load(tmp_path)[0]["step"] == 2
    save(tmp_path, 10, keep=1)
    assert steps(tmp_path) == [10]
