"""Many runs by many controllers: leases, retries, kills. Workers are tiny commands that keep count of themselves."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qies import ladder, records
from qies.config import RunConfig, StudyConfig, content_hash, from_dict, to_dict
from qies.errors import UserError
from qies.ladder import lease as leases
from qies.ladder.lease import acquire, attempts
from qies.ladder.process_group import ProcessGroup

# Counts its starts, takes the run's lock as the training loop does, writes three rows once, and is done.
FAKE = """
import fcntl, json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[-3])
lock = open(folder / ".lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
record = json.loads((folder / "run.json").read_text())
if record["status"] == "done": sys.exit(0)
parent, starts = os.getppid(), folder / "starts"
count = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (count + 1))
if count < int(sys.argv[1]): print("broken by design"); sys.exit(int(sys.argv[2]))
for step in range(3):
    time.sleep(0.1)
    if os.getppid() != parent: (folder / "metrics.jsonl").unlink(missing_ok=True); sys.exit(143)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": step, "tokens": step + 1, "seconds": 1, "loss": 1.0}) + chr(10))
partial = folder / ".r"
partial.write_text(json.dumps(record | {"status": "done"}))
os.replace(partial, folder / "run.json")
"""


@pytest.fixture
def fake(tmp_path):
    """Gives the command of a worker that fails `n` times with `code` before it works."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return lambda n=0, code=1: (sys.executable, "-S", str(path), str(n), str(code))


@pytest.fixture
def grid(data_config, tiny):
    return [RunConfig("qies", "50k", 128, seed, data_config, tiny) for seed in range(4)]


def planned(tmp_path):
    folder = tmp_path / "run"
    records.write(folder, records.plan(RunConfig("qies", "50k"), 400))
    return folder


def controller(grid, root, data, command, **how):
    """`execute` in a process of its own."""
    code = (
        "import json, sys; from pathlib import Path; from qies import ladder; from qies.config import *\n"
        "configs, root, data, command, how = json.loads(sys.argv[1])\n"
        "ladder.execute([from_dict(RunConfig, c) for c in configs], Path(root), Path(data), command=command, **how)"
    )
    words = json.dumps([[to_dict(c) for c in grid], str(root), str(data), list(command), how])
    return subprocess.Popen([sys.executable, "-c", code, words])


def done_once(root, grid):
    for config in grid:
        folder = root / content_hash(config)
        assert records.read(folder).status == "done"
        assert [r["step"] for r in records.steps(folder)] == [0, 1, 2]


def test_two_controllers_share_the_work_and_do_each_run_once(grid, shard_folder, fake, tmp_path):
    root = tmp_path / "runs"
    both = [controller(grid, root, shard_folder, fake(), workers=1) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    done_once(root, grid)
    for config in grid:
        assert (root / content_hash(config) / "starts").read_text() == "x"
        assert [a.outcome for a in attempts(root / content_hash(config))] == ["done"]


def test_a_killed_controller_loses_no_run(grid, shard_folder, fake, tmp_path):
    root = tmp_path / "runs"
    first = controller(grid, root, shard_folder, fake(), workers=2)
    deadline = time.time() + 100
    while not list(root.glob("*/metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    ladder.execute(grid, root, shard_folder, workers=2, command=fake())
    done_once(root, grid)
    notes = [a.facts.get("took_over") for c in grid for a in attempts(root / content_hash(c))]
    assert any(notes)


def test_a_run_that_fails_twice_then_works(grid, shard_folder, fake, tmp_path):
    [record] = ladder.execute(grid[:1], tmp_path, shard_folder, workers=1, command=fake(2))
    history = attempts(tmp_path / content_hash(grid[0]))
    assert record.status == "done" and [a.outcome for a in history] == ["failed", "failed", "done"]
    assert history[0].facts["reason"] == "its process ended with code 1: broken by design"


def test_failures_are_bounded_and_others_go_on_and_can_be_tried_again(grid, shard_folder, fake, tmp_path):
    call = dict(workers=1, retries=1, command=fake(2))
    found = ladder.execute(grid[:2], tmp_path, shard_folder, **call)
    assert [r.status for r in found] == ["failed", "failed"] and "broken by design" in found[0].error
    assert ladder.execute(grid[:2], tmp_path, shard_folder, **call) == found
    found = ladder.execute(grid[:2], tmp_path, shard_folder, retry_failed=True, **call)
    assert [r.status for r in found] == ["done", "done"]


def test_a_run_that_a_signal_ends_is_not_tried_for_ever(grid, shard_folder, fake, tmp_path):
    """143 is how a worker ends that was told to stop; nobody but its controller may tell it so for nothing."""
    call = dict(workers=1, retries=1)
    [record] = ladder.execute(grid[:1], tmp_path, shard_folder, command=fake(9, 143), **call)
    history = attempts(tmp_path / content_hash(grid[0]))
    assert record.status == "failed" and [a.outcome for a in history] == ["failed", "failed"]


def test_a_stopped_controller_uses_up_no_retry(grid, shard_folder, fake, tmp_path):
    def stop(config, rows, status):
        if rows:
            raise KeyboardInterrupt

    call = dict(workers=1, retries=0, command=fake())
    with pytest.raises(KeyboardInterrupt):
        ladder.execute(grid[:1], tmp_path, shard_folder, event=stop, **call)
    folder = tmp_path / content_hash(grid[0])
    assert [a.outcome for a in attempts(folder)] == ["interrupted"]
    [record] = ladder.execute(grid[:1], tmp_path, shard_folder, **call)
    assert record.status == "done" and [a.outcome for a in attempts(folder)] == ["interrupted", "done"]


def test_bad_input_is_not_tried_again(grid, shard_folder, fake, tmp_path):
    [record] = ladder.execute(grid[:1], tmp_path, shard_folder, workers=1, command=fake(1, 2))
    assert record.status == "failed" and len(attempts(tmp_path / content_hash(grid[0]))) == 1


def test_one_of_many_gets_an_abandoned_lease(tmp_path):
    folder = planned(tmp_path)
    first = acquire(folder, "a")
    assert first and acquire(folder, "b") is None and first.beat()
    facts = json.loads(first.path.read_text()) | {"host": "elsewhere"}
    first.path.write_text(json.dumps(facts))
    assert acquire(folder, "b", stale=60) is None
    os.utime(first.path, (0, time.time() - 61))
    second = acquire(folder, "b", stale=60)
    assert second.number == 2 and acquire(folder, "c") is None
    assert not first.beat() and second.beat()


def test_a_hosts_clock_does_not_matter(tmp_path, monkeypatch):
    folder = planned(tmp_path)
    held = acquire(folder, "a")
    held.path.write_text(json.dumps(json.loads(held.path.read_text()) | {"host": "elsewhere", "at": 0}))
    now = time.time()
    for skew in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda skew=skew: now + skew)
        assert acquire(folder, "b") is None
    os.utime(held.path, (0, now + 1e6))  # the file system's own clock was set back
    assert acquire(folder, "b").number == 2


def test_a_process_id_used_again_is_not_the_owner(tmp_path):
    folder = planned(tmp_path)
    held = acquire(folder, "a")
    held.path.write_text(json.dumps(held.facts | {"started": "1"}))
    assert acquire(folder, "b").number == 2


def test_the_loser_of_a_race_for_the_next_attempt_gets_nothing(tmp_path, monkeypatch):
    folder = planned(tmp_path)
    assert leases.acquire(folder, "a")
    monkeypatch.setattr(leases, "attempts", lambda _: [])  # what b read before a's lease was there
    assert leases.acquire(folder, "b") is None


def test_several_budgets_and_the_scalar_form():
    one = StudyConfig(tokens_per_parameter=6.0)
    many = from_dict(StudyConfig, to_dict(one) | {"tokens_per_parameter": [6, 12]})
    assert to_dict(one)["tokens_per_parameter"] == 6.0
    hashes = {content_hash(c) for c in many.runs()}
    assert {content_hash(c) for c in one.runs()} < hashes and len(hashes) == 2 * len(one.runs())


def test_status_reads_folders_alone(grid, shard_folder, fake, tmp_path):
    ladder.execute(grid[:1], tmp_path, shard_folder, workers=1, command=fake())
    found = ladder.status(grid, tmp_path, [8.0] * 4)
    assert [r["state"] for r in found["runs"]] == ["done", "planned", "planned", "planned"]
    assert found["runs"][0]["attempts"] == 1 and found["seconds_left"] == 24.0


def test_a_worker_trains_on_the_device_it_finds_and_ends_with_its_controller(grid, shard_folder, tmp_path, monkeypatch):
    from qies.ladder import worker
    from qies.train import distributed, run

    config = dataclasses.replace(grid[0], data=dataclasses.replace(grid[0].data, source=str(shard_folder)))
    records.write(tmp_path, records.plan(config, 400))
    own, seen = distributed.Group(), {}
    monkeypatch.setattr(run, "start", lambda folder: contextlib.nullcontext(own))
    monkeypatch.setattr(run, "train", lambda config, *rest, **how: seen.update(how, config=config))
    assert worker.main(tmp_path, shard_folder, 1) == 0
    assert seen["group"] is own and seen["parent"] == os.getppid() and seen["config"] == config


def shell(tmp_path, script, count):
    """Ranks of a shell script, once they have ended, and what they printed."""
    ranks = ProcessGroup(["sh", "-c", script], dict(os.environ), tmp_path / "log", count)
    code = ranks.wait(20)
    assert ranks.poll() == ranks.returncode == code
    return code, sorted((tmp_path / "log").read_text().split())


def test_a_run_of_several_gpus_is_as_many_processes_that_can_meet(tmp_path):
    code, printed = shell(tmp_path, "echo $RANK/$LOCAL_RANK/$WORLD_SIZE/$MASTER_ADDR:$MASTER_PORT", 2)
    port = printed[0].split(":")[1]
    assert code == 0 and int(port) > 0 and printed == [f"{r}/{r}/2/127.0.0.1:{port}" for r in (0, 1)]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 2", 2),
        ("exit $RANK", 1),
        ("test $RANK = 1 && kill -9 $$; exit 1", -9),  # the others end of it
        ("exit 143", 143),
    ],
)
def test_the_code_of_several_processes_tells_what_ended_them(tmp_path, script, code):
    assert shell(tmp_path, script, 3)[0] == code


def test_a_torchrun_around_the_ladder_is_none_of_the_run(tmp_path, monkeypatch):
    """With its variables rank 0 would start no store, and all would wait for one."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert shell(tmp_path, "echo ${TORCHELASTIC_USE_AGENT_STORE:-none}", 2) == (0, ["none", "none"])


def test_devices_that_are_not_there_are_no_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # as submitit's local executor sets it
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ladder.devices(2, 1) == ["0", "1"]
    with pytest.raises(UserError, match="2 runs of 2 GPUs need 4; 2 are visible"):
        ladder.devices(2, 2)


@pytest.mark.parametrize(
    ("codes", "stopping", "outcome"),
    [
        ("143 250", True, "interrupted"),  # one of them ended badly after it had saved
        ("1 143", True, "interrupted"),
        ("1 143", False, "failed"),
        ("2 2", True, "refused"),
    ],
)
def test_an_attempt_is_interrupted_when_a_rank_was(codes, stopping, outcome, tmp_path):
    folder = planned(tmp_path)
    held = acquire(folder, "me", stale=60, retries=0)
    ranks = ProcessGroup(["sh", "-c", f"set -- {codes}; shift $RANK; exit $1"], dict(os.environ), held.log, 2)
    ranks.wait(20)
    ladder.controller._settle(ladder.Slot(None, folder, ranks, held), 0, stopping)
    assert attempts(folder)[-1].outcome == outcome


def test_the_reason_of_a_failure_is_what_took_the_rank_not_that_it_is_missed(tmp_path):
    folder = planned(tmp_path)
    held = acquire(folder, "me", stale=60, retries=0)
    script = "test $RANK = 0 && sleep 0.3 && echo rank 1 of 2 has ended '(killed, or failed)' || echo no memory"
    ranks = ProcessGroup(["sh", "-c", f"{script}; exit 1"], dict(os.environ), held.log, 2)
    ranks.wait(20)
    ladder.controller._settle(ladder.Slot(None, folder, ranks, held), 0)
    assert records.read(folder).error == "its process ended with code 1: no memory"


def test_every_process_of_a_run_is_stopped(tmp_path):
    ranks = ProcessGroup(["sleep", "60"], dict(os.environ), tmp_path / "log", 2)
    assert ranks.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        ranks.wait(0.05)
    ranks.terminate()
    assert ranks.wait(20) == -signal.SIGTERM and [p.returncode for p in ranks.processes] == [-signal.SIGTERM] * 2


@pytest.mark.slow
def test_a_run_on_two_devices_equals_that_on_one(grid, shard_folder, tmp_path, monkeypatch):
    """Two processes of one run, gloo for want of GPUs."""
    exact = dataclasses.replace(grid[0].train, muon_precision="fp32")
    config = dataclasses.replace(grid[0], tokens=5 * grid[0].tokens, train=exact)
    (alone,) = ladder.execute([config], tmp_path / "one", shard_folder, workers=1)
    monkeypatch.setattr(ladder.controller, "devices", lambda workers, gpus: ["0,1"])
    (both,) = ladder.execute([config], tmp_path / "two", shard_folder, workers=1, gpus=2)
    assert (alone.processes, both.processes, both.status) == (1, 2, "done")
    folders = [tmp_path / name / content_hash(config) for name in ("one", "two")]
    losses = [[row["loss"] for row in records.steps(folder)] for folder in folders]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(attempts(folders[1])) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"rope_theta": 1e4}}, "model.rope_theta: 10000.0 -> 1000000.0"),
        ({"data": {"hash": "0" * 64, "tokenizer_sha256": "0"}}, "another tokenizer"),
        ({"data": {"hash": "0" * 64}}, "other data"),
    ],
)
@pytest.mark.parametrize("status", ["planned", "done"])
def test_a_record_of_another_model_or_text_is_no_run_of_this_ladder(
    change, words, status, grid, shard_folder, fake, tmp_path
):
    """Neither found finished nor resumed."""
    record = dataclasses.replace(records.plan(grid[1], 400), status=status)
    for part, values in change.items():
        record = dataclasses.replace(record, **{part: (getattr(record, part) or {}) | values})
    records.write(ladder.run_folder(tmp_path, grid[1]), record)
    with pytest.raises(UserError, match=words):
        ladder.execute(grid[:2], tmp_path, shard_folder, workers=1, command=fake())
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [content_hash(grid[1])]


def test_a_batch_that_does_not_divide_among_the_devices_is_refused_before_a_run_is_planned(
    grid, shard_folder, tmp_path
):
    config = dataclasses.replace(grid[0], train=dataclasses.replace(grid[0].train, batch_size=3))
    with pytest.raises(UserError, match=r"batch_size is 3; it must be a multiple .* \(2 x 1\)"):
        ladder.execute([config], tmp_path, shard_folder, workers=1, gpus=2)
    assert not any(tmp_path.iterdir())
