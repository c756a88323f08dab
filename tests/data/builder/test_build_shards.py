"""What a build writes, and what it does in a folder that is not empty."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qies.config import DataConfig, to_dict
from qies.data.builder import pipeline
from qies.data.builder.corpus import load_corpus
from qies.data.builder.pipeline import build_shards
from qies.data.builder.progress import Step
from qies.data.builder.split import split_documents
from qies.data.manifest import dtype_for, read_manifest
from qies.data.shards import Shards, open_shards
from qies.errors import UserError


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def copy(shards: Shards, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards.folder, tmp_path / "copy"))


def _build(config: DataConfig, out: Path) -> Path:
    build_shards(config, out)
    return out


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


def test_large_vocabularies_take_four_bytes(
    monkeypatch: pytest.MonkeyPatch, config: DataConfig, tmp_path: Path
) -> None:
    assert [dtype_for(n) for n in (257, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]
    build_shards(config, tmp_path / "narrow")
    monkeypatch.setattr(pipeline, "dtype_for", lambda _: "uint32")
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
        "import sys, json; from qies.config import DataConfig; from qies.data.builder.pipeline import build_shards;"
        "build_shards(DataConfig(**json.loads(sys.argv[1])), sys.argv[2])"
    )
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code, json.dumps(to_dict(config)), str(tmp_path / threads)]
        subprocess.run(command, check=True, env=environment, timeout=60)
    assert _files(tmp_path / "1") == _files(tmp_path / "4")


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
        "import sys, json, os, signal;"
        "from qies.config import DataConfig; from qies.data.builder.pipeline import build_shards;"
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
        "import sys, json; from qies.config import DataConfig; from qies.data.builder.pipeline import build_shards;"
        "print(build_shards(DataConfig(**json.loads(sys.argv[1])), sys.argv[2]).hash)"
    )
    command = [sys.executable, "-c", code, json.dumps(to_dict(config)), str(tmp_path / "out")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hashes = {process.communicate(timeout=60)[0].strip() for process in both}
    assert hashes == {open_shards(tmp_path / "out").hash}
    assert not (tmp_path / "out" / ".building").exists()


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
