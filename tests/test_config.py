"""Configuration: strict, hashed, round-tripping."""

import dataclasses

import pytest

from qies import config
from qies.config import DataConfig, RunConfig, StudyConfig, TrainConfig, content_hash, from_dict, load, merge
from qies.errors import UserError


def test_yaml_round_trip_keeps_content_and_hash(tmp_path):
    study = StudyConfig(name="s", sizes=("50k", "100k"), seeds=(0, 3), train=TrainConfig(seq_len=64))
    config.save(study, tmp_path / "s.yaml")
    again = load(StudyConfig, tmp_path / "s.yaml")
    assert again == study
    assert content_hash(again) == content_hash(study)


def test_hash_changes_with_every_field():
    base = RunConfig()
    changed = [
        dataclasses.replace(base, arm="transformer"),
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, train=TrainConfig(batch_size=4)),
        dataclasses.replace(base, data=DataConfig(vocab_size=512)),
        dataclasses.replace(base, model={"conv_size": 0}),
    ]
    assert len({content_hash(c) for c in [base, *changed]}) == 6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arm": "qeis"}, "Did you mean 'qies'"),
        ({"arms": "qies"}, "Did you mean 'arm'"),
        ({"train": {"seq_length": 3}}, "Did you mean 'seq_len'"),
        ({"train": {"seq_len": "long"}}, "train.seq_len must be of type int"),
        ({"train": {"seq_len": True}}, "train.seq_len must be of type int"),
        ({"train": {"warmup": 0.9, "decay": 0.9}}, "at most 1"),
        ({"train": {"precision": "fp16"}}, "train.precision"),
        ({"train": {"lr_scale": float("nan")}}, "finite number"),
        ({"tokens": 5}, "at least one batch"),
        ({"size": "40q"}, "size"),
        ({"data": {"vocab_size": 10}}, "above 256"),
        ({"data": 3}, "must be a mapping"),
    ],
)
def test_bad_run_configuration_names_the_fault_and_the_remedy(values, words):
    with pytest.raises(UserError, match=words):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    "values", [{"arms": []}, {"arms": ["qies", "qies"]}, {"seeds": 3}, {"name": "a/b"}, {"tokens_per_parameter": -1}]
)
def test_bad_study(values):
    with pytest.raises(UserError):
        from_dict(StudyConfig, values)


def test_overrides_reach_nested_keys_and_read_values_as_yaml():
    values = merge({"train": {"seq_len": 8}}, ["train.seq_len=16", "seed=2", "train.lr_scale=1e-1", "arm=transformer"])
    run = from_dict(RunConfig, values)
    assert (run.train.seq_len, run.seed, run.train.lr_scale, run.arm) == (16, 2, 0.1, "transformer")


@pytest.mark.parametrize("item", ["seed", "=3", "seed.x=1", "seed=[1"])
def test_bad_override(item):
    with pytest.raises(UserError):
        merge({"seed": 1}, [item])


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00", "a: &x [*x]"])
def test_unreadable_file_is_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        load(StudyConfig, path)
    assert "\n" not in str(e.value)


def test_python_objects_in_yaml_are_not_built(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch " + str(tmp_path / "pwned") + "']")
    with pytest.raises(UserError):
        load(StudyConfig, path)
    assert not (tmp_path / "pwned").exists()


def test_study_grid_shares_tokens_over_arms_and_scales_them_with_size():
    study = StudyConfig(sizes=("100k", "50k"), seeds=(0, 1), tokens_per_parameter=4, train=TrainConfig(64, 8))
    runs = study.runs()
    assert len(runs) == 3 * 2 * 2
    assert [r.size for r in runs[:6]] == ["50k"] * 6
    assert {r.tokens for r in runs if r.size == "50k"} == {round(200_000 / 512) * 512}
    assert {r.tokens for r in runs if r.size == "100k"} == {round(400_000 / 512) * 512}
