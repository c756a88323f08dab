"""Bad input: one line, exit code 2, before any training."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from faults.lab import Lab, Outcome, one_line, rows_written
from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.manifest import MANIFEST, Manifest, dumps, read_manifest
from qies.data.shards import TOKENIZER

BAD_YAML = (
    "arm: qies\n  size: [50k",
    "- a list\n",
    "arm: !!python/object/apply:os.mkdir [ran]\n",
    "\x00\x01",
    "{" * 5000,
)


def _write(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(dumps(manifest.sealed()), encoding="utf-8")


def beyond_vocabulary(folder: Path) -> None:
    """One token of the training text at the vocabulary's size, in a folder that is otherwise consistent."""
    manifest = read_manifest(folder)
    [shard] = manifest.train.shards
    tokens = np.fromfile(folder / shard.file, dtype=manifest.dtype)
    tokens[len(tokens) // 2] = manifest.vocab_size
    tokens.tofile(folder / shard.file)
    shard = dataclasses.replace(shard, sha256=hashlib.sha256(tokens.tobytes()).hexdigest())
    _write(folder, dataclasses.replace(manifest, train=dataclasses.replace(manifest.train, shards=(shard,))))


def other_tokenizer(folder: Path) -> None:
    """A tokenizer of the same size that was trained on another text."""
    size = read_manifest(folder).vocab_size
    save_tokenizer(train_tokenizer(["another text altogether, of other words " * 50], size), folder / TOKENIZER)


def traversal(name: str) -> Callable[[Path], None]:
    """The training shard outside of the folder, in a manifest that is otherwise consistent."""

    def apply(folder: Path) -> None:
        manifest = read_manifest(folder)
        [shard] = manifest.train.shards
        (folder / shard.file).rename(folder.parent / shard.file)
        shard = dataclasses.replace(shard, file=name.format(shard.file))
        _write(folder, dataclasses.replace(manifest, train=dataclasses.replace(manifest.train, shards=(shard,))))

    return apply


def cut_short(folder: Path) -> None:
    """The training shard without its last byte."""
    [shard] = read_manifest(folder).train.shards
    content = (folder / shard.file).read_bytes()
    (folder / shard.file).write_bytes(content[:-1])


DATA: dict[str, Callable[[Path], Any]] = {
    "tokenizer of another text": other_tokenizer,
    "token beyond the vocabulary": beyond_vocabulary,
    "shard cut short": cut_short,
    "path traversal in the manifest": traversal("../{}"),
    "JSON bomb as manifest": lambda folder: (folder / MANIFEST).write_text("[" * 200_000),
}
WORDS: dict[str, list[str]] = {
    "unknown key": ["train.bach_size=4"],
    "unknown model field": ["model.lairs=2"],
    "unknown option": ["--sise", "50k"],
    "unknown arm": ["--arm", "qeis"],
    "size that is none": ["--size", "many"],
    "value of another type": ["train.batch_size=four"],
    "value out of range": ["train.lr_scale=-1"],
    "no data there": ["--data", "nowhere"],
    "no space left at the start": ["train.keep=1000000000"],  # more checkpoints than any disk holds
}


def cases() -> list[tuple[str, int]]:
    """What is wrong, and in how many processes."""
    names = [*DATA, *WORDS, *(f"bad YAML: {text[:12]!r}" for text in BAD_YAML)]
    return [(name, 1) for name in names] + [("unknown key", 2), ("token beyond the vocabulary", 2)]


def bad_inputs(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    known = cases()
    for name, size in rng.sample(known, min(count, len(known))):
        yield bad_input(lab, name, size)


def bad_input(lab: Lab, name: str, size: int = 1) -> Outcome:
    """Start a run with it; several processes end alike and the first says why."""
    place = lab.folder()
    place.mkdir()
    out = place / "run"
    if name in DATA:
        folder = Path(shutil.copytree(lab.data.source, place / "shards"))
        DATA[name](folder)
        launch = lab.train(out, "--data", str(folder), size=size)
    elif name in WORDS:
        launch = lab.train(out, *WORDS[name], size=size)
    else:
        [text] = [t for t in BAD_YAML if name == f"bad YAML: {t[:12]!r}"]
        (place / "run.yaml").write_text(text)
        launch = lab.start("train", "--config", str(place / "run.yaml"), "--out", str(out), size=size)
    codes, (first, *others) = launch.codes(), launch.errors
    what = name if size == 1 else f"{name}, {size} processes"
    if codes != [2] * size or not one_line(first) or any(text.strip() for text in others):
        return Outcome(what, f"ended with {codes}: {launch.errors}")
    return Outcome(what, "it trained first" if rows_written(out) or (out / "model").exists() else "")
