"""A probe from the configuration to the table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qies import presets
from qies.errors import UserError
from qies.probes.protocol import ProbeConfig, train_probe, training_lengths
from qies.probes.sweep import ProbeSweep, run_sweep, summary
from qies.probes.tasks import task

SMALL = {"hidden_size": 16, "heads": 2, "length": 8, "longer": (1, 2), "steps": 3, "batch_size": 4}


@pytest.mark.parametrize("arm", [arm for arm in presets.ARMS if arm != "gpt2"])
def test_every_arm_trains_and_repeats(arm):
    first, second = (train_probe(ProbeConfig(task="s3", arm=arm, **SMALL)) for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second and set(first["accuracy"]) == {"8", "16"}


@pytest.mark.slow
def test_parity_is_learned():
    """One entanglement layer with reflections learns parity and carries it to 8 times the length."""
    probe = ProbeConfig(
        task="parity", arm="no_phase", hidden_size=32, heads=2, length=8, longer=(1, 8), steps=600, batch_size=32
    )
    result = train_probe(probe)
    assert result["accuracy"]["64"] > 0.99


def test_lengths_double_over_the_first_half():
    probe = ProbeConfig(task="s3", length=64, steps=80)
    assert training_lengths(probe, task("s3")) == [4] * 10 + [8] * 10 + [16] * 10 + [32] * 10 + [64] * 40
    # eight items do not fit into less than 16 tokens
    copy = ProbeConfig(task="selective-copy", length=64, steps=80)
    lengths = training_lengths(copy, task("selective-copy"))
    assert lengths == [16] * 30 + [32] * 10 + [64] * 40


@pytest.mark.slow  # each of its processes imports torch
def test_a_sweep_resumes_and_counts_seeds(tmp_path):
    sweep = ProbeSweep(("s3",), ("no_phase",), (0, 1), probe=ProbeConfig(**SMALL))
    seen = []
    records = run_sweep(sweep, tmp_path, 2, seen.append)
    assert len(records) == len(seen) == 2 == len(list(tmp_path.glob("*.json")))
    [lost] = tmp_path.glob("s3-no_phase-1-*.json")
    before = lost.read_text()
    lost.unlink()
    again = run_sweep(sweep, tmp_path, 1, lambda record: None)
    for record in (*again, *records, old := json.loads(before)):
        record.pop("seconds")
    assert again == records and old in again
    assert [record["config"]["seed"] for record in again] == [0, 1]
    rows = summary(again)
    assert [(row["task"], row["seeds"]) for row in rows] == [("s3", 2)]
    assert all(row["solved"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through /proc")
def test_the_workers_of_a_killed_sweep_end(tmp_path):
    words = ["tasks=[s3]", "arms=[no_phase]", "probe.steps=1000000", "--workers", "1", "--out", str(tmp_path)]
    sweep = subprocess.Popen([sys.executable, "-m", "qies", "probe", *words], stdout=subprocess.DEVNULL)

    def wait(happens) -> None:
        deadline = time.monotonic() + 120
        while not happens():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def stat(process: str) -> list[str]:  # from the state on; a process that has ended may wait for its parent as Z
        path = Path(f"/proc/{process}/stat")
        return path.read_text().rpartition(")")[2].split() if path.exists() else ["Z"]

    def seconds(process: str) -> float:  # of CPU time
        return int(stat(process)[11]) / os.sysconf("SC_CLK_TCK")

    try:
        children = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
        wait(lambda: any(seconds(child) > 10 for child in children.read_text().split()))  # imported, and in training
        workers = children.read_text().split()
    finally:
        sweep.kill()
        sweep.wait()
    wait(lambda: all(stat(worker)[0] == "Z" for worker in workers))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": "s33"}, "Did you mean 's3'"),
        ({"arm": "qeis"}, "Did you mean 'qies'"),
        ({"model": {"fase": "none"}}, "Did you mean 'phase'"),
        ({"task": "mqar", "length": 65536}, "fewer pairs"),
        ({"hidden_size": 30}, "multiple of twice"),
        ({"steps": 0}, "at least 1"),
        ({"lr": float("nan")}, "positive"),
        ({"label_smoothing": 1.0}, r"lie in \[0, 1\)"),
        ({"arm": "transformer:layers=0"}, "at least 1"),
        ({"arm": "transformer:layers"}, "KEY=VALUE"),
        ({"arm": "no_phase:eigenvalue=unit"}, "Did you mean 'eigenvalues'"),
        ({"arm": "no_phase:eigenvalues=half"}, "Unknown value 'half'"),
    ],
)
def test_bad_input_is_one_line_before_training(values, words):
    with pytest.raises(UserError, match=words):
        ProbeConfig(**values)


def test_an_arm_takes_options():
    model = {"eigenvalues": "disc", "gate": "none"}
    values = ProbeConfig(arm="no_phase:eigenvalues=unit:layers=2", model=model).values()
    assert (values["eigenvalues"], values["gate"]) == ("unit", "none")
    assert values["layer_types"] == ["linear_attention"] * 2 and values["num_hidden_layers"] == 2


def test_a_learning_rate_is_chosen_for_each_arm_by_its_first_seed(tmp_path, monkeypatch):
    """On validation rows; of equal ones the lower. The other seeds take it, and only these records are the result."""
    best = {"qies": [0.1, 0.1, 0.9], "no_phase": [0.5, 0.5, 0.2]}
    asked = []

    def missing(probes, out, workers, progress):
        asked.append([(p.arm, p.lr, p.seed) for p in probes])
        lrs = (0.001, 0.003, 0.01)
        return [
            {"config": {"task": p.task, "arm": p.arm, "lr": p.lr, "seed": p.seed},
             "validation": best[p.arm][lrs.index(p.lr)]}
            for p in probes
        ]  # fmt: skip

    monkeypatch.setattr("qies.probes.sweep.train_missing", missing)
    sweep = ProbeSweep(("s3",), ("qies", "no_phase"), (4, 5, 6), (0.001, 0.003, 0.01), ProbeConfig(**SMALL))
    records = [r["config"] for r in run_sweep(sweep, tmp_path, 1, lambda record: None)]
    assert asked[0] == [(arm, lr, 4) for arm in ("qies", "no_phase") for lr in (0.001, 0.003, 0.01)]
    assert asked[1] == [("qies", 0.01, 5), ("qies", 0.01, 6), ("no_phase", 0.001, 5), ("no_phase", 0.001, 6)]
    assert [(r["arm"], r["lr"], r["seed"]) for r in records] == [
        *(("qies", 0.01, seed) for seed in (4, 5, 6)), *(("no_phase", 0.001, seed) for seed in (4, 5, 6))
    ]  # fmt: skip
    assert len(sweep) == 10


@pytest.mark.parametrize("lrs", [(0.1, 0.1), (0.0,)])
def test_bad_learning_rates_of_a_sweep(lrs):
    with pytest.raises(UserError, match=r"repeats|positive"):
        ProbeSweep(lrs=lrs)
