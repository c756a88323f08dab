"""One run on two processes: the same losses, the same data order, and no rank lost in silence."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from qies import runs
from qies.config import RunConfig, save
from qies.errors import UserError
from qies.train.parallel import Group

TOLERANCE = 1e-5  # nats; fp32 sums in another order


def test_alone_a_group_is_the_identity():
    group = Group()
    assert group.rows(4) == slice(0, 4) and group.on_first(lambda: 3) == 3
    assert torch.equal(group.gather([1.0, 2.0]), torch.tensor([[1.0, 2.0]], dtype=torch.float64))


def test_the_slices_of_all_ranks_are_the_batch():
    assert [list(range(6))[Group(r, 3).rows(6)] for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="multiple of the 4 processes"):
        Group(0, 4).rows(6)


class Launch:
    """`qies train` on `size` processes, started as torchrun starts them but without its agent, so that a test may kill
    one and see what the other does by itself."""

    def __init__(self, config, out, size):
        path = out.with_suffix(".yaml")
        save(config, path)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        command = [sys.executable, "-m", "qies", "train", "--config", str(path), "--out", str(out), "--json"]
        self.out, self.all = out, []
        for rank in range(size):
            many = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, "OMP_NUM_THREADS": "1", **(many if size > 1 else {})}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.all.append(subprocess.Popen(command, env=env, **pipes))

    def after(self, rows):
        """Wait until the run has written that many rows."""
        deadline = time.time() + 120
        while len(runs.steps(self.out)) < rows and all(p.poll() is None for p in self.all):
            assert time.time() < deadline
            time.sleep(0.01)
        return self

    def codes(self, timeout=120):
        try:
            self.errors = [p.communicate(timeout=timeout)[1] for p in self.all]
        finally:
            for p in self.all:
                with contextlib.suppress(ProcessLookupError):
                    p.kill()
        return [p.returncode for p in self.all]


@pytest.fixture(scope="module")
def config(shard_folder, data_config, tiny):
    train = dataclasses.replace(tiny, muon_precision="fp32", save_every=7)
    data = dataclasses.replace(data_config, source=str(shard_folder))
    return RunConfig(arm="qies", size="50k", tokens=32 * 4 * 60, data=data, train=train)


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "out"
    launch = Launch(config, out, 2)
    assert launch.codes() == [0, 0], launch.errors
    return out


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    from pathlib import Path

    from qies.data.shards import open_shards
    from qies.train.loop import train

    out = tmp_path_factory.mktemp("one") / "out"
    train(config, open_shards(Path(config.data.source)), out)
    return out


def same_within(a, b, tolerance, first=None):
    left, right = runs.steps(a), runs.steps(b)
    assert [r["step"] for r in left] == [r["step"] for r in right] == list(range(60))
    return max(abs(x["loss"] - y["loss"]) for x, y in list(zip(left, right, strict=True))[:first]) < tolerance


def final(folder):
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one(one, two):
    assert same_within(one, two, TOLERANCE, 20)
    a, b = runs.read(one), runs.read(two)
    assert (a["processes"], b["processes"]) == (1, 2)
    assert abs(a["metrics"]["val_loss"] - b["metrics"]["val_loss"]) < 1e-4
    assert a["metrics"]["val_tokens"] == b["metrics"]["val_tokens"]
    assert a["metrics"]["val_bytes"] == b["metrics"]["val_bytes"]
    assert {k: v.shape for k, v in final(one).items()} == {k: v.shape for k, v in final(two).items()}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["qies", "gpt2"])
def test_torchrun_with_micro_batches_and_recomputation_equals_one(arm, config, tmp_path):
    from pathlib import Path

    from qies.data.shards import open_shards
    from qies.train.loop import train

    short = dataclasses.replace(config, arm=arm, tokens=32 * 4 * 20)
    train(short, open_shards(Path(config.data.source)), tmp_path / "one")
    micro = dataclasses.replace(short, train=dataclasses.replace(config.train, accumulate=2, recompute=True))
    save(micro, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["qies", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    left, right = runs.steps(tmp_path / "one"), runs.steps(tmp_path / "two")
    assert len(left) == len(right) == 20
    assert max(abs(x["loss"] - y["loss"]) for x, y in zip(left, right, strict=True)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_named_and_the_run_resumes_bit_for_bit(lost, config, two, tmp_path):
    launch = Launch(config, tmp_path / "out", 2).after(10)
    launch.all[lost].kill()
    started = time.time()
    codes = launch.codes(60)
    assert time.time() - started < 60
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    assert f"rank {lost} of 2 is gone" in launch.errors[1 - lost]
    launch = Launch(config, tmp_path / "out", 2)
    assert launch.codes() == [0, 0], launch.errors
    assert same_within(two, tmp_path / "out", 1e-300)
    a, b = final(two), final(tmp_path / "out")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_run_moves_from_two_processes_to_one_and_back(config, one, tmp_path):
    """A signal to one rank alone stops both, at the same step, with everything saved."""
    out = tmp_path / "out"
    for size, rows in ((2, 10), (1, 25)):
        launch = Launch(config, out, size).after(rows)
        launch.all[0].send_signal(signal.SIGTERM)
        assert set(launch.codes()) == {143}, launch.errors
        assert runs.read(out)["status"] == "running" and len(runs.steps(out)) < 60
    launch = Launch(config, out, 2)
    assert launch.codes() == [0, 0], launch.errors
    assert same_within(one, out, 1e-4)


@pytest.mark.slow
def test_bad_input_ends_all_ranks_before_training(config, tmp_path):
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=5), tokens=32 * 5 * 60)
    launch = Launch(odd, tmp_path / "out", 2)
    assert launch.codes() == [2, 2]
    assert "multiple of the 2 processes" in launch.errors[0] and not runs.steps(tmp_path / "out")
