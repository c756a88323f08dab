import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qies.config import from_dict
from qies.data.manifest import Manifest
from qies.data.shards import Shards, Tokens, open_shards
from qies.data.tokenizer import token_byte_lengths
from qies.errors import UserError


@pytest.fixture
def copy(shards: Shards, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards.folder, tmp_path / "copy"))


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


def test_identity_says_what_a_run_needs(shards: Shards) -> None:
    identity = shards.identity()
    assert identity["hash"] == shards.hash == shards.manifest.hash
    assert identity["vocab_size"] == len(shards.tokenizer())
    assert identity["val_bytes"] == shards.manifest.val.bytes
    json.dumps(identity)


def test_tokens_of_nothing() -> None:
    assert len(Tokens([np.zeros(3, "<u2")])) == 3
    assert np.asarray(Tokens([np.arange(3, dtype="<u2")]), dtype=np.int64).tolist() == [0, 1, 2]


# --- faults


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
    "bytes edited": (lambda f: _edit(f, lambda m: m["val"].update(bytes=1)), "its hash does not match its content"),
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
