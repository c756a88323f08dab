"""Checkpoints that are damaged, disks that are full, folders that somebody prepared."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.lab import Lab, Outcome, one_line, rows_written
from qies import records
from qies.train import checkpoint
from qies.train.run_directory import CHECKPOINTS

DAMAGES = ("truncate", "delete", "flip")
DISK = 16 << 20  # bytes of the small file system
BOMB = "[" * 200_000


def newest_two(out: Path) -> list[Path]:
    """The newest checkpoint below a run's folder and the one before it."""
    paths = [p for p in (out / CHECKPOINTS).iterdir() if not p.name.endswith(".partial")]
    return sorted(paths, key=lambda p: -json.loads((p / checkpoint.META).read_text())["step"])[:2]


def damage(path: Path, how: str, rng: random.Random) -> str:
    """Truncate the file somewhere, delete it, or flip one of its bits; what was done, in words."""
    content = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
        return f"{path.name} deleted"
    at = rng.randrange(len(content))
    if how == "truncate":
        path.write_bytes(content[:at])
        return f"{path.name} cut to {at} of {len(content)} bytes"
    bit = rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path.name} flipped"


def damages(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Every file of a checkpoint of one process and of two, truncated, deleted and with one bit flipped."""
    cases = [
        (size, file.name, how)
        for size in (1, 2)
        for file in sorted(newest_two(lab.interrupted(size))[0].iterdir())
        for how in DAMAGES
    ]
    for size, name, how in rng.sample(cases, min(count, len(cases))):
        yield damaged(lab, rng, size, name, how)


def damaged(lab: Lab, rng: random.Random, size: int, name: str, how: str) -> Outcome:
    """Damage one file of the newest checkpoint and go on: it is named, and the one before it is used."""
    out = lab.copy(lab.interrupted(size))
    newest, previous = newest_two(out)
    before = records.steps(out)
    what = f"{damage(newest / name, how, rng)} (of {size})"
    launch = lab.train(out, size=size)
    if launch.codes() != [0] * size:
        return Outcome(what, f"ended with {launch.codes()}: {launch.errors[0]}")
    said = launch.errors[0]
    if f"checkpoint {newest}: " not in said or not (name in said or "seal" in said):
        return Outcome(what, f"it is not named: {said}")
    kept = json.loads(previous.name.removeprefix(checkpoint.PREFIX).lstrip("0"))
    if records.steps(out)[:kept] != before[:kept]:  # with their times, which a second reckoning would change
        return Outcome(what, f"the {kept} steps of the checkpoint before were taken again")
    wrong = lab.resumed(out, size)
    shutil.rmtree(out)
    return Outcome(what, wrong)


def full_disks(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """In one process and in two, on a small tmpfs; where none can be mounted, by a limit on the size of files."""
    mount = lab.root / "disk"
    mount.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        for i in range(count):
            yield full_disk(lab, rng, mount if mounted and i % 4 < 3 else None, size=1 + i % 2)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(mount)], check=True)


def full_disk(lab: Lab, rng: random.Random, disk: Path | None, size: int = 1) -> Outcome:
    """Fill the disk under a running run up to part of a checkpoint, then free it and go on."""
    out = (disk or lab.root) / lab.folder().name
    checkpoints = out / CHECKPOINTS
    launch = lab.train(out, size=size)
    launch.until(lambda: any(p.suffix != ".partial" for p in checkpoints.glob("step-*")))
    launch.signal(signal.SIGSTOP)
    [*_, one] = sorted(p for p in checkpoints.glob("step-*") if p.suffix != ".partial")
    bytes_ = sum(p.stat().st_size for p in one.iterdir())
    filler = out.parent / "filler"
    if disk is not None:
        room = rng.randrange(bytes_)
        _fill(filler, shutil.disk_usage(disk).free - room)
        what = f"tmpfs with {room:,} bytes left of the {bytes_:,} of a checkpoint"
    else:
        largest = max(p.stat().st_size for p in one.iterdir())
        room = rng.randrange(20_000, largest)
        for process in launch.all:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        what = f"file size limit (RLIMIT_FSIZE) of {room:,} bytes"
    launch.signal(signal.SIGCONT)
    codes = launch.codes()
    what += f", {size} process{'es' if size > 1 else ''}"
    filler.unlink(missing_ok=True)
    wrong = ""
    if codes != [1] * size:
        wrong = f"ended with {codes}"
    elif not all(one_line(text) for text in launch.errors):
        wrong = f"not one line: {launch.errors}"
    else:
        left = [p for p in checkpoints.glob("step-*") if p.suffix != ".partial"]
        bad = [f"{p.name}: {problem}" for p in left if (problem := checkpoint.broken(p))]
        wrong = "; ".join(bad) if left else "no checkpoint is left"
    wrong = wrong or lab.resumed(out, size)
    shutil.rmtree(out)
    return Outcome(what, wrong)


def _fill(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))


class Payload:
    """Unpickled, it makes a folder: the proof that something was executed."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.target,)


def traps(out: Path, outside: Path) -> dict[str, tuple[Callable[[], object], bool]]:
    """By name: what prepares the folder of an interrupted run, and whether the run may go on in it (or is refused)."""
    newest = newest_two(out)[0]
    tensors = next(newest.glob("*.safetensors"))
    seal, meta, record, rows = newest / "seal.json", newest / "meta.json", out / "run.json", out / "metrics.jsonl"
    payload = pickle.dumps(Payload(outside / "ran"))

    def reseal(name: str) -> None:
        files = json.loads(seal.read_text())["files"] | {name: checkpoint._digest(outside / "kept")}
        seal.write_text(json.dumps({"files": files, "sha256": checkpoint._of_files(files)}))

    def pipe() -> None:
        seal.unlink()
        os.mkfifo(seal)

    def link_tensors() -> None:
        tensors.rename(outside / "t")
        tensors.symlink_to(outside / "t")

    def link(name: str, target: Path) -> Callable[[], None]:
        def make() -> None:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.symlink_to(target)

        return make

    return {
        "pickles beside the tensors": (
            lambda: [(newest / n).write_bytes(payload) for n in (".metadata", "model.pt", "rng.pkl")], True),
        "a pickle in place of the tensors": (lambda: tensors.write_bytes(payload), True),
        "a pickle in place of run.json": (lambda: record.write_bytes(payload), False),
        "JSON bomb in seal.json": (lambda: seal.write_text(BOMB), True),
        "JSON bomb in meta.json": (lambda: meta.write_text(BOMB), True),
        "JSON bomb in run.json": (lambda: record.write_text(BOMB), False),
        "JSON bomb in metrics.jsonl": (lambda: rows.write_text(BOMB + "\n" + rows.read_text()), True),
        "huge seal.json": (lambda: seal.write_text("[" + "0," * (1 << 20) + "0]"), True),
        "named pipe as seal.json": (pipe, True),
        "path traversal in a seal": (lambda: reseal("../../../outside/kept"), True),
        "absolute path in a seal": (lambda: reseal(str(outside / "kept")), True),
        "tensors are a symlink": (link_tensors, True),
        "a checkpoint is a symlink": (
            lambda: (out / CHECKPOINTS / "step-000000999").symlink_to(newest), True),
        "a partial checkpoint is a symlink": (
            lambda: (out / CHECKPOINTS / "step-000000999.partial").symlink_to(outside), True),
        **{f"{name} is a symlink": (link(name, outside / "kept"), False)
           for name in ("metrics.jsonl", ".metrics.jsonl", "run.json", ".lock", "error.log")},
        **{f"{name} is a symlink to a folder": (link(name, outside), False)
           for name in (CHECKPOINTS, "model", ".ranks", "data")},
        "run folder writable by anyone": (lambda: out.chmod(0o777), False),
        "checkpoints writable by anyone": (lambda: (out / CHECKPOINTS).chmod(0o777), False),
    }  # fmt: skip


def hostile_folders(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Every trap, or a sample of them."""
    names = list(traps(lab.interrupted(), lab.root))
    for name in rng.sample(names, min(count, len(names))):
        yield hostile(lab, name)


def hostile(lab: Lab, name: str) -> Outcome:
    """Go on in a prepared folder: nothing in it is executed, and nothing outside of it changes."""
    place = lab.folder()
    outside = place / "outside"
    outside.mkdir(parents=True)
    (outside / "kept").write_text("as it was")
    out = Path(shutil.copytree(lab.interrupted(), place / "run"))
    prepare, goes_on = traps(out, outside)[name]
    prepare()
    before, rows = _listing(outside), rows_written(out)
    launch = lab.train(out)
    codes = launch.codes()
    if _listing(outside) != before:
        return Outcome(name, "something outside was written or executed")
    if goes_on:
        return Outcome(name, f"ended with {codes}: {launch.errors}" if codes != [0] else lab.resumed(out))
    if codes != [2] or not one_line(launch.errors[0]):
        return Outcome(name, f"ended with {codes}: {launch.errors}")
    return Outcome(name, "" if rows_written(out) == rows else "it trained before it was refused")


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}
