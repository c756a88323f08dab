import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qies.config import DataConfig, from_dict, to_dict
from qies.data import shards as shards_module
from qies.data.builder.corpus import load_corpus, split_documents
from qies.data.builder.progress import Step
from qies.data.manifest import Manifest, dtype_for, read_manifest
from qies.data.shards import Shards, Tokens, build_shards, open_shards
from qies.data.tokenizer import token_byte_lengths
from qies.errors import UserError


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def copy(shards: Shards, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards.folder, tmp_path / "copy"))


# --- what is written


def test_tokens_are_the_documents(shards: Shards, config: DataConfig) -> None:
    tokenizer = shards.tokenizer()
    corpus = load_corpus(config.source)
    for name, documents in zip(
        ("train", "val"), split_documents(corpus, config.val_fraction, config.seed), strict=True
    ):
        ids = np.asarray(shards.tokens(name))
        starts = np.flatnonzero(ids == 0)
        assert starts[0] == 0
        texts = [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]
        assert texts == [document.text for document in documents]


def test_bytes_are_accounted_for(shards: Shards) -> None:
    lengths = token_byte_lengths(shards.tokenizer())
    for name in ("train", "val"):
        split = shards.manifest.split(name)
        ids = np.asarray(shards.tokens(name))
        assert len(ids) == split.tokens == sum(shard.tokens for shard in split.shards)
        assert lengths[ids].sum() == split.bytes
        rows = [getattr(source, name) for source in shards.manifest.sources]
        for key in ("documents", "bytes", "tokens"):
            assert sum(getattr(row, key) for row in rows) == getattr(split, key)
    assert len(shards.manifest.train.shards) > 3  # 1000 tokens each: what follows is read across their borders


def test_reading_across_shards(shards: Shards) -> None:
    tokens = shards.tokens("train")
    whole = np.concatenate([np.fromfile(shards.folder / s.file, "<u2") for s in shards.manifest.train.shards])
    assert len(tokens) == len(whole)
    for start, stop in ((0, 10), (995, 1005), (999, 1000), (1000, 1001), (500, 3500), (len(whole) - 3, len(whole) + 9)):
        assert np.array_equal(tokens[start:stop], whole[start:stop]), (start, stop)
    assert tokens[5:5].shape == (0,) and tokens[5:5].dtype == whole.dtype
    assert isinstance(tokens[10:20].base, np.ndarray)  # a view: nothing is loaded
    with pytest.raises(ValueError, match="step"):
        tokens[::2]
    with pytest.raises(UserError, match="no split 'test'"):
        shards.tokens("test")


def test_large_vocabularies_take_four_bytes(
    monkeypatch: pytest.MonkeyPatch, config: DataConfig, tmp_path: Path
) -> None:
    assert [dtype_for(n) for n in (257, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]
    build_shards(config, tmp_path / "narrow")
    monkeypatch.setattr(shards_module, "dtype_for", lambda _: "uint32")
    build_shards(config, tmp_path / "wide")
    narrow, wide = open_shards(tmp_path / "narrow").tokens("val"), open_shards(tmp_path / "wide").tokens("val")
    assert wide[:].dtype == np.uint32 and np.array_equal(narrow, wide)
    assert open_shards(tmp_path / "narrow").hash != open_shards(tmp_path / "wide").hash


def test_same_text_gives_the_same_files_bit_for_bit(config: DataConfig, tmp_path: Path) -> None:
    one, two = (_files(_build(config, tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert set(one) == {
        "manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "train-00000.bin",
        "val-00000.bin",
    }
    seeds = [_build(replace(config, seed=seed), tmp_path / f"seed{seed}") for seed in (7, 8)]
    assert read_manifest(seeds[0]).hash != read_manifest(seeds[1]).hash


def test_number_of_threads_changes_nothing(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import sys, json; from qies.config import DataConfig; from qies.data.shards import build_shards;"
        "build_shards(DataConfig(**json.loads(sys.argv[1])), sys.argv[2])"
    )
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code, json.dumps(to_dict(config)), str(tmp_path / threads)]
        subprocess.run(command, check=True, env=environment, timeout=60)
    assert _files(tmp_path / "1") == _files(tmp_path / "4")


def test_identity_says_what_a_run_needs(shards: Shards) -> None:
    identity = shards.identity()
    assert identity["hash"] == shards.hash == shards.manifest.hash
    assert identity["vocab_size"] == len(shards.tokenizer())
    assert identity["val_bytes"] == shards.manifest.val.bytes
    json.dumps(identity)


def test_tokens_of_nothing() -> None:
    assert len(Tokens([np.zeros(3, "<u2")])) == 3
    assert np.asarray(Tokens([np.arange(3, dtype="<u2")]), dtype=np.int64).tolist() == [0, 1, 2]


# --- building again


def test_same_data_is_left_as_it_is(config: DataConfig, copy: Path, shards: Shards) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    told: list[str] = []
    assert build_shards(config, copy, progress=lambda step: told.append(step.what)) == shards.manifest
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    assert told == []


def test_progress_reaches_its_end(config: DataConfig, tmp_path: Path) -> None:
    told: list[Step] = []
    manifest = build_shards(config, tmp_path, progress=told.append)
    assert [*dict.fromkeys(step.what for step in told)] == [
        "reading text", "training tokenizer", "encoding", "comparing val with train"
    ]  # fmt: skip
    assert told[-1].done == told[-1].total == manifest.train.tokens
    last = [step for step in told if step.what == "encoding"][-1]
    assert last.documents == manifest.train.documents + manifest.val.documents
    assert last.tokens == manifest.train.tokens + manifest.val.tokens
    assert 0.8 * last.total < last.done <= last.total  # characters of bytes


@pytest.mark.parametrize("change", [{"seed": 2}, {"vocab_size": 500}, {"source": "builtin"}])
def test_other_data_is_not_overwritten(config: DataConfig, copy: Path, change: dict[str, Any]) -> None:
    before = _files(copy)
    with pytest.raises(UserError, match=f"holds other data.*{next(iter(change))}"):
        build_shards(replace(config, **change), copy)
    assert _files(copy) == before


def test_changed_text_is_noticed(tmp_path: Path, folder_of_texts: Path, config: DataConfig) -> None:
    texts = Path(shutil.copytree(folder_of_texts, tmp_path / "texts"))
    own = replace(config, source=str(texts))
    build_shards(own, tmp_path / "out")
    (texts / "text00.txt").write_text("Something else was written here.")
    with pytest.raises(UserError, match="its text, or the packages it is read from, have changed"):
        build_shards(own, tmp_path / "out")


def test_folder_of_other_files_is_refused(tmp_path: Path, config: DataConfig) -> None:
    (tmp_path / "train-00000.bin").write_bytes(b"someone else's")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        build_shards(config, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        build_shards(config, tmp_path / "file")
    assert (tmp_path / "train-00000.bin").read_bytes() == b"someone else's"


def test_corpus_without_enough_text_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("too short")
    with pytest.raises(UserError, match="too short"):
        build_shards(DataConfig(source=str(tmp_path / "one.txt")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", range(5))
def test_interrupted_build_is_no_data_set_and_can_be_done_again(
    monkeypatch: pytest.MonkeyPatch, config: DataConfig, tmp_path: Path, after: int
) -> None:
    """Cut off before each of the renames: tokenizer, train, val, progress, manifest."""
    real, count = os.replace, 0

    def replace_until(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_until)
    with pytest.raises(KeyboardInterrupt):
        build_shards(config, tmp_path / "out")
    with pytest.raises(UserError, match="holds no data set"):
        open_shards(tmp_path / "out")
    monkeypatch.setattr(os, "replace", real)
    assert _files(_build(config, tmp_path / "out")) == _files(_build(config, tmp_path / "straight"))


def test_killed_build_can_be_done_again_with_other_settings(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import sys, json, os, signal; from qies.config import DataConfig; from qies.data.shards import build_shards;"
        "kill = lambda step: step.what == 'encoding' and os.kill(os.getpid(), signal.SIGKILL);"
        "build_shards(DataConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=kill)"
    )
    command = [sys.executable, "-c", code, json.dumps(to_dict(config)), str(tmp_path / "out")]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert (tmp_path / "out" / "tokenizer").exists()
    other = replace(config, seed=9)
    assert _files(_build(other, tmp_path / "out")) == _files(_build(other, tmp_path / "straight"))


def test_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, config: DataConfig, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device"):
        build_shards(config, tmp_path / "out")


def test_two_builds_of_one_folder_agree(config: DataConfig, tmp_path: Path) -> None:
    code = (
        "import sys, json; from qies.config import DataConfig; from qies.data.shards import build_shards;"
        "print(build_shards(DataConfig(**json.loads(sys.argv[1])), sys.argv[2]).hash)"
    )
    command = [sys.executable, "-c", code, json.dumps(to_dict(config)), str(tmp_path / "out")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hashes = {process.communicate(timeout=60)[0].strip() for process in both}
    assert hashes == {open_shards(tmp_path / "out").hash}
    assert not (tmp_path / "out" / ".building").exists()


# --- faults


def _build(config: DataConfig, out: Path) -> Path:
    build_shards(config, out)
    return out


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool = False) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    if seal:
        values["hash"] = from_dict(Manifest, values).sealed().hash
    path.write_text(json.dumps(values))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _beyond_vocabulary(folder: Path) -> None:
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    tokens[7] = 60_000
    tokens.tofile(folder / "train-00000.bin")
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    _edit(folder, lambda m: m["train"]["shards"][0].update(sha256=digest), seal=True)


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|endoftexT|>"))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard truncated": (lambda f: os.truncate(f / "train-00001.bin", 100), "train-00001.bin' has 100 bytes, not the"),
    "shard longer": (lambda f: (f / "val-00000.bin").open("ab").write(b"\0\0"), "val-00000.bin' has"),
    "shard missing": (lambda f: (f / "train-00002.bin").unlink(), "train-00002.bin' is missing"),
    "one bit": (lambda f: _flip(f / "train-00000.bin"), "train-00000.bin' does not match its sha256"),
    "shard linked": (lambda f: _link(f / "val-00000.bin"), "val-00000.bin' is missing or a link"),
    "beyond vocabulary": (_beyond_vocabulary, "holds token 60000, beyond the vocabulary of"),
    "other tokenizer": (_other_tokenizer, "not the tokenizer of its shards"),
    "tokenizer missing": (lambda f: shutil.rmtree(f / "tokenizer"), "not the tokenizer of its shards"),
    "tokenizer linked": (lambda f: _link(f / "tokenizer"), "not the tokenizer of its shards"),
    "other vocabulary": (lambda f: _edit(f, lambda m: m.update(vocab_size=399), seal=True), "not the tokenizer of its"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "holds no data set"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 300), "manifest.json' is damaged"),
    "manifest a bomb": (lambda f: (f / "manifest.json").write_text("[" * 200_000), "manifest.json' is damaged"),
    "manifest huge": (lambda f: os.truncate(f / "manifest.json", 65_000_000), "larger than 64000000 bytes"),
    "manifest linked": (lambda f: _link(f / "manifest.json"), "is a link"),
    "no mapping": (lambda f: (f / "manifest.json").write_text("[]"), "its schema is not 1"),
    "other schema": (lambda f: _edit(f, lambda m: m.update(schema=2)), "its schema is not 1"),
    "unknown key": (lambda f: _edit(f, lambda m: m.update(dtypes="x")), "Unknown key 'dtypes'. Did you mean 'dtype'"),
    "key missing": (lambda f: _edit(f, lambda m: m.pop("dtype")), "dtype"),
    "wrong type": (lambda f: _edit(f, lambda m: m.update(vocab_size="many")), "vocab_size must be of type int"),
    "other dtype": (lambda f: _edit(f, lambda m: m.update(dtype="object"), seal=True), "dtype 'object' is not one of"),
    "traversal": (
        lambda f: _edit(f, lambda m: m["train"]["shards"][0].update(file="../x.bin"), seal=True),
        "not the name",
    ),
    "absolute": (
        lambda f: _edit(f, lambda m: m["val"]["shards"][0].update(file="/etc/passwd"), seal=True),
        "not the name",
    ),
    "wrong split": (
        lambda f: _edit(f, lambda m: m["val"]["shards"][0].update(file="train-00000.bin"), seal=True),
        "not the name of a val shard",
    ),
    "twice": (
        lambda f: _edit(f, lambda m: m["train"]["shards"].insert(0, m["train"]["shards"][0]), seal=True),
        "listed twice",
    ),
    "none": (lambda f: _edit(f, lambda m: m["val"].update(shards=[]), seal=True), "val has no shard"),
    "negative": (lambda f: _edit(f, lambda m: m["val"]["shards"][0].update(tokens=-1), seal=True), "or an empty one"),
    "sum": (lambda f: _edit(f, lambda m: m["train"].update(tokens=1), seal=True), "do not add up to 1 tokens"),
    "bytes edited": (lambda f: _edit(f, lambda m: m["val"].update(bytes=1)), "its hash is not that of its content"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_named(copy: Path, fault: str) -> None:
    open_shards(copy)
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(UserError) as caught:
        open_shards(copy)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data set.*qies data build"):
        open_shards(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["seen.bin", "manifest.json.tmp", ".building"])
def test_a_link_in_a_folder_that_is_half_built_is_refused(name: str, text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".building").touch()
    (tmp_path / "out" / name).unlink(missing_ok=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match=f"holds other files \\('{name}'\\)"):
        build_shards(DataConfig(str(text_folder), 300), tmp_path / "out")
    assert (tmp_path / "kept").read_text() == "kept"
