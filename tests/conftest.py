"""A small corpus of real sentences, built once a session."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from faults.lab import write_corpus
from qies import mixers, plugins, presets
from qies.config import DataConfig, TrainConfig

torch.set_num_threads(1)

TINY = TrainConfig(seq_len=32, batch_size=4, eval_tokens=512, save_every=4, warmup=0.1, precision="fp32")


EXAMPLES = Path(__file__).parent.parent / "examples"
BUILT_IN = {"_SPECS": tuple(mixers._SPECS), "ARMS": tuple(presets.ARMS)}


@pytest.fixture
def forget_plugins(monkeypatch):
    """Makes this process one that has loaded no plugin: now, whenever it is called, and at the end."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def forget() -> None:
        for module, name in ((mixers, "_SPECS"), (presets, "ARMS")):
            rows = getattr(module, name)
            monkeypatch.setattr(module, name, {key: rows[key] for key in BUILT_IN[name]})
        monkeypatch.setattr(plugins, "_LOADED", {})
        for example in EXAMPLES.glob("*.py"):
            sys.modules.pop(example.stem, None)

    forget()
    yield forget
    forget()


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
    from qies.data.builder.pipeline import build_shards

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
