"""Faults injected into small real runs; the whole table is slow, one of each kind of injection is not."""

import dataclasses
import json
import random
import tempfile
from pathlib import Path

import pytest

import faults
from faults import inputs, kills, lab, steps, storage
from qies import records
from qies.errors import UserError
from qies.storage import write_json


@pytest.fixture(scope="module")
def place(shard_folder, data_config, tmp_path_factory):
    data = dataclasses.replace(data_config, source=str(shard_folder))
    return lab.Lab(tmp_path_factory.mktemp("lab"), data)


def held(outcome):
    assert not outcome.wrong, outcome


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_killed_at_a_random_moment(inside, place):
    held(kills.kill(place, random.Random(1), inside=inside))


@pytest.mark.slow
def test_a_damaged_tensor_file(place):
    newest, _ = storage.newest_two(place.interrupted())
    held(storage.damaged(place, random.Random(0), 1, next(newest.glob("*.safetensors")).name, "flip"))


def test_a_full_disk(place):
    held(storage.full_disk(place, random.Random(0), None))


def test_a_spike_in_a_batch(place):
    held(steps.bad_batch(place, random.Random(0), "spike"))


@pytest.mark.parametrize("name", ["checkpoints is a symlink to a folder", "model is a symlink to a folder",
                                  "JSON bomb in metrics.jsonl", "JSON bomb in run.json"])  # fmt: skip
def test_a_hostile_folder(name, place):
    held(storage.hostile(place, name))


@pytest.mark.parametrize("name", ["JSON bomb as manifest", "token beyond the vocabulary", "tokenizer of another text"])
def test_bad_input(name, place):
    held(inputs.bad_input(place, name))


def test_what_does_not_hold_is_seen(place):
    """The judge itself: another loss, a missing row, one bit of the weights."""
    reference = place.undisturbed()
    assert lab.differs(reference, reference, place.steps) == ""
    rows = (reference / "metrics.jsonl").read_text().splitlines(keepends=True)
    for change, words in ((rows[:-1], "missing or there twice"), ([*rows, rows[-1]], "missing or there twice")):
        out = place.copy(reference)
        (out / "metrics.jsonl").write_text("".join(change))
        assert words in lab.differs(out, reference, place.steps)
    out = place.copy(reference)
    (out / "metrics.jsonl").write_text("".join(rows).replace('"loss": ', '"loss": 1', 1))
    assert "metrics differ from step 0" in lab.differs(out, reference, place.steps)
    out = place.copy(reference)
    storage.damage(out / "model/model.safetensors", "flip", random.Random(0))
    assert "weights differ" in lab.differs(out, reference, place.steps)
    records.write(out, dataclasses.replace(records.read(out), status="running"))
    assert "status is running" in lab.differs(out, reference, place.steps)


def test_the_table_counts_what_held(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # its folder stays where something did not hold

    def inject(place, rng, count):
        for i in range(count):
            yield faults.Outcome(f"number {i}", "" if i else "it did not hold")

    fault = faults.Fault("x", "a fault", "all", inject, 5, 2)
    [row] = faults.run([fault], 0)
    assert (row.injections, row.held) == (5, 4)
    [row] = faults.run([fault], 0, quick=True)
    assert (row.injections, row.held) == (2, 1)
    text = faults.page({"faults": [row.to_dict() | {"seed": 0}], "environment": {"cores": 2, "machine": "m"}})
    assert "| a fault | 2 | 1 | all | 0 |" in text and "number 0: it did not hold" in text


def test_rows_that_are_not_injected_again_stay(tmp_path):
    path = tmp_path / "faults.json"
    assert faults.joined(path, [{"name": "disk", "held": 1}]) == [{"name": "disk", "held": 1}]
    write_json(path, {"faults": [{"name": "disk", "held": 1}, {"name": "kill", "held": 2}]})
    both = faults.joined(path, [{"name": "disk", "held": 3}])
    assert both == [{"name": "kill", "held": 2}, {"name": "disk", "held": 3}]


def test_unknown_names_of_faults_are_bad_input():
    with pytest.raises(UserError, match="Did you mean 'disk'"):
        faults.chosen(["dsik"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_table():
    rows = faults.run(faults.FAULTS, seed=1)
    assert [(r.name, r.held) for r in rows] == [(r.name, r.injections) for r in rows], rows
    assert sum(r.injections for r in rows) > 100


def test_the_page_is_made_of_the_committed_result():
    root = Path(__file__).parents[2]
    result = json.loads((root / "results/reference/bench/faults.json").read_text())
    assert (root / "docs/faults.md").read_text() == faults.page(result)
    assert [row["name"] for row in result["faults"]] == [fault.name for fault in faults.FAULTS]
