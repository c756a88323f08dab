"""A small corpus of real sentences, built once a session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from faults.lab import write_corpus
from qies.config import DataConfig, TrainConfig

torch.set_num_threads(1)

TINY = TrainConfig(seq_len=32, batch_size=4, eval_tokens=512, save_every=4, warmup=0.1, precision="fp32")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Forty small documents with enough structure to be learned."""
    folder = tmp_path_factory.mktemp("texts")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data_config(text_folder) -> DataConfig:
    return DataConfig(source=str(text_folder), vocab_size=400, val_fraction=0.2)


@pytest.fixture(scope="session")
def shard_folder(data_config, tmp_path_factory) -> Path:
    from qies.data.shards import build_shards

    out = tmp_path_factory.mktemp("shards") / "data"
    build_shards(data_config, out)
    return out


@pytest.fixture(scope="session")
def shards(shard_folder):
    from qies.data.shards import open_shards

    return open_shards(shard_folder)


@pytest.fixture(scope="session")
def tiny() -> TrainConfig:
    """Settings of a run that takes about a second."""
    return TINY
