"""What a run's folder must be before training goes on in it; branches from one trunk."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from qies import presets, records, storage
from qies.config import RunConfig, content_hash, from_dict
from qies.errors import UserError
from qies.train import loop, run_directory

STEP = 32 * 4


@pytest.fixture
def config(data_config, tiny):
    return RunConfig(arm="qies", size="50k", tokens=STEP * 10, data=data_config, train=tiny)


def changed(config, **values):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


class Cut(Exception):
    pass


def cut_after(step):
    def progress(row):
        if row["step"] == step:
            raise Cut

    return progress


@pytest.fixture
def unfinished(config, shards, tmp_path):
    with pytest.raises(Cut):
        loop.train(config, shards, tmp_path / "run", progress=cut_after(6))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"size": "60k"}, "size: 50k -> 60k"),
        ({"arm": "no_phase"}, "arm: qies -> no_phase"),
        ({"model": {"conv_size": 0}}, "model.conv_size: absent -> 0"),
    ],
)
def test_another_shape_text_or_seed_is_refused_with_the_difference(change, words, config, shards, unfinished):
    with pytest.raises(UserError, match=words):
        loop.train(dataclasses.replace(config, **change), shards, unfinished)
    with pytest.raises(UserError, match=r"train.seq_len: 32 -> 16"):
        loop.train(changed(config, seq_len=16), shards, unfinished)


def test_another_text_is_refused(config, shards, unfinished):
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=5))
    with pytest.raises(UserError, match=r"data.seed: 0 -> 5"):
        loop.train(other, shards, unfinished)


def test_any_other_change_is_shown_and_logged(config, shards, unfinished, caplog):
    new = changed(config, save_every=3, keep=1, eval_tokens=256)
    record = loop.train(new, shards, unfinished)
    assert record.status == "done" and record.config_hash == content_hash(new)
    changes = ["train.eval_tokens: 512 -> 256", "train.keep: 2 -> 1", "train.save_every: 4 -> 3"]
    assert record.config_changes == [{"step": 4, "changes": changes}]
    assert "train.save_every: 4 -> 3" in caplog.text


@pytest.mark.parametrize("status", ["planned", "running", "done"])
@pytest.mark.parametrize(
    ("part", "field", "then", "words"),
    [
        ("model", "rope_theta", 1e4, r"model.rope_theta: 10000.0 -> 1000000.0"),
        ("model", "attention_conv", None, r"model.attention_conv: input -> keys"),
        ("model", "register_heads", None, r"model.register_heads: 0 -> 4"),
        ("model", "value_residual", True, r"model.value_residual: True -> absent"),
        ("params", "non_embedding", 49_000, r"params.non_embedding: 49000 -> "),
        ("learning_rates", "matrix", 0.02, r"learning_rates.matrix: 0.02 -> 0.04"),
    ],
)
def test_a_run_from_before_its_arm_was_defined_anew_is_refused(part, field, then, words, status, config, tmp_path):
    record = dataclasses.replace(records.plan(config, 400), status=status)
    values = {k: v for k, v in getattr(record, part).items() if k != field} | ({} if then is None else {field: then})
    records.write(tmp_path, dataclasses.replace(record, **{part: values}))
    with pytest.raises(UserError, match=f"definition of its arm changed .*{words}.*give another --out"):
        run_directory.claim(config, tmp_path)


def test_records_of_the_same_model_in_earlier_words_go_on(config, tmp_path):
    record = records.plan(config, 400)
    earlier = {k: v for k, v in record.model.items() if k not in ("nope_interval", "rope_fraction", "register_mode")}
    earlier |= {"value_residual": False, "conv": "input"}
    record = dataclasses.replace(record, model=earlier, learning_rates=None)  # not recorded at first
    records.write(tmp_path, record)
    assert run_directory.claim(config, tmp_path) == record


def test_committed_records_are_of_models_that_can_be_told(tmp_path):
    """The runs of the quick study are those that its file stands for today."""
    root = Path(__file__).parents[2] / "results" / "reference" / "small" / "runs"
    for record in records.query(root):
        found = from_dict(RunConfig, record.config)
        assert content_hash(found) == record.config_hash
        records.require_same_definitions(found, record, root / record.config_hash)


def test_no_record_of_a_run_holds_a_path(config, shards, text_folder, tmp_path):
    """The text is known by its hash, in the record and in the checkpoints."""
    known = dataclasses.replace(config, data=dataclasses.replace(config.data, hash="1" * 64))
    assert known.data.source == str(text_folder)
    with pytest.raises(Cut):
        loop.train(known, shards, tmp_path / "run", progress=cut_after(6))
    texts = [p.read_text() for p in (tmp_path / "run").rglob("*.json*")]
    assert len(texts) > 3 and not any(str(text_folder.parent) in text for text in texts)
    record = records.read(tmp_path / "run")
    assert record.config["data"]["source"] == text_folder.name and record.config_hash == content_hash(known)
    assert loop.train(known, shards, tmp_path / "run").status == "done"


def test_later_fields_leave_the_hash_of_earlier_configurations(config):
    assert content_hash(RunConfig()) == "f83df5cbe46531eb"  # as before train.keep and the fields after it
    assert content_hash(changed(config, keep=3)) != content_hash(config)


def test_a_folder_that_anyone_may_write_is_refused(config, shards, unfinished):
    for path in (unfinished, unfinished / "checkpoints"):
        before = path.stat().st_mode
        path.chmod(0o777)
        with pytest.raises(UserError, match="can be written by anyone"):
            loop.train(config, shards, unfinished)
        path.chmod(before)


def test_no_room_is_said_before_training(config, shards, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(run_directory.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 0\.1 MB free"):
        loop.train(config, shards, tmp_path / "run")
    assert records.read(tmp_path / "run") is None


@pytest.fixture(scope="module")
def trunk(data_config, tiny, shards, tmp_path_factory):
    train = dataclasses.replace(tiny, warmup_tokens=3 * STEP, branches=(STEP * 10, STEP * 15))
    config = RunConfig(arm="qies", size="50k", tokens=STEP * 20, data=data_config, train=train)
    out = tmp_path_factory.mktemp("trunk") / "run"
    loop.train(config, shards, out)
    return config, out


@pytest.mark.parametrize(("steps", "start"), [(10, 6), (15, 9)])
def test_a_branch_equals_the_straight_run_bit_for_bit(steps, start, trunk, shards, tmp_path):
    import safetensors.torch

    config, out = trunk
    short = dataclasses.replace(changed(config, branches=()), tokens=STEP * steps)
    straight = loop.train(short, shards, tmp_path / "straight")
    run_directory.branch(short, out, tmp_path / "branch")
    taken = []
    record = loop.train(short, shards, tmp_path / "branch", progress=lambda row: taken.append(row["step"]))
    assert taken == list(range(start, steps))  # the trunk's steps are not taken again
    assert record.branch == {"from": content_hash(config), "step": start}
    assert record.metrics == straight.metrics
    both = [[{**row, "seconds": 0} for row in records.steps(tmp_path / n)] for n in ("straight", "branch")]
    assert both[0] == both[1] and len(both[0]) == steps
    a, b = (safetensors.torch.load_file(tmp_path / n / "model/model.safetensors") for n in ("straight", "branch"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_what_cannot_branch_is_refused(trunk, config, shards, tmp_path):
    whole, out = trunk
    short = dataclasses.replace(changed(whole, branches=()), tokens=STEP * 10)
    with pytest.raises(UserError, match=r"train.lr_scale: 1.0 -> 2.0"):
        run_directory.branch(changed(short, lr_scale=2.0), out, tmp_path / "a")
    with pytest.raises(UserError, match="no checkpoint at step 3 or before"):
        run_directory.branch(dataclasses.replace(short, tokens=STEP * 5), out, tmp_path / "a")
    with pytest.raises(UserError, match="no run to branch from"):
        run_directory.branch(short, tmp_path / "nothing", tmp_path / "a")
    loop.train(config, shards, tmp_path / "plain")
    with pytest.raises(UserError, match="depend on its budget"):
        run_directory.branch(dataclasses.replace(config, tokens=STEP * 40), tmp_path / "plain", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_only_what_a_run_takes_from_the_rule_must_agree(config, tmp_path):
    """The rule's batch for 1m and 4m tokens differs, but a run has its own; its learning rates are the same."""
    whole = changed(dataclasses.replace(config, tokens=4_000_000), warmup_tokens=40_960, branches=(1_000_000,))
    rules = [presets.hyperparameters(50_000, tokens) for tokens in (1_000_000, 4_000_000)]
    assert rules[0] != rules[1]
    records.write(tmp_path / "trunk", records.plan(whole, config.data.vocab_size))
    short = dataclasses.replace(changed(whole, branches=()), tokens=1_000_000)
    with pytest.raises(UserError, match="no checkpoint at step"):  # the next thing that is asked
        run_directory.branch(short, tmp_path / "trunk", tmp_path / "a")


def test_a_branch_cut_off_while_it_starts_is_made_again(trunk, shards, tmp_path, monkeypatch):
    whole, out = trunk
    short = dataclasses.replace(changed(whole, branches=()), tokens=STEP * 10)

    def cut(*_):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(run_directory.checkpoint, "copy", cut)
        run_directory.branch(short, out, tmp_path / "branch")
    run_directory.branch(short, out, tmp_path / "branch")
    record = loop.train(short, shards, tmp_path / "branch")
    assert record.branch["step"] == 6
    assert [row["step"] for row in records.steps(tmp_path / "branch")] == list(range(10))


def test_a_budget_below_the_steps_taken_is_refused(config, shards, unfinished):
    before = records.read(unfinished)
    with pytest.raises(UserError, match=r"at step 4, beyond the 3 .*tokens: 1280 -> 384"):
        loop.train(dataclasses.replace(config, tokens=STEP * 3), shards, unfinished)
    assert records.read(unfinished) == before


@pytest.mark.parametrize("name", [".ranks/0", "model/config.json", "data/manifest.json.tmp", "run.json"])
def test_a_link_anywhere_in_the_folder_is_refused(name, config, shards, tmp_path):
    (tmp_path / "kept").write_text("kept")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match=f"{link.name} is a symbolic link"):
        run_directory.claim(config, tmp_path / "run")
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    "record", ['{"schema": 1}', '{"schema": 1, "status": "running"}', '{"schema": 1, "status": []}']
)
def test_a_record_without_its_configuration_is_one_line(record, config, tmp_path):
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(UserError, match="delete that run's folder"):
        run_directory.claim(config, tmp_path)


def test_who_branches_holds_the_folder(trunk, tmp_path, monkeypatch):
    config, out = trunk

    def copy(path, folder):
        with pytest.raises(UserError, match="in use"), records.lock(tmp_path / "branch", 0):
            pass
        raise Cut

    monkeypatch.setattr(run_directory.checkpoint, "copy", copy)
    with pytest.raises(Cut):
        run_directory.branch(
            dataclasses.replace(changed(config, branches=()), tokens=STEP * 10), out, tmp_path / "branch"
        )


def test_what_a_killed_write_left_behind_is_no_other_file(config, tmp_path):
    """A write that was killed before its rename leaves its temporary file."""
    (tmp_path / "run").mkdir()
    left = storage._temporary(tmp_path / "run" / "run.json")
    left.write_text('{"schema"')
    assert run_directory.claim(config, tmp_path / "run") is None
    (tmp_path / "run" / "other").touch()
    with pytest.raises(UserError, match=r"other files \(other\)"):
        run_directory.claim(config, tmp_path / "run")
