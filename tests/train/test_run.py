"""One call trains a run: what it checks before work, and what it leaves."""

import dataclasses

import pytest

from qies import records
from qies.config import RunConfig, TrainConfig
from qies.data.locate import locate
from qies.errors import UserError
from qies.train.run import run

TINY = TrainConfig(seq_len=32, batch_size=4, eval_tokens=512, warmup=0.1, precision="fp32", muon_precision="fp32")


@pytest.fixture
def config(data_config) -> RunConfig:
    return locate(RunConfig("transformer", "50k", tokens=32 * 4 * 2, data=data_config, train=TINY))


def test_a_run_builds_its_text_shows_its_steps_and_is_returned_as_it_is_once_done(config, tmp_path):
    from contextlib import contextmanager

    built, rows, entered = [], [], []

    @contextmanager
    def progress():
        entered.append(sorted(path.name for path in (tmp_path / "run" / "data").iterdir() if path.suffix == ".json"))
        yield rows.append

    record = run(config, tmp_path / "run", built=built.append, progress=progress)
    assert record.status == "done" and record.threads == 1 and records.read(tmp_path / "run") == record
    assert [manifest.hash for manifest in built] == [record.data["hash"]] and entered == [["manifest.json"]]
    assert [row["step"] for row in rows] == [0, 1]
    assert run(config, tmp_path / "run", built=built.append) == record and len(built) == 1
    with pytest.raises(UserError, match="already holds a run"):
        run(config, tmp_path / "run", resume=False)


def test_given_shards_that_are_not_there_are_not_built(config, tmp_path):
    with pytest.raises(UserError, match="nothing"):
        run(config, tmp_path / "run", data=tmp_path / "nothing")
    assert list((tmp_path / "run").iterdir()) == []


def test_what_cannot_train_is_refused_before_anything_is_written(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="must be a multiple of 3 processes"):
        for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            patch.setenv(name, value)
        run(config, tmp_path / "run")
    positions = dataclasses.replace(config, arm="gpt2", model={"max_position_embeddings": 16})
    with pytest.raises(UserError, match="beyond the 16 positions"):
        run(positions, tmp_path / "run")
    assert not (tmp_path / "run").exists()
