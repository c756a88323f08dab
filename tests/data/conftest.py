"""A small real-enough corpus: forty short documents of invented but grammatical sentences, from a fixed seed."""

import random
from pathlib import Path

import pytest

from qies.config import DataConfig
from qies.data.builder.pipeline import build_shards
from qies.data.shards import Shards, open_shards

WORDS = ["river", "stone", "king", "council", "winter", "harvest", "letter", "señor", "café", "law", "north", "日本"]


@pytest.fixture(scope="session")
def folder_of_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        sentences = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) + "." for _ in range(rng.randint(3, 30)))
        (folder / f"text{i:02d}.txt").write_text("\n\n".join(sentences), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def config(folder_of_texts: Path) -> DataConfig:
    return DataConfig(source=str(folder_of_texts), vocab_size=400, val_fraction=0.2, seed=1)


@pytest.fixture(scope="session")
def shards(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Cut small, so that every reader meets more than one file."""
    out = tmp_path_factory.mktemp("data") / "shards"
    build_shards(config, out, shard_tokens=1000)
    return open_shards(out)
