"""Data sets of the hub, as local folders laid out as those: no hub is reached here."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from qies.cli import VERBS
from qies.config import DataConfig
from qies.data.builder.pipeline import build_shards
from qies.data.builder.split import split_hash
from qies.data.manifest import Build
from qies.data.shards import open_shards
from qies.data.sources.hub import HubStream
from qies.errors import UserError
from qies.terminal import run

pytest.importorskip("datasets", reason="needs the extra 'hub'")
zstandard = pytest.importorskip("zstandard", reason="needs the extra 'hub'")


def _text(i: int) -> str:
    return f"Document {i} of the web. " + "word " * (i % 40)


def _lines(numbers, **more) -> bytes:
    return "".join(json.dumps({"text": _text(i), **more}) + "\n" for i in numbers).encode()


CARD = """---
license:
- odc-by
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
# C4
"""


@pytest.fixture(scope="module")
def c4(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub") / "c4"
    (root / "en").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    for n in range(2):
        lines = _lines(range(n * 300, n * 300 + 300), timestamp="2019-04-25T12:57:54Z", url="https://example.org")
        (root / "en" / f"c4-train.{n:05d}-of-01024.json.gz").write_bytes(gzip.compress(lines))
    val = _lines([5, *range(1000, 1050)], timestamp="2019-04-25T12:57:54Z", url="https://example.org")
    (root / "en" / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(val))
    return root


PILE = ["Pile-CC", "ArXiv", "Pile-CC"]


@pytest.fixture(scope="module")
def pile(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub") / "pile-uncopyrighted"
    (root / "train").mkdir(parents=True)
    for name, numbers in {"train/00": range(300), "train/01": range(300, 600), "val": range(1000, 1050)}.items():
        lines = b"".join(_lines([i], meta={"pile_set_name": PILE[i % 3]}) for i in numbers)
        (root / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines))
    (root / "test.jsonl.zst").write_bytes(zstandard.compress(_lines([2000], meta={"pile_set_name": "Pile-CC"})))
    return root


def _documents(folder: Path, split: str) -> list[str]:
    shards = open_shards(folder)
    tokenizer, ids = shards.tokenizer(), np.asarray(shards.tokens(split))
    return [tokenizer.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == 0)[1:])]


def test_c4_has_its_own_validation_revision_and_licence(c4: Path, tmp_path: Path) -> None:
    manifest = build_shards(DataConfig(f"hub:{c4}:en", 300), tmp_path / "out")
    assert _documents(tmp_path / "out", "val") == [_text(i) for i in [5, *range(1000, 1050)]]
    assert _documents(tmp_path / "out", "train") == [_text(i) for i in range(600) if i != 5]  # 5 is held out
    (source,) = manifest.sources
    assert (source.name, source.licence) == ("c4:en", "odc-by")
    assert source.version == f"revision {manifest.fingerprint}" and len(manifest.fingerprint) > 40


def test_the_pile_has_its_validation_beside_the_folder_of_training(pile: Path, tmp_path: Path) -> None:
    manifest = build_shards(DataConfig(f"hub:{pile}", 300), tmp_path / "out")
    assert _documents(tmp_path / "out", "val") == [_text(i) for i in range(1000, 1050)]
    assert _documents(tmp_path / "out", "train") == [_text(i) for i in range(600)]
    counts = {s.name: (s.train.documents, s.val.documents) for s in manifest.sources}
    assert counts == {"ArXiv": (200, 17), "Pile-CC": (400, 33)}
    assert [run.documents for run in manifest.val_order] == [1, 2] * 16 + [1, 1]
    assert {s.licence for s in manifest.sources} == {"not stated by its card"}


def test_without_a_validation_split_the_hash_decides(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.jsonl").write_bytes(_lines(range(300)))
    build_shards(DataConfig(f"hub:{tmp_path / 'set'}", 300, val_fraction=0.1), tmp_path / "out")
    held_out = [_text(i) for i in range(300) if split_hash(_text(i), 0) < round(0.1 * 2**64)]
    assert _documents(tmp_path / "out", "val") == held_out and len(held_out) > 10


@pytest.mark.parametrize("name", ["c4", "pile"])
def test_reading_goes_on_from_every_position(name: str, request) -> None:
    spec = f"{request.getfixturevalue(name)}{':en' if name == 'c4' else ''}"
    batches = list(HubStream(spec).batches(None, 2500))
    assert len(batches) > 15 and [b.split for b in batches] == sorted((b.split for b in batches), reverse=True)
    for i in range(0, len(batches), 4):
        position = json.loads(json.dumps(batches[i].position))
        rest = list(HubStream(spec).batches(position, 2500))
        assert [(b.split, b.documents) for b in rest] == [(b.split, b.documents) for b in batches[i + 1 :]]


def test_interrupted_build_ends_with_the_same_bytes(c4: Path, tmp_path: Path, monkeypatch) -> None:
    cfg, small = DataConfig(f"hub:{c4}:en", 300), {"shard_tokens": 2000}
    build_shards(cfg, tmp_path / "straight", **small)
    real, count = os.replace, 0

    def until(a, b):
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", until)
    with pytest.raises(KeyboardInterrupt):
        build_shards(cfg, tmp_path / "out", **small)
    monkeypatch.setattr(os, "replace", real)
    assert len(list((tmp_path / "out").glob("train-*.bin"))) > 1
    build_shards(cfg, tmp_path / "out", **small)
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("straight", "out")
    )
    assert one == two


def test_a_limit_shortens_validation_too(c4: Path, tmp_path: Path) -> None:
    stream = HubStream(f"{c4}:en", val_characters=1500)
    batches = list(stream.batches(None, 500))
    read = sum(len(d.text) for b in batches if b.split == "val" for d in b.documents)
    assert 1500 <= read < 2100 and {b.split for b in batches} == {"val", "train"}
    manifest = build_shards(DataConfig(f"hub:{c4}:en", 300), tmp_path / "out", build=Build(limit_tokens=3000))
    assert 3000 <= manifest.train.tokens < 3200


FAULTS = {
    "no such configuration": (":fr", "BuilderConfig 'fr' not found"),
    "other field": (":en", "record 1 has no field 'body'; it has: text, timestamp, url; name the field"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(c4: Path, tmp_path: Path, fault: str) -> None:
    config, message = FAULTS[fault]
    build = Build(text_field="body" if fault == "other field" else "text")
    with pytest.raises(UserError) as caught:
        build_shards(DataConfig(f"hub:{c4}{config}"), tmp_path / "out", build=build)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_file_is_one_line(c4: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json.gz").write_bytes(gzip.compress(_lines(range(3000)))[:-3000])
    with pytest.raises(UserError, match=r"'hub:set' cannot be read .*check that its files are complete"):
        build_shards(DataConfig(f"hub:{tmp_path / 'set'}"), tmp_path / "out")


def test_no_package_is_one_line(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'qies\[hub\]'"):
        build_shards(DataConfig("hub:allenai/c4:en"), tmp_path / "out")
    with pytest.raises(UserError, match="give hub:OWNER/NAME"):
        build_shards(DataConfig("hub:c4"), tmp_path / "out")


def test_no_network_is_one_line_and_exit_code_2(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(VERBS, ["data", "build", "hub:allenai/c4:en", "--out", str(tmp_path / "out")], "") == 2
    assert not (tmp_path / "out").exists()
    assert "qies: 'hub:allenai/c4:en' cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_reading_goes_on_behind_a_validation_split_that_is_cut_short(c4: Path) -> None:
    batches = list(HubStream(f"{c4}:en", val_characters=2500).batches(None, 1000))
    last = max(i for i, batch in enumerate(batches) if batch.split == "val")
    assert 2 < last + 1 < len([b for b in HubStream(f"{c4}:en").batches(None, 1000) if b.split == "val"])
    rest = list(HubStream(f"{c4}:en", val_characters=2500).batches(batches[last].position, 1000))
    assert [(b.split, b.documents) for b in rest] == [(b.split, b.documents) for b in batches[last + 1 :]]
