"""One run on two processes: the same losses, the same data order, and no rank lost in silence."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faults.kills import kill, lost_rank, move
from faults.lab import Lab, one_line
from qies import records
from qies.cli import VERBS
from qies.config import RunConfig, TrainConfig, save
from qies.data.shards import open_shards
from qies.errors import UserError
from qies.model import QiesForCausalLM
from qies.terminal import run
from qies.train.distributed import Group, check_batch, rank_and_size
from qies.train.loop import precision_context, train
from qies.train.validation import held_out_loss

TOLERANCE = 1e-5  # nats; fp32 sums in another order


def test_alone_a_group_is_the_identity():
    group = Group()
    assert group.rows(4) == slice(0, 4) and group.on_first(lambda: 3) == 3
    assert torch.equal(group.gather([1.0, 2.0]), torch.tensor([[1.0, 2.0]], dtype=torch.float64))


def test_no_rows_are_sent_to_all_processes(shards, data_config, tiny, tmp_path):
    """What `on_first` returns goes to every process: a checkpoint's notes or a number, whatever the steps were."""
    sent = []

    class Recording(Group):
        def on_first(self, work):
            sent.append(work())
            return sent[-1]

    config = RunConfig("qies", "50k", 32 * 4 * 6, data=data_config, train=tiny)
    record = train(config, shards, tmp_path, group=Recording())
    losses = [row["loss"] for row in records.steps(tmp_path)]
    assert record.status == "done" and record.metrics["train_loss"] == sum(losses) / 6
    assert record.metrics["train_loss"] in sent and not any(isinstance(value, list) for value in sent)


def test_the_slices_of_all_ranks_are_the_batch():
    assert [list(range(6))[Group(r, 3).rows(6)] for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="multiple of 4 processes x 1 micro-batches"):
        check_batch(TrainConfig(batch_size=6), 4)
    check_batch(TrainConfig(batch_size=8, accumulate=2), 4)
    with pytest.raises(UserError, match="multiple of 4 processes x 4 micro-batches"):
        check_batch(TrainConfig(batch_size=8, accumulate=4), 4)


def test_a_batch_that_does_not_divide_leaves_nothing_behind(config, shards, tmp_path):
    odd = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=3))
    with pytest.raises(UserError, match="multiple of 2 processes"):
        train(odd, shards, tmp_path / "run", group=Group(0, 2))
    assert not (tmp_path / "run").exists()


GROUP = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be an integer of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2", "RANK": "1"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "1", "RANK": "x"}, "RANK is 'x'; it must be an integer from 0 to 0"),
        (GROUP | {"RANK": "2"}, "RANK is '2'; it must be an integer from 0 to 1"),
        ({k: v for k, v in GROUP.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
        ({k: v for k, v in GROUP.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
        (GROUP | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; it must be an integer from 0 to 65535"),
        (GROUP, "train.batch_size is 3; it must be a multiple of 2 processes"),
    ],
)
def test_an_environment_that_is_no_group_is_one_line(variables, words, shard_folder, tmp_path, capsys, monkeypatch):
    for name in (*GROUP, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    argv = ["train", "--size", "50k", "--tokens", "8192", "--data", str(shard_folder), "train.batch_size=3"]
    assert run(VERBS, [*argv, "--out", str(out)], "") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and words in captured.err and not captured.out
    assert not out.exists()


def test_a_lone_process_and_those_of_torchrun_know_their_place(monkeypatch):
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    assert rank_and_size() == (0, 1)
    for name, value in (GROUP | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert rank_and_size() == (1, 2)


@pytest.fixture(scope="module")
def lab(shard_folder, data_config, tmp_path_factory):
    data = dataclasses.replace(data_config, source=str(shard_folder))
    return Lab(tmp_path_factory.mktemp("lab"), data, steps=60)


@pytest.fixture
def config(lab):
    return lab.config


@pytest.fixture
def one(lab):
    return lab.undisturbed(1)


@pytest.fixture
def two(lab):
    return lab.undisturbed(2)


def same_within(a, b, tolerance, first=None):
    left, right = records.steps(a), records.steps(b)
    assert [r["step"] for r in left] == [r["step"] for r in right] == list(range(60))
    return max(abs(x["loss"] - y["loss"]) for x, y in list(zip(left, right, strict=True))[:first]) < tolerance


def final(folder):
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_equal_one(one, two, config):
    """Twenty losses agree; later rounding grows. The loss that two processes measure is the one of their model."""
    assert same_within(one, two, TOLERANCE, 20)
    a, b = records.read(one), records.read(two)
    assert (a.processes, b.processes) == (1, 2)
    alone = held_out_loss(
        QiesForCausalLM.from_pretrained(two / "model"),
        open_shards(Path(config.data.source)),
        seq_len=config.train.seq_len,
        batch_size=config.train.batch_size,
        max_tokens=config.train.eval_tokens,
        precision=precision_context(config.train.precision, "cpu"),
    )
    assert alone["val_loss"] == pytest.approx(b.metrics["val_loss"], abs=1e-6)
    assert b.metrics["val_loss"] == pytest.approx(a.metrics["val_loss"], abs=5e-3)
    assert a.metrics["val_tokens"] == b.metrics["val_tokens"]
    assert a.metrics["val_bytes"] == b.metrics["val_bytes"]
    assert {k: v.shape for k, v in final(one).items()} == {k: v.shape for k, v in final(two).items()}


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["qies", "gpt2"])
def test_torchrun_with_micro_batches_and_recomputation_equals_one(arm, config, tmp_path):
    short = dataclasses.replace(config, arm=arm, tokens=32 * 4 * 20)
    train(short, open_shards(Path(config.data.source)), tmp_path / "one")
    micro = dataclasses.replace(short, train=dataclasses.replace(config.train, accumulate=2, recompute=True))
    save(micro, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["qies", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    left, right = records.steps(tmp_path / "one"), records.steps(tmp_path / "two")
    assert len(left) == len(right) == 20
    assert max(abs(x["loss"] - y["loss"]) for x, y in zip(left, right, strict=True)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_named_in_time(lost, torchrun, lab):
    outcome = lost_rank(lab, random.Random(lost), lost, torchrun)
    assert not outcome.wrong, outcome


@pytest.mark.slow
def test_two_processes_that_are_killed_resume_bit_for_bit(lab):
    outcome = kill(lab, random.Random(0), size=2)
    assert not outcome.wrong, outcome


@pytest.mark.slow
def test_a_run_moves_from_two_processes_to_one_and_back(lab):
    """A signal to one rank alone stops both, at the same step, with everything saved."""
    outcome = move(lab, random.Random(0))
    assert not outcome.wrong, outcome


@pytest.mark.slow
def test_bad_input_ends_all_ranks_before_training_and_the_first_says_why(lab):
    launch = lab.train(lab.folder(), "train.batch_size=5", size=2)
    assert launch.codes() == [2, 2]
    assert one_line(launch.errors[0]) and "multiple of 2 processes" in launch.errors[0] and not launch.errors[1]


@pytest.mark.slow
def test_below_torchrun_bad_input_is_one_line_of_ours(lab, tmp_path):
    """torchrun adds its own report, with exit code 2 of each rank in it, and ends with 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["qies", "train", "--out", str(tmp_path / "out"), "--arm", "qeis"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    ours = [line for line in done.stderr.splitlines() if line.startswith("qies: ")]
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr
    assert len(ours) == 1 and "qeis" in ours[0] and not (tmp_path / "out").exists()
