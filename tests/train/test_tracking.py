"""TensorBoard and trackio hold what metrics.jsonl holds, each step once, through kills and resumes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from qies import records
from qies.config import RunConfig
from qies.errors import UserError
from qies.train.tracking import RESULTS, SERIES, parse, tracking

ROWS = [
    {"step": 0, "tokens": 128, "lr_factor": 0.5, "loss": 6.0, "grad_norm": 1.0, "seconds": 0.1},
    {"step": 1, "tokens": 256, "lr_factor": 1.0, "loss": None, "grad_norm": None, "skipped": "loss", "seconds": 0.2},
    {"step": 2, "tokens": 384, "lr_factor": 1.0, "loss": 5.0, "grad_norm": 2.0, "seconds": 0.3},
    {"step": 3, "tokens": 512, "lr_factor": 0.0, "loss": 4.0, "grad_norm": 3.0, "seconds": 0.4},
]  # fmt: skip
METRICS = {"val_loss": 4.5, "val_loss_clean": 4.75, "val_bpb": 2.0, "train_loss": 5.0}
RECORD = replace(records.plan(RunConfig("qies", "50k"), 400), status="running", steps=4)


def of_tensorboard(folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)]
            for name in events.Tags()["scalars"]}  # fmt: skip


def of_trackio(folder):
    """Read in a fresh process: the store's path is fixed when trackio is imported."""
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "[run] = S.get_run_records('qies'); print(json.dumps(S.get_logs('qies', run['name']), default=str))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = {}
    for row in json.loads(text):
        for name in (*SERIES, *RESULTS):
            if name in row:
                found.setdefault(name, []).append((row["step"], row[name]))
    return found


def expected(rows, metrics):
    found = {name: [(r["step"], r[name]) for r in rows if r[name] is not None] for name in SERIES}
    return found | {name: [(len(rows), value)] for name, value in metrics.items()}


READERS = {"tensorboard": of_tensorboard, "trackio": of_trackio}


def attempt(name, folder, first, last, ends=False):
    """A process that takes steps from `first` to `last`, as the loop does, and ends the run or is killed."""
    code = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
from dataclasses import replace
from test_tracking import METRICS, RECORD, ROWS
from qies import records
from qies.train.tracking import parse, tracking
folder = Path({str(folder)!r})
records.truncate_steps(folder, {first}) if {first} else None
with tracking(parse({name!r}), folder) as see:
    for row in ROWS[{first}:{last}]:
        records.append(folder, row)
        see(row)
    if not {ends}: os._exit(9)
    records.write(folder, replace(RECORD, status="done", metrics=METRICS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == (0 if ends else 9), done.stderr
    assert done.stdout == ""  # which is for results


@pytest.mark.parametrize("name", READERS)
def test_every_step_is_there_once_after_a_kill(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    records.write(tmp_path, RECORD)
    attempt(name, tmp_path, 0, 3)
    attempt(name, tmp_path, 2, 4, ends=True)  # goes back to a checkpoint at step 2
    assert READERS[name](tmp_path) == expected(ROWS, METRICS)


def test_a_run_whose_end_alone_was_missing_is_whole(tmp_path):
    pytest.importorskip("tensorboard")
    records.write(tmp_path, RECORD)
    for row in ROWS:
        records.append(tmp_path, row)
    with tracking(("tensorboard",), tmp_path):
        records.write(tmp_path, replace(RECORD, status="done", metrics=METRICS))
    assert of_tensorboard(tmp_path) == expected(ROWS, METRICS)


def test_a_reader_that_is_open_forgets_what_is_written_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records.write(tmp_path, RECORD)
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    for first, last in ((0, 3), (1, 4)):
        if first:
            records.truncate_steps(tmp_path, first)
        with tracking(("tensorboard",), tmp_path) as see:
            for row in ROWS[first:last]:
                records.append(tmp_path, row)
                see(row)
        reader.Reload()
        assert [e.step for e in reader.Scalars("tokens")] == list(range(last))


def test_a_finished_run_is_left_alone(tmp_path):
    records.write(tmp_path, replace(RECORD, status="done", metrics=METRICS))
    with tracking(("tensorboard",), tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_run_tracked_from_its_middle_has_the_steps_before(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    records.write(tmp_path, RECORD)
    for row in ROWS[:2]:
        records.append(tmp_path, row)
    attempt(name, tmp_path, 2, 4, ends=True)
    assert READERS[name](tmp_path) == expected(ROWS, METRICS)


def test_without_trackers_nothing_is_written(tmp_path):
    records.write(tmp_path, RECORD)
    with tracking((), tmp_path) as see:
        see(ROWS[0])
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_what_cannot_be_written_is_one_line(monkeypatch):
    assert parse("") == ()
    with pytest.raises(UserError, match="Did you mean 'trackio'"):
        parse("tensorboard,track-io")
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/somewhere")
    with pytest.raises(UserError, match="local store only; unset TRACKIO_SPACE_ID"):
        parse("trackio")


def test_ranks_part_before_a_tracker_closes(monkeypatch, tmp_path, shard_folder, data_config, tiny):
    """One that takes long to close would look to the other ranks like a process that died."""
    from contextlib import contextmanager

    from qies.config import RunConfig
    from qies.ladder import worker
    from qies.train import distributed, run

    order = []

    def logged(name, value):
        @contextmanager
        def context(*_):
            yield value
            order.append(name)

        return context

    monkeypatch.setattr(run, "start", logged("group", distributed.Group()))
    monkeypatch.setattr(run, "tracking", logged("tracker", lambda row: None))
    monkeypatch.setattr(run, "train", lambda *_, **__: None)
    records.write(tmp_path, records.plan(RunConfig("qies", "50k", 128, 0, data_config, tiny), 300))
    assert worker.main(tmp_path, shard_folder, 1) == 0
    assert order == ["group", "tracker"]
