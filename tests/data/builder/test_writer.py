"""Builds of streams: parallel, limited, killed and resumed, on full disks."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qies.config import DataConfig
from qies.data.builder import pipeline
from qies.data.builder.pipeline import build_shards
from qies.data.builder.progress import Step
from qies.data.builder.split import split_hash
from qies.data.builder.state import PROGRESS
from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.manifest import Build
from qies.data.shards import open_shards
from qies.data.tokenizer import END
from qies.errors import UserError

WORDS = ["state", "phase", "pair", "letter", "winter", "harvest", "river", "stone", "señor", "日本", "north", "law"]


def _text(i: int) -> str:
    rng = random.Random(i)
    return f"Document {i}: " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60)))


def _lines(numbers) -> bytes:
    return "".join(json.dumps({"text": _text(i)}) + "\n" for i in numbers).encode()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A file, and three more in two folders, of which one repeats fifty documents of another."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "web").mkdir()
    (folder / "books").mkdir()
    (folder / "web" / "a.jsonl").write_bytes(_lines(range(400)))
    (folder / "web" / "b.jsonl.gz").write_bytes(gzip.compress(_lines(range(400, 700))))
    (folder / "a.jsonl").write_bytes(_lines(range(700, 760)))
    (folder / "books" / "c.jsonl").write_bytes(_lines([*range(760, 1000), *range(50)]))
    return folder


@pytest.fixture(scope="module")
def config(records: Path) -> DataConfig:
    return DataConfig(source=str(records), vocab_size=400, val_fraction=0.1, seed=3)


SMALL = {"shard_tokens": 3000}


@pytest.fixture(scope="module")
def whole(config: DataConfig, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    build_shards(config, out, **SMALL)
    return out


def _documents(folder: Path, split: str) -> list[str]:
    shards = open_shards(folder)
    tokenizer, ids = shards.tokenizer(), np.asarray(shards.tokens(split))
    starts = np.flatnonzero(ids == tokenizer.eos_token_id)
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def test_every_document_is_there_once_in_the_split_of_its_hash(whole: Path) -> None:
    order = [*range(700, 1000), *range(50), *range(50, 700)]  # by file name, repeats left out
    held_out = {i for i in order if split_hash(_text(i), 3) < round(0.1 * 2**64)}
    assert 70 < len(held_out) < 130
    assert _documents(whole, "train") == [_text(i) for i in order if i not in held_out]
    assert _documents(whole, "val") == [_text(i) for i in order if i in held_out]


def test_manifest_counts_by_source(whole: Path, records: Path) -> None:
    manifest = open_shards(whole).manifest
    assert {s.name: (s.train + s.val).documents for s in manifest.sources} == {
        "books": 290, "web": 650, records.name: 60,
    }  # fmt: skip
    assert [run.source for run in manifest.val_order] == [records.name, "books", "web"]
    assert {run.source: run.documents for run in manifest.val_order} == {
        s.name: s.val.documents for s in manifest.sources
    }
    assert len(manifest.train.shards) > 5 and len(manifest.train.shards) == len(manifest.val.shards)
    assert manifest.train.bytes + manifest.val.bytes == sum(len(_text(i).encode()) for i in range(1000))
    assert sorted(_files(whole)) == sorted(
        ["manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
        + [s.file for split in ("train", "val") for s in manifest.split(split).shards]
    )


def test_number_of_workers_changes_nothing(config: DataConfig, whole: Path, tmp_path: Path) -> None:
    build_shards(config, tmp_path / "out", workers=2, **SMALL)
    assert _files(tmp_path / "out") == _files(whole)


def test_limit_ends_with_the_document_that_reaches_it(config: DataConfig, whole: Path, tmp_path: Path) -> None:
    manifest = build_shards(config, tmp_path, build=Build(limit_tokens=5000), **SMALL)
    texts = _documents(tmp_path, "train")
    assert texts == _documents(whole, "train")[: len(texts)]
    last = len(open_shards(tmp_path).tokenizer()(texts[-1])["input_ids"]) + 1
    assert manifest.train.tokens - last < 5000 <= manifest.train.tokens
    with pytest.raises(UserError, match=r"holds other data \(limit_tokens: 5000 -> 6000\)"):
        build_shards(config, tmp_path, build=Build(limit_tokens=6000), **SMALL)


def test_a_finished_folder_is_of_the_tokenizer_that_the_name_had(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(range(50)))
    one, two = (train_tokenizer([text] * 9, 270) for text in ("river stone harvest", "letter winter phase"))
    for tokenizer in (one, two):
        tokenizer.add_special_tokens(["<|stop|>"])
    save_tokenizer(one, tmp_path / "name")
    cfg, build = DataConfig(str(tmp_path / "a.jsonl")), Build(tokenizer=str(tmp_path / "name"))
    manifest = build_shards(cfg, tmp_path / "out", build=build)
    before = _files(tmp_path / "out")
    for changed, end in ((two, END), (one, "<|stop|>")):
        save_tokenizer(changed, tmp_path / "name", end)
        with pytest.raises(UserError, match=r"out' holds other data \(its tokenizer '.*name' has changed since\)"):
            build_shards(cfg, tmp_path / "out", build=build)
    save_tokenizer(one, tmp_path / "name")
    assert build_shards(cfg, tmp_path / "out", build=build) == manifest
    assert _files(tmp_path / "out") == before


def test_short_text_holds_a_document_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(range(3)))
    for seed in range(5):
        cfg = DataConfig(str(tmp_path / "a.jsonl"), 300, 0.001, seed)
        assert build_shards(cfg, tmp_path / str(seed)).val.documents == 1
    (tmp_path / "b.jsonl").write_bytes(_lines(range(1)))
    with pytest.raises(UserError, match=r"nothing of 'b.jsonl' is left for train"):
        build_shards(DataConfig(str(tmp_path / "b.jsonl"), 300), tmp_path / "one")


# --- killed


SLOW = (pytest.mark.slow, pytest.mark.timeout(1200))
KILLED = (
    "import sys, json, os, signal\n"
    "from qies.config import DataConfig; from qies.data.builder.pipeline import build_shards\n"
    "real, left = os.replace, int(sys.argv[4])\n"
    "def until(a, b):\n"
    "    global left\n"
    "    left -= 1\n"
    "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    real(a, b)\n"
    "os.replace = until\n"
    "if __name__ == '__main__':\n"
    "    config = DataConfig(**json.loads(sys.argv[1]))\n"
    "    build_shards(config, sys.argv[2], shard_tokens=3000, workers=int(sys.argv[3]))\n"
)


def _kill(config: DataConfig, out: Path, workers: int, renames: int, script: Path) -> int:
    script.write_text(KILLED)
    command = [sys.executable, str(script), json.dumps(config.__dict__), str(out), str(workers), str(renames)]
    return subprocess.run(command, timeout=300).returncode


def _gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("workers", "renames"),
    [(1, 0), (1, 8), *(pytest.param(w, n, marks=SLOW) for w in (1, 2) for n in range(2, 35, 2))],
)
def test_killed_build_ends_with_the_same_bytes(config, whole, tmp_path, workers: int, renames: int) -> None:
    """Killed before a rename: 0 of the tokenizer, then of train, val, progress, again and again, 34 of the manifest."""
    out = tmp_path / "out"
    assert _kill(config, out, workers, renames, tmp_path / "killed.py") == -signal.SIGKILL
    with pytest.raises(UserError, match="holds no data set"):
        open_shards(out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.bin")}
    build_shards(config, out, **SMALL)
    assert _files(out) == _files(whole)
    if renames >= 8:  # two shards of each split were committed, and not written again
        kept = [n for n in ("train-00000.bin", "val-00000.bin") if (out / n).stat().st_mtime_ns == before[n]]
        assert len(kept) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shards", range(5))
def test_killed_build_leaves_no_process_behind(config, whole, tmp_path, shards: int) -> None:
    """Killed from outside with two processes encoding, at whatever it does once so many shards of train are there."""
    out = tmp_path / "out"
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), json.dumps(config.__dict__), str(out), "2", "1000"]
    process = subprocess.Popen(command)
    while process.poll() is None:
        children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == process.pid]
        if len(children) >= 2 and len(list(out.glob("train-*.bin"))) >= shards:
            break
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert _gone(children, 20)
    with pytest.raises(UserError, match="holds no data set"):
        open_shards(out)
    build_shards(config, out, **SMALL)
    assert _files(out) == _files(whole)


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _cut_off(config: DataConfig, out: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that ends behind its second commit."""
    real, count = os.replace, 0

    def until(a, b):
        nonlocal count
        count += 1
        if count > 8:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", until)
        build_shards(config, out, build=build, **SMALL)


@pytest.fixture
def half(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _cut_off(config, tmp_path / "half", Build(), monkeypatch)
    return tmp_path / "half"


@pytest.mark.parametrize(
    ("change", "build", "message"),
    [
        ({"seed": 4}, {}, "config.seed: 3 -> 4"),
        ({"val_fraction": 0.2}, {}, "config.val_fraction: 0.1 -> 0.2"),
        ({}, {"limit_tokens": 9}, "build.limit_tokens: 0 -> 9"),
    ],
)
def test_other_build_does_not_go_on(config, half: Path, change, build, message) -> None:
    before = _files(half)
    with pytest.raises(UserError, match=f"beginning of other data.*{message}"):
        build_shards(replace(config, **change), half, build=Build(**build), **SMALL)
    assert _files(half) == before


def test_other_tokenizer_does_not_go_on(config, half: Path, tmp_path: Path, monkeypatch) -> None:
    tokenizer = train_tokenizer(["a b c"] * 9, 300)
    tokenizer.add_special_tokens(["<|stop|>"])
    save_tokenizer(tokenizer, tmp_path / "other")
    build = Build(tokenizer=str(tmp_path / "other"))
    with pytest.raises(UserError, match="tokenizer: trained -> "):
        build_shards(config, half, build=build, **SMALL)
    _cut_off(config, tmp_path / "out", build, monkeypatch)
    save_tokenizer(tokenizer, tmp_path / "other", "<|stop|>")  # the same name and tokens, another end
    with pytest.raises(UserError, match=r"beginning of other data.*end: <.endoftext.> -> <.stop.>"):
        build_shards(config, tmp_path / "out", build=build, **SMALL)


def test_changed_text_does_not_go_on(config, half: Path, records: Path) -> None:
    path = records / "web" / "a.jsonl"
    before = path.read_bytes()
    try:
        path.write_bytes(before + _lines([2000]))
        with pytest.raises(UserError, match=r"beginning of other data.*text: "):
            build_shards(config, half, **SMALL)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["seen.bin", "tokenizer/tokenizer.json", "val-00000.bin"])
@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_all_that_a_resume_needs_is_checked(config, half: Path, name: str, damage: str) -> None:
    path = half / name
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    before = _files(half)
    with pytest.raises(UserError, match=f"{name.partition('/')[0]}' is missing or damaged; delete"):
        build_shards(config, half, **SMALL)
    assert _files(half) == before


def test_digests_behind_the_last_commit_are_cut_off(config, half: Path, whole: Path) -> None:
    with (half / "seen.bin").open("ab") as file:
        file.write(b"x" * 13)
    build_shards(config, half, **SMALL)
    assert _files(half) == _files(whole)


@pytest.mark.parametrize("damage", ["seal", "cut", "shard"])
def test_damage_to_what_was_committed_is_named(config, half: Path, damage: str) -> None:
    path = half / (PROGRESS if damage != "shard" else "train-00000.bin")
    content = path.read_bytes()
    if damage == "seal":
        path.write_bytes(content.replace(b'"seen": ', b'"seen": 1'))
    else:
        path.write_bytes(content[:-2] if damage == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match=f"{path.name}' is .*damaged.* delete"):
        build_shards(config, half, **SMALL)


# --- full disks


def test_no_space_at_the_start_is_refused_before_work(config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0.00 GB of free space.*--limit-tokens"):
        build_shards(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build_shards(config, tmp_path / "out", build=Build(limit_tokens=500))


def test_full_disk_is_one_line_and_the_build_goes_on_afterwards(config, whole: Path, tmp_path: Path) -> None:
    """From the 300th document on no file may be longer than 1000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: Step) -> None:
        if step.documents > 300:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(UserError, match=r"out' cannot be written \(File too large\); free space"):
            build_shards(config, tmp_path / "out", progress=fill, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    intact = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("train-*.bin")}
    assert len(intact) > 1 and intact.items() <= _files(whole).items()
    build_shards(config, tmp_path / "out", **SMALL)
    assert _files(tmp_path / "out") == _files(whole)


# --- bad records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no json\n", "a.jsonl' line 301 is not a JSON object"),
        (b'{"body": "x"}\n', "a.jsonl' line 301 has no field 'text'; it has: body"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, workers: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(range(300)) + line)
    save_tokenizer(train_tokenizer([_text(0)] * 9, 300), tmp_path / "tokenizer")
    with pytest.raises(UserError, match=message) as caught:
        build_shards(
            DataConfig(str(tmp_path / "a.jsonl")), tmp_path / "out",
            build=Build(tokenizer=str(tmp_path / "tokenizer")), workers=workers,
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_cut_as_the_text_itself_is(suffix, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow

    text = "\n\n".join(f"Paragraph {n} tells of the number {n * n} and of {n + 1}." for n in range(3000)).encode()
    packed = gzip.compress(text) if suffix == ".gz" else pyarrow.Codec("zstd").compress(text, asbytes=True)
    manifests = []
    for name, content in (("plain/a.txt", text), (f"packed/a.txt{suffix}", packed)):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(content)
        manifests.append(build_shards(DataConfig(str(path), vocab_size=300), tmp_path / f"out{len(manifests)}"))
    assert all(m.train.documents > 1 and m.val.documents > 0 for m in manifests)
    sizes = [(m.train.documents + m.val.documents, m.train.bytes + m.val.bytes) for m in manifests]
    assert sizes[0] == sizes[1]  # the names, which decide what is held out, differ
