"""Runs with terms in their objective: rows, records, resuming, refusals; and the long-short difference."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from qies import cli, records
from qies.accounting.flops import forward_flops_per_token, training_flops_per_token
from qies.accounting.objective import objective_flops
from qies.config import ObjectiveConfig, RunConfig, StudyConfig, content_hash, from_dict, override, save, to_dict
from qies.data.batches import val_batches
from qies.errors import UserError
from qies.terminal import run as run_verb
from qies.train import loop
from qies.train.run_directory import branch
from qies.train.validation import long_short_difference

CHOSEN = ObjectiveConfig(
    far_future=0.2, far_future_gap=2, far_future_window=8, far_future_stride=4,
    entropy_floor=0.1, entropy_floor_chunk=16, long_context=0.3, long_context_window=8, multi_token=0.1,
)  # fmt: skip


@pytest.fixture
def config(data_config, tiny):
    return RunConfig(arm="qies", size="50k", tokens=32 * 4 * 9, data=data_config, train=tiny, objective=CHOSEN)


def rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in records.steps(folder)]


def test_terms_are_logged_apart_and_anneal(config, shards, tmp_path):
    record = loop.train(config, shards, tmp_path)
    assert record.status == "done" and record.params["objective"] > 0
    found = rows(tmp_path)
    for step, row in enumerate(found):
        factor = max(0.0, 1 - step / 9 / (2 / 3))
        assert row.get("term_factor", 0) == pytest.approx(factor)
        assert set(row.get("terms", {})) == (set(CHOSEN.terms) if factor else set())
    assert found[-1]["loss"] < found[0]["loss"]
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["objective"] == dataclasses.asdict(CHOSEN) == record.model["objective"]


def test_a_resumed_run_is_bit_exact(config, shards, tmp_path, monkeypatch):
    loop.train(config, shards, tmp_path / "whole")
    step = loop._Run._one_step

    def stops(self):
        if self.step == 6:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop._Run, "_one_step", stops)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, shards, tmp_path / "cut")
    monkeypatch.setattr(loop._Run, "_one_step", step)
    loop.train(config, shards, tmp_path / "cut")
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    with pytest.raises(UserError, match=r"objective.far_future: 0.2 -> 0.0"):
        loop.train(override(config, {"objective.far_future": 0}), shards, tmp_path / "cut")


def test_the_default_objective_is_no_part_of_a_runs_identity(config):
    plain = dataclasses.replace(config, objective=ObjectiveConfig())
    before = to_dict(plain)
    del before["objective"]
    assert from_dict(RunConfig, before) == plain
    assert "objective" not in plain.settings(400)
    assert content_hash(plain) != content_hash(config)
    assert records.plan(plain, 400).params.keys() == records.plan(dataclasses.replace(plain, seed=1), 400).params.keys()


def test_a_study_varies_the_objective(data_config, tiny):
    variants = ({}, {"objective.far_future": 0.1}, {"objective.entropy_floor": 0.1, "objective.until": 1})
    study = StudyConfig(
        arms=("qies",),
        sizes=("50k",),
        data=data_config,
        train=dataclasses.replace(tiny, seq_len=128),
        variants=variants,
    )
    assert [run.objective.terms for run in study.runs()] == [(), ("far_future",), ("entropy_floor",)]
    everywhere = dataclasses.replace(study, variants=(), objective=ObjectiveConfig(multi_token=1.0))
    assert [run.objective.terms for run in everywhere.runs()] == [("multi_token",)]
    with pytest.raises(UserError, match=r"such as 'objective.KEY'"):
        dataclasses.replace(study, variants=({"objective": {}},))


@pytest.mark.parametrize(
    ("override_", "words"),
    [("objective.far_futur=0.1", "Did you mean 'far_future'"), ("objective.far_future=-1", "0 (off) or a positive"),
     ("objective.far_future=0.1", "the objective needs 72 tokens; lower objective.far_future_window"),
     ("objective.long_context=1", "needs 129 tokens"), ("objective.entropy_floor=high", "must be of type float")],
)  # fmt: skip
def test_a_bad_objective_is_one_line(override_, words, tmp_path, capsys):
    argv = ["train", "--out", str(tmp_path / "out"), "train.seq_len=32", override_]
    assert run_verb(cli.VERBS, argv, "") == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_nothing_branches_from_a_run_whose_weights_anneal(config, shards, tmp_path):
    warm = dataclasses.replace(config.train, warmup_tokens=128)
    with pytest.raises(UserError, match="left out where there are branches"):
        dataclasses.replace(config, train=dataclasses.replace(warm, branches=(512,)))
    trunk = dataclasses.replace(config, train=warm)
    records.write(tmp_path / "trunk", records.plan(trunk, 400))
    with pytest.raises(UserError, match="nothing can branch from it"):
        branch(dataclasses.replace(trunk, tokens=512), tmp_path / "trunk", tmp_path / "short")


@pytest.mark.parametrize("arm", ["qies", "gpt2"])
def test_flops_of_the_terms_are_those_of_their_products(arm, config):
    plain = dataclasses.replace(config, arm=arm, objective=ObjectiveConfig()).settings(400)
    d, vocab = plain["hidden_size"], 400

    def extra(**chosen):
        values = dataclasses.replace(config, arm=arm, objective=ObjectiveConfig(**chosen, until=0.5)).settings(400)
        return training_flops_per_token(values, 32) - training_flops_per_token(plain, 32)

    assert extra(multi_token=0.1, multi_token_ahead=2) == pytest.approx(0.5 * 3 * 2 * 2 * (d * d + d * vocab))
    short = sum(forward_flops_per_token(plain, 16).values())
    wanted = 0.5 * (2 * short + 3 * 2 * d * vocab)
    assert extra(long_context=0.1, long_context_window=8) == pytest.approx(wanted)
    read = d if arm == "gpt2" else 3 * (d + 4 * 2 * 4)  # three layers: memory heads as wide as d, registers of 4 x 4
    head = 5 * (read + d) + d * vocab
    stride = {"far_future_gap": 0, "far_future_window": 8, "far_future_rank": 5, "far_future_stride": 4}
    assert extra(far_future=0.1, **stride) == pytest.approx(0.5 * 3 * 2 * head / 4)
    assert objective_flops(plain, 32, 1.0) == 0


@pytest.mark.parametrize("arm", ["qies", "transformer"])
def test_the_long_short_difference_is_that_of_the_losses(arm, config, shards):
    plain = dataclasses.replace(config, arm=arm, objective=ObjectiveConfig())
    model = loop.build_model(plain, shards.manifest.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    options = {"seq_len": 32, "batch_size": 4, "precision": nullcontext}
    found = long_short_difference(model, shards, max_tokens=100, **options)
    differences = []
    model.eval()
    for batch in val_batches(shards, 32, 4, max_tokens=100):
        for row in torch.from_numpy(batch):
            for t in range(16, len(row) - 1):
                start = (t // 8 - 1) * 8
                with torch.no_grad():
                    long, short = (model(row[None, s : t + 1]).logits[0, -1].log_softmax(-1) for s in (0, start))
                differences.append((long - short)[row[t + 1]].item())
    assert found == pytest.approx(sum(differences) / len(differences), abs=5e-6) and abs(found) > 1e-4
    assert long_short_difference(model, shards, seq_len=3, batch_size=4, precision=nullcontext) is None


@pytest.mark.slow
def test_two_processes_equal_one(config, shard_folder, shards, tmp_path):
    """With terms that are means over all rows alike; and with all terms the processes run to the end together."""
    data = dataclasses.replace(config.data, source=str(shard_folder))
    alike = ObjectiveConfig(entropy_floor=0.3, entropy_floor_chunk=16, long_context=0.5, long_context_window=8)
    for name, chosen in (("alike", alike), ("all", CHOSEN)):
        train = dataclasses.replace(config.train, muon_precision="fp32")
        run = dataclasses.replace(config, data=data, objective=chosen, train=train)
        save(run, tmp_path / f"{name}.yaml")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
        command += ["qies", "train", "--config", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert records.read(tmp_path / name).status == "done"
    one = loop.train(dataclasses.replace(run, objective=alike), shards, tmp_path / "one")
    assert one.status == "done"
    for mine, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "alike"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert mine.get("terms", {}) == pytest.approx(theirs.get("terms", {}), abs=2e-5)
