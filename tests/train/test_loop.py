"""The training loop: it learns, resumes exactly, and never applies what is not finite."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from faults.steps import spoiled
from qies import records
from qies.config import RunConfig, TrainConfig, content_hash, save
from qies.errors import Stopped, UserError
from qies.train import loop
from qies.train.optim import Optimizers, parameter_groups


@pytest.fixture
def config(data_config, tiny):
    return RunConfig(arm="qies", size="50k", tokens=32 * 4 * 10, data=data_config, train=tiny)


def rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in records.steps(folder)]


def weights(folder):
    import safetensors.torch

    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_config, tiny, shards):
    config = RunConfig(arm="qies", size="50k", tokens=32 * 4 * 10, data=data_config, train=tiny)
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, loop.train(config, shards, folder)


@pytest.mark.parametrize("arm", ["transformer", "qies", "no_phase", "complex", "gpt2"])
def test_loss_falls_on_every_arm(arm, data_config, tiny, shards, tmp_path):
    config = RunConfig(arm=arm, size="50k", tokens=32 * 4 * 40, data=data_config, train=tiny)
    record = loop.train(config, shards, tmp_path)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert record.status == "done"
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5
    assert record.metrics["val_loss"] < losses[0] - 1.5


def test_what_is_compiled_on_first_use_is_not_the_runs_time(config, shards, tmp_path, monkeypatch, undisturbed):
    first = []
    forward = loop.QiesForCausalLM.forward

    def slow(self, *args, **kwargs):
        if not first:
            first.append(time.sleep(2))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(loop.QiesForCausalLM, "forward", slow)
    start = time.monotonic()
    record = loop.train(config, shards, tmp_path)
    assert record.wall_seconds < time.monotonic() - start - 2
    assert rows(tmp_path) == rows(undisturbed[0])


def test_record_says_what_the_contract_asks(undisturbed, config, shards):
    folder, record = undisturbed
    assert records.read(folder) == record
    for key in (
        "schema", "config", "config_hash", "code_version", "environment", "arm", "size", "params", "tokens",
        "flops_per_token", "flops", "flops_convention", "seed", "status", "metrics", "wall_seconds",
        "tokens_per_second", "peak_memory_bytes",
    ):  # fmt: skip
        assert record.to_dict()[key] is not None, key
    assert record.config_hash == content_hash(config)
    assert record.data["hash"] == shards.hash
    assert record.flops == record.flops_per_token * record.tokens
    built = loop.build_model(config, shards.manifest.vocab_size)
    assert record.params["total"] == sum(p.numel() for p in built.parameters())
    assert record.metrics["val_bpb"] == pytest.approx(
        record.metrics["val_loss"] * record.metrics["val_tokens"]
        / (record.metrics["val_bytes"] * 0.6931471805599453)
    )  # fmt: skip


def test_a_finished_run_is_returned_as_it_is(undisturbed, config, shards):
    folder, record = undisturbed
    before = (folder / "run.json").stat().st_mtime_ns
    assert loop.train(config, shards, folder) == record
    assert (folder / "run.json").stat().st_mtime_ns == before


def test_a_run_killed_once_it_is_done_leaves_no_checkpoint(config, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "remove", lambda *_: None)  # the kill comes before it
        loop.train(config, shards, tmp_path)
    assert list((tmp_path / "checkpoints").iterdir())
    loop.train(config, shards, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [0, 3, 4, 8])
def test_a_run_cut_off_anywhere_ends_bit_for_bit_as_the_undisturbed_one(step, undisturbed, config, shards, tmp_path):
    class Cut(Exception):
        pass

    def cut(row):
        if row["step"] == step:
            raise Cut

    with pytest.raises(Cut):
        loop.train(config, shards, tmp_path, progress=cut)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 9')  # a line that the kill cut short
    record = loop.train(config, shards, tmp_path)
    folder, expected = undisturbed
    assert rows(tmp_path) == rows(folder)
    assert record.metrics == expected.metrics
    a, b = weights(tmp_path), weights(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_and_terminated_processes_resume(undisturbed, config, shard_folder, shards, tmp_path):
    """SIGTERM saves and exits with 143; SIGKILL cannot be caught; afterwards the result is the undisturbed one."""
    run = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(shard_folder)))
    save(run, tmp_path / "run.yaml")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qies", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(out)]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        done = len(records.steps(out))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 120
        while len(records.steps(out)) <= done and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate()
        if records.read(out).status != "done":  # it may have been faster than the signal
            assert process.returncode == code
    record = loop.train(run, shards, out)
    folder, expected = undisturbed
    assert rows(out) == rows(folder)
    assert record.metrics == expected.metrics


def test_another_run_or_other_data_is_refused_with_the_difference(undisturbed, config, shards):
    folder, _ = undisturbed
    with pytest.raises(UserError, match="save_every: 4 -> 5"):  # of a finished run nothing can change
        loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=5)), shards, folder)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        loop.train(dataclasses.replace(config, seed=1), shards, folder)
    record = records.read(folder)
    other = dataclasses.replace(record, data=record.data | {"hash": "0" * 64})
    records.write(folder, other)
    with pytest.raises(UserError, match="other data"):
        loop.train(config, shards, folder)
    records.write(folder, record)


@pytest.mark.parametrize(("what", "which"), [("nan", "loss"), ("infinity", "loss"), ("gradient", "gradient")])
def test_a_step_that_is_not_finite_is_reported_and_never_applied(what, which, config, shards, tmp_path):
    with spoiled(what, {2, 5}) as moved:
        record = loop.train(config, shards, tmp_path)
    assert moved == {2: 0, 5: 0}
    assert record.status == "done" and record.skipped_steps == 2
    bad = [row for row in rows(tmp_path) if "skipped" in row]
    assert [row["step"] for row in bad] == [2, 5]
    assert {row["skipped"] for row in bad} == {f"non-finite {which}"} and bad[0]["loss"] is None


def test_spoiling_sees_what_a_step_moves(config, shards, tmp_path):
    with spoiled("spike", {2}) as moved:  # too early in the run to be told from learning, so it is applied
        record = loop.train(config, shards, tmp_path)
    assert moved[2] > 0 and record.spikes == 0


def test_a_run_with_too_many_bad_steps_diverges(config, shards, tmp_path):
    limited = dataclasses.replace(config, train=dataclasses.replace(config.train, max_skipped=3))
    with spoiled("nan", set(range(10))):
        record = loop.train(limited, shards, tmp_path)
    assert record.status == "diverged" and "non-finite" in record.error
    assert len(records.steps(tmp_path)) == 4


def test_a_run_in_which_no_step_is_finite_diverges(config, shards, tmp_path):
    with spoiled("nan", set(range(10))):
        record = loop.train(config, shards, tmp_path)
    assert record.status == "diverged" and "no step" in record.error


def test_a_run_that_failed_once_keeps_no_trace_of_it(config, shards, tmp_path):
    planned = records.plan(config, shards.manifest.vocab_size)
    records.write(tmp_path, dataclasses.replace(planned, status="failed", error="killed"))
    (tmp_path / "error.log").write_text("killed")
    record = loop.train(config, shards, tmp_path)
    assert record.status == "done" and record.error is None and not (tmp_path / "error.log").exists()


def test_parameter_groups_cover_every_parameter_once(config, shards):
    model = loop.build_model(config, shards.manifest.vocab_size)
    groups = parameter_groups(model)
    names = [n for group in groups.values() for n, _ in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert all(p.ndim == 2 for _, p in groups["matrix"])
    assert {n.split(".")[-2] for n, _ in groups["matrix"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_optimizer_state_survives_a_round_trip(config, shards):
    from qies.presets import Hyperparameters

    def make():
        model = loop.build_model(config, shards.manifest.vocab_size)
        return model, Optimizers(model, Hyperparameters(0.02, 0.1, 0.01, 0.01), 0.01)

    def step(model, optimizers, seed):
        ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(seed))
        model.train()(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
        optimizers.step(0.5)

    model, optimizers = make()
    step(model, optimizers, 0)
    twin, restored = make()
    twin.load_state_dict(model.state_dict())
    restored.load_state({k: v.clone() for k, v in optimizers.state().items()})
    for pair in ((model, optimizers), (twin, restored)):
        step(*pair, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_locked_folder_is_not_trained_twice(tmp_path):
    with records.lock(tmp_path):
        code = f"import pathlib\nfrom qies.records import lock\nwith lock(pathlib.Path({str(tmp_path)!r}), 0.1): pass"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 1 and "in use by another process" in result.stderr


def test_training_settings_are_checked():
    with pytest.raises(UserError):
        TrainConfig(seq_len=0)


def test_micro_batches_add_up_to_the_batch(undisturbed, config, shards, tmp_path):
    train = dataclasses.replace(config.train, muon_precision="fp32")
    losses = []
    for accumulate in (1, 4):
        parts = dataclasses.replace(train, accumulate=accumulate)
        loop.train(dataclasses.replace(config, train=parts), shards, tmp_path / str(accumulate))
        losses.append([row["loss"] for row in records.steps(tmp_path / str(accumulate))])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_recomputed_activations_change_nothing(undisturbed, config, shards, tmp_path):
    recompute = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=True))
    loop.train(recompute, shards, tmp_path)
    assert [r["loss"] for r in rows(tmp_path)] == pytest.approx([r["loss"] for r in rows(undisturbed[0])], abs=1e-5)


def test_a_spike_is_never_applied_and_counted_across_a_resume(config, shards, tmp_path):
    longer = dataclasses.replace(config, tokens=32 * 4 * 40)

    class Cut(Exception):
        pass

    def cut(row):
        if row["step"] == 34:
            raise Cut

    with spoiled("spike", {30}) as moved, pytest.raises(Cut):
        loop.train(longer, shards, tmp_path, progress=cut)
    record = loop.train(longer, shards, tmp_path)
    assert moved == {30: 0} and record.spikes == 1 and record.skipped_steps == 0
    [row] = [row for row in rows(tmp_path) if "spike" in row]
    assert row["step"] == 30 and row["skipped"] == "spike" and row["loss"] > 5


@pytest.mark.parametrize("kept", [0, 6])
def test_rows_that_were_lost_are_taken_again(kept, undisturbed, config, shards, tmp_path, caplog):
    """Rows are not flushed to disk as checkpoints are; a machine that loses power may lose some."""

    class Cut(Exception):
        pass

    def cut(row):
        if row["step"] == 9:
            raise Cut

    with pytest.raises(Cut):
        loop.train(config, shards, tmp_path, progress=cut)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:kept]))
    loop.train(config, shards, tmp_path)
    assert rows(tmp_path) == rows(undisturbed[0]) and f"has {kept} steps" in caplog.text


def test_a_full_disk_anywhere_in_a_run_is_one_line(config, shards, tmp_path, monkeypatch):
    def full(folder, row):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="its checkpoints are intact") as caught:
        patch.setattr(records, "append", full)
        loop.train(config, shards, tmp_path)
    assert caught.value.code == 1 and "\n" not in str(caught.value)
    assert loop.train(config, shards, tmp_path).status == "done"


def test_a_run_stops_without_its_parent_only_if_it_has_one_to_wait_for(undisturbed, config, shards, tmp_path):
    with pytest.raises(loop.Interrupted) as stopped:
        loop.train(config, shards, tmp_path / "run", parent=-1)
    assert stopped.value.code == 143 and len(rows(tmp_path / "run")) == 1
    loop.train(config, shards, tmp_path / "run")  # of whichever parent
    assert [r["loss"] for r in rows(tmp_path / "run")] == [r["loss"] for r in rows(undisturbed[0])]
