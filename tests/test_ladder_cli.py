"""`qies ladder`: what its actions print, when they end, and jobs that share a ladder with other controllers."""

import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from ladder_workers import quick
from qies import cli, ladder, records
from qies.cli.ladder import status_table
from qies.config import StudyConfig, content_hash, save
from qies.data.locate import locate
from qies.ladder.lease import attempts


def call(*argv: object) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in argv])
    return e.value.code or 0


@pytest.fixture
def study(data_config, tiny):
    return locate(StudyConfig("tiny", ("qies",), ("50k",), (0, 1), (0.02, 0.05), data_config, tiny))


@pytest.fixture
def file(study, tmp_path):
    path = tmp_path / "ladder.yaml"
    save(study, path)
    return path


@pytest.fixture
def fast(monkeypatch, tmp_path):
    """Runs take half a second."""
    monkeypatch.setitem(ladder.execute.__kwdefaults__, "command", quick(tmp_path))


def test_plan_run_and_status(study, file, fast, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("ladder", "plan", file, "--json") == 0
    assert [r["config_hash"] for r in json.loads(capsys.readouterr().out)] == [content_hash(c) for c in study.runs()]
    assert call("ladder", "plan", file) == 0
    assert "4 runs" in capsys.readouterr().out and not out.exists()

    assert call("ladder", "run", file, "--out", out, "--workers", "2", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["config_hash"] for r in records] == [content_hash(c) for c in study.runs()]
    assert {r["status"] for r in records} == {"done"}
    assert call("ladder", "run", file, "--out", out) == 0
    text = capsys.readouterr().out
    assert "4 of 4 runs are done already" in text
    for tokens in {r["tokens"] for r in records}:  # a mean over seeds, and over nothing else
        assert f"50k, {tokens / 1e6:.2f}M" in " ".join(text.split()) and f"{1e-6 * tokens + 0.5:.4f}" in text

    assert call("ladder", "status", "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds_left"] == 0 and {r["state"] for r in found["runs"]} == {"done"}
    assert call("ladder", "status", "--out", out) == 0
    text = capsys.readouterr().out
    assert all(r["run"][:8] in text for r in found["runs"]) and "0:00 left" in text


def test_a_finished_ladder_grows_and_keeps_its_runs(study, file, fast, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("ladder", "run", file, "--out", out, "--workers", "2", "--json") == 0
    first = {r["config_hash"]: r for r in json.loads(capsys.readouterr().out)}
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/**/*") if p.is_file()}
    assert call("ladder", "run", file, "--out", out, "train.lr_scale=2") == 2
    assert "different study (train.lr_scale: 1.0 -> 2.0)" in capsys.readouterr().err

    more = ["seeds=[2]", "arms=[no_phase]", "tokens_per_parameter=0.02"]
    assert call("ladder", "run", file, "--out", out, "--workers", "2", "--json", *more) == 0
    records = {r["config_hash"]: r for r in json.loads(capsys.readouterr().out)}
    grid = dataclasses.replace(study, seeds=(0, 1, 2), arms=("qies", "no_phase"))
    assert set(records) == {content_hash(c) for c in grid.runs()} and len(records) == 12
    assert {k: records[k] for k in first} == first  # not done again
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())

    assert call("ladder", "status", "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert {r["run"] for r in found} == set(records) and {r["state"] for r in found} == {"done"}
    assert call("ladder", "run", file, "--out", out) == 0  # the shorter file takes nothing away
    assert "12 of 12 runs are done already" in capsys.readouterr().out


def test_watching_ends_when_the_last_run_does(study, file, fast, tmp_path, capsys):
    out = tmp_path / "out"
    started = time.monotonic()
    working = threading.Thread(target=call, args=("ladder", "run", file, "--out", out, "--workers", "1", "--json"))
    working.start()
    while not (out / "study.yaml").exists():
        time.sleep(0.01)
    assert call("ladder", "status", "--out", out, "--watch", "--json") == 0
    working.join()
    assert time.monotonic() - started < 60
    seen = json.JSONDecoder()
    text = capsys.readouterr().out
    found = [seen.raw_decode(text[at:])[0] for at in range(len(text)) if text.startswith('{\n "schema"', at)]
    assert {r["state"] for r in found[-1]["runs"]} == {"done"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ladder", "run"], "Give one ladder file"),
        (["ladder", "plan", "absent.yaml"], "No configuration file"),
        (["ladder", "go", "FILE"], "Unknown verb 'go'"),
        (["ladder", "run", "FILE", "armz=[qies]"], "Did you mean 'arms'"),
        (["ladder", "run", "FILE", "--workers", "0"], "--workers must be at least 1"),
        (["ladder", "run", "FILE", "--gpus", "2"], "runs of 2 GPUs need"),
        (["ladder", "run", "FILE", "--gpus", "2", "--submit", "local"], "1 runs of 2 GPUs need 2; 0 are visible"),
        (["ladder", "run", "FILE", "--gpus", "3"], "must be a multiple of --gpus times train.accumulate (3 x 1)"),
        (["ladder", "run", "FILE", "seeds=[99999999999999999999]"], "it must be an integer of 64 bits"),
        (["ladder", "run", "FILE", "--jobs", "0", "--submit", "local"], "--jobs must be at least 1"),
        (["ladder", "run", "FILE", "--track", "tensorbord"], "Did you mean 'tensorboard'"),
        (["ladder", "run", "FILE", "--sbatch", "partition=gpu"], "--sbatch belongs to --submit slurm"),
        (["ladder", "run", "FILE", "--submit", "local", "--sbatch", "partition=gpu"], "omit it with --submit local"),
        (["ladder", "run", "FILE", "--submit", "slurm", "--sbatch", "gpu"], "KEY=VALUE"),
        (["ladder", "run", "FILE", "--submit", "slurm"], "slurm took no job"),
        (["ladder", "status"], "qies ladder status needs --out"),
        (["ladder", "status", "FILE", "--out", "absent"], "Unexpected argument"),
        (["ladder", "plan", "FILE", "--sbatch", "partition=gpu"], "Unknown option '--sbatch'"),
        (["ladder", "status", "--out", "absent"], "Give --out DIR"),
    ],
)
def test_bad_input_is_one_line_and_two(argv, words, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as a job of GPUs has it; they are not there
    assert call(*[file if a == "FILE" else a for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_a_missing_package_is_named_with_what_brings_it(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = importlib.util.find_spec
    hidden = {"trackio", "submitit"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in hidden else found(name, *a))
    for words in (["--track", "trackio"], ["--submit", "local"]):
        assert call("ladder", "run", file, *words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "pip install 'qies[" in err
        assert not (tmp_path / "results").exists()


def finish(folder, configs, seconds=120):
    """Wait until every run is over."""
    deadline = time.monotonic() + seconds
    while not all(ladder.finished(ladder.run_folder(folder, c)) for c in configs):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_jobs_and_a_controller_share_a_ladder(study, shard_folder, tmp_path):
    pytest.importorskip("submitit")
    configs, root, how = study.runs(), tmp_path / "runs", {"threads": 1, "gpus": 0, "retries": 2, "workers": 1}
    ids = ladder.submit(
        configs, root, shard_folder, tmp_path / "jobs", cluster="local", jobs=1, minutes=5,
        command=(*quick(tmp_path), "job"), **how,
    )  # fmt: skip
    while not list(root.glob("*/starts")):
        time.sleep(0.05)
    ladder.execute(configs, root, shard_folder, command=(*quick(tmp_path), "here"), **how)
    finish(root, configs)
    assert len(ids) == 1
    starts = [(ladder.run_folder(root, c) / "starts").read_text().split() for c in configs]
    assert sorted(map(len, starts)) == [1] * 4 and {s[0] for s in starts} == {"job", "here"}
    assert [[a.outcome for a in attempts(ladder.run_folder(root, c))] for c in configs] == [["done"]] * 4


def test_a_job_that_is_queued_again_carries_nothing_over(study, tmp_path):
    pytest.importorskip("submitit")
    from qies.ladder.jobs import Controller

    job = Controller(tuple(study.runs()), tmp_path, tmp_path, {"workers": 1})
    assert job.checkpoint().function == job


def test_failed_runs_are_given_new_attempts_once_by_who_submits(study, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    reset, started = [], []
    monkeypatch.setattr("qies.ladder.lease.reset", lambda folder, *_: reset.append(folder.name))
    monkeypatch.setattr("submitit.AutoExecutor.submit", lambda self, job: started.append(job) or job)
    monkeypatch.setattr("qies.ladder.jobs.Controller.job_id", "7", raising=False)
    ids = ladder.submit(
        study.runs(), tmp_path, tmp_path, tmp_path / "jobs", cluster="local", jobs=2, minutes=5, retry_failed=True,
        workers=1, threads=1, gpus=0, retries=2,
    )  # fmt: skip
    assert ids == ["7", "7"] and sorted(reset) == sorted(content_hash(c) for c in study.runs())
    assert [job.how.get("retry_failed", False) for job in started] == [False, False]


@pytest.mark.slow
def test_a_submitted_ladder_trains(file, tmp_path, capsys):
    pytest.importorskip("submitit")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qies", "ladder", "run", str(file), "--out", str(out), "--submit", "local"]
    done = subprocess.run([*command, "--track", "tensorboard", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["jobs"]) == 1
    assert call("ladder", "status", "--out", out, "--watch") == 0
    found = [records.read(p.parent) for p in out.glob("runs/*/run.json")]
    assert [r.status for r in found] == ["done"] * 4
    assert all(list((out / "runs" / r.config_hash / "tensorboard").glob("events*")) for r in found)


@pytest.mark.parametrize(
    ("size", "tokens", "steps", "rate", "seconds", "cells"),
    [
        ("400k", 800_768, 391, 30_123.4, 3_599, ("801k", "391/391", "30.1k", "59:59")),
        ("6m", 120_000_000, 29_296, 3_000.0, 86_400, ("120M", "29.3k/29.3k", "3000", "24h00")),
        ("1b", 20_000_000_000, 4_882_812, 430_123.4, 720_000, ("20.0B", "4.88M/4.88M", "430k", "8d08")),
    ],
)
def test_the_status_table_fits_eighty_columns(size, tokens, steps, rate, seconds, cells):
    run = {
        "run": "0123456789abcdef", "arm": "transformer", "size": size, "tokens": tokens, "seed": 0,
        "state": "interrupted", "step": steps, "steps": steps, "tokens_per_second": rate, "loss": 4.5,
        "seconds_left": seconds,
    }  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=80).print(status_table({"runs": [run], "seconds_left": 3_600}))
    assert all(cell in text.getvalue() for cell in ("transformer", "interrupted", *cells))
    assert "…" not in text.getvalue()
