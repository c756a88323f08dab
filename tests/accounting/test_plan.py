"""What `qies plan` says: sums, days, batches, and a command that the training verb takes."""

import json
import re
import shlex
from inspect import signature
from pathlib import Path

import pytest

from qies import presets
from qies.accounting.plan import Cluster, plan_model
from qies.cli import VERBS
from qies.config import RunConfig, from_dict, merge
from qies.terminal import run


def call(*argv: str) -> int:
    return run(VERBS, list(argv), "")


def planned(capsys, *argv: str) -> dict:
    assert call("plan", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


BIG = ("--size", "10b", "--gpus", "64", "--vocab-size", "50304", "--seq-len", "4096", "--activation-checkpointing")


def test_days_are_flops_over_what_the_gpus_reach(capsys):
    plan = planned(capsys, *BIG, "--gpu-flops", "5e14", "--utilisation", "0.5")
    each = plan["flops"] / 64 + plan["batch"]["steps"] * plan["optimizer_flops_per_step"]
    assert plan["days"] == pytest.approx(each / (5e14 * 0.5) / 86400, rel=1e-12)
    assert plan["flops"] == plan["flops_per_token"] * plan["tokens"]
    n = plan["params"]["non_embedding"] + plan["params"]["head"]
    assert 6 * n * plan["tokens"] < plan["flops"] < 1.2 * 6 * n * plan["tokens"]  # 6 N D, and the sequence mixing


def test_memory_adds_up_and_more_gpus_divide_the_states(capsys):
    small, large = (planned(capsys, *BIG[:2], "--gpus", g, *BIG[4:]) for g in ("8", "64"))
    for plan in (small, large):
        assert plan["memory_total"] == pytest.approx(sum(plan["memory"].values()))
    for name in ("weights", "gradients", "optimizer"):
        assert small["memory"][name] == pytest.approx(8 * large["memory"][name])
    for name in ("gathered", "activations"):
        assert small["memory"][name] == large["memory"][name]


def test_it_fits_up_to_nine_tenths_of_the_memory(capsys):
    total = planned(capsys, *BIG)["memory_total"]
    assert planned(capsys, *BIG, "--gpu-memory", str(total / 0.9e9 + 1e-6))["fits"] is True
    assert planned(capsys, *BIG, "--gpu-memory", str(total / 0.9e9 - 1e-6))["fits"] is False


def test_activations_grow_with_the_micro_batch_and_shrink_by_checkpointing(capsys):
    one, four = (planned(capsys, *BIG, "--micro-batch", n)["memory"]["activations"] for n in ("1", "4"))
    assert four == 4 * one
    assert planned(capsys, *BIG[:-1])["memory"]["activations"] > 5 * one


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(("size", "gpus"), [("100m", 8), ("1b", 64), ("10b", 64), ("10b", 512)])
def test_the_batch_is_the_rules_in_whole_micro_batches(size, gpus, micro):
    plan = plan_model(
        presets.settings("qies", size, 50304), "qies", size, None, 4096, cluster=Cluster(gpus), micro_batch=micro
    )
    batch, wanted = plan["batch"], plan["hyperparameters"]["batch_tokens"]
    assert batch["sequences"] == batch["accumulation"] * gpus * micro
    assert batch["accumulation"] == 1 or abs(batch["sequences"] * 4096 - wanted) <= gpus * micro * 4096 / 2
    assert batch["steps"] == plan["tokens"] // (batch["sequences"] * 4096)


@pytest.mark.parametrize("gpus", ["1", "4", "64"])
def test_the_command_is_one_that_train_takes(gpus, capsys):
    options = ["--activation-checkpointing"] if gpus == "64" else ["--micro-batch", "2"]
    plan = planned(capsys, "--size", "1b", "--gpus", gpus, "--seq-len", "4096", *options, "conv_size=0", "gate=none")
    launcher, module, verb, *words = _split(plan["command"])
    assert (module, verb) == ("qies", "train")
    assert f"--nproc-per-node={min(8, int(gpus))}" in launcher
    assert ("--nnodes=8" in launcher) == (gpus == "64") and ("--standalone" in launcher) == (gpus != "64")
    options = dict(zip(words[::2], words[1::2], strict=False))
    named = {name: options[f"--{name}"] for name in ("arm", "size", "tokens")}
    keys = [w for w in words if "=" in w]
    config = from_dict(RunConfig, merge({}, [*(f"{k}={v}" for k, v in named.items()), *keys]))
    assert config.model == {"conv_size": 0, "gate": "none"}
    assert config.train.batch_size == plan["batch"]["sequences"] and config.train.seq_len == 4096
    assert config.train.accumulate == plan["batch"]["accumulation"] and config.train.precision == "bf16"
    assert config.train.recompute is plan["activation_checkpointing"] is (gpus == "64")
    each = config.train.batch_size // int(gpus) // config.train.accumulate
    assert each == (1 if gpus == "64" else 2)  # sequences of a micro-batch on each process
    assert config.steps == plan["batch"]["steps"]
    assert config.train.weight_decay == pytest.approx(plan["hyperparameters"]["weight_decay"], rel=1e-5)
    assert {w.removeprefix("--") for w in words if w.startswith("--")} <= set(signature(VERBS["train"]).parameters)


def _split(command: str) -> list:
    words = shlex.split(command)
    assert words[0] == "torchrun"
    at = words.index("-m")
    return [words[1:at], *words[at + 1 :]]


def test_the_table_says_what_the_json_says(capsys):
    plan = planned(capsys, *BIG)
    assert call("plan", *BIG) == 0
    text = capsys.readouterr().out
    assert plan["command"] in text
    assert f"{plan['memory_total'] / 1e9:,.2f} GB; fits" in text and f"{plan['days']:.3g} at" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--gpus", "12"], "whole number of nodes of 8"),
        (["--gpus-per-node", "0"], "--gpus-per-node must be at least 1"),
        (["--gpu-memory", "0"], "--gpu-memory must be a positive number"),
        (["--gpu-flops", "nan"], "--gpu-flops must be a positive number"),
        (["--utilisation", "1.5"], "(0, 1]"),
        (["--utilisation", "nan"], "(0, 1]"),
        (["--micro-batch", "0"], "--micro-batch must be at least 1"),
        (["--arm", "gpt2", "--seq-len", "2048"], "add max_position_embeddings=2048"),
        (["--tokens", "100"], "less than one step"),
        (["--tokens", "100000", "--gpus", "64", "--seq-len", "4096"], "lower --seq-len"),
    ],
)
def test_bad_options_are_one_line(argv, words, capsys):
    assert call("plan", *argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_the_table_in_the_readme_is_what_the_command_says(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (100m|1b|10b) \|(.*)\|$", text, re.MULTILINE)
    assert [size for size, _ in rows] == ["100m", "1b", "10b"]
    options = re.search(r"`qies plan --size SIZE (.*)`", text)[1].split()
    for size, cells in rows:
        assert call("plan", "--size", size, *options) == 0
        plan = json.loads(capsys.readouterr().out)
        memory, batch = plan["memory"], plan["batch"]["sequences"] * 4096
        states = memory["weights"] + memory["gradients"] + memory["optimizer"]
        assert [c.strip() for c in cells.split("|")] == [
            f"{plan['params']['total'] / 1e9:.2f}", f"{plan['tokens'] / 1e9:g}", f"{batch / 1e6:.2f}",
            f"{plan['flops']:.2e}", f"{states / 1e9:.2f}", f"{memory['gathered'] / 1e9:.2f}",
            f"{memory['activations'] / 1e9:.2f}", f"{plan['memory_total'] / 1e9:.2f}", f"{plan['days']:.3g}",
        ]  # fmt: skip
