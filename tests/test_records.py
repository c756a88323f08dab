"""Run records: what is read is complete and typed, and what is written is what was there before."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qies import records
from qies.config import RunConfig
from qies.errors import UserError

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
COMMITTED = sorted(path.parent for path in REFERENCE.glob("**/run.json"))


def test_every_committed_record_is_read_and_written_again_to_the_byte():
    assert len(COMMITTED) > 100
    for folder in COMMITTED:
        record = records.read(folder)
        assert json.dumps(record.to_dict(), indent=1) + "\n" == (folder / "run.json").read_text(), folder


def test_records_of_every_age_say_what_they_do_not_know():
    """The first ones did not hold the learning rates."""
    found = [records.read(folder) for folder in COMMITTED]
    assert {record.learning_rates is None for record in found} == {True, False}
    assert all(record.val_loss > 0 and record.non_embedding > 0 and record.finished for record in found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("config"), "config is missing"),
        (lambda r: r.pop("config_hash"), "config_hash is missing"),
        (lambda r: r["params"].pop("total"), "params.total is missing"),
        (lambda r: r.update(status="finished"), 'status is "finished"'),
        (lambda r: r.update(tokens="1000"), 'tokens is "1000"'),
        (lambda r: r.update(seed=True), "seed is true"),
        (lambda r: r.update(metrics=None), "metrics is null"),
        (lambda r: r.update(metrics=[1.0]), "metrics is"),
        (lambda r: r.update(speed=1), "unknown field speed"),
        (lambda r: r.update(schema=2), "schema is 2"),
        (lambda r: r.pop("schema"), "schema is None"),
    ],
)
def test_a_record_is_checked_where_it_is_read(change, words, tmp_path):
    record = records.plan(RunConfig("qies", "50k"), 400).to_dict()
    change(record)
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=f"run.json is not a run record of schema 1 .*{words}.*delete that run's folder"
    ):
        records.read(tmp_path)


def test_a_planned_record_comes_back_equal_and_is_created_once(tmp_path):
    record = records.plan(RunConfig("qies", "50k"), 400)
    assert records.create(tmp_path / "run", record) and records.read(tmp_path / "run") == record
    other = records.plan(RunConfig("qies", "50k", seed=1), 400)
    assert not records.create(tmp_path / "run", other) and records.read(tmp_path / "run") == record
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert record.run_config == RunConfig("qies", "50k")
    assert records.query(tmp_path, seed=0) == [record] and records.query(tmp_path, seed=1) == []


def test_records_and_the_tables_of_scaling_need_no_torch():
    code = (
        "import sys; from pathlib import Path; from qies import records; from qies.scaling import read_runs\n"
        f"folder = Path({str(COMMITTED[0])!r}); read_runs(folder)\n"
        "records.plan(records.read(folder).run_config, 400)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
