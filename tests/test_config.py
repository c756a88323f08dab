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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed"], "not of the form"),
        (["=3"], "not of the form"),
        (["seed.x=1"], "goes below 'seed'"),
        (["seed=[1"], "not valid YAML"),
        (["model={a: 1, a: 2}"], "not valid YAML"),
        (["seed="], "has no value; write seed=VALUE"),
        (["train.seq_len=8", "train.seq_len=16"], "'train.seq_len=8' and the override 'train.seq_len=16' set the same"),
        (["train.seq_len=8", "train={}"], "set the same key"),
        (["train={}", "train.seq_len=8"], "set the same key"),
        (["arm=qies"], "--arm and the override 'arm=qies' set the same key"),
        (["data.source=x"], "--data and the override 'data.source=x' set the same key"),
    ],
)
def test_bad_override(overrides, words):
    with pytest.raises(UserError, match=words):
        merge({"seed": 1}, overrides, {"arm": "qies", "data.source": "builtin"})


@pytest.mark.parametrize(
    ("item", "value"),
    [("seed=010", 10), ("tokens=1e6", 10**6), ("tokens=1m", 10**6), ("tokens=1.5M", 1_500_000),
     ("tokens=1_000_000", 10**6), ("tokens=2e3k", 2 * 10**6), ("train.eval_tokens=8k", 8000),
     ("train.lr_scale=1e-5", 1e-5), ("train.branches=[500k, 6e5]", (500_000, 600_000))],
)  # fmt: skip
def test_numbers_are_what_they_say(item, value):
    run = from_dict(RunConfig, merge({"train": {"warmup_tokens": "8k"}}, [item]))
    found = run
    for key in item.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == value and run.train.warmup_tokens == 8000


@pytest.mark.parametrize(
    ("item", "words"),
    [("tokens=21:20", "tokens is '21:20'; write a whole number"), ("tokens=1.5", "must be of type int, not 1.5"),
     ("tokens=0.0001k", "tokens is '0.0001k'"), ("tokens=1g", "such as 1m"), ("tokens=-1m", "such as 1m"),
     ("seed=1m", "seed must be of type int"), ("seed=1:30", "seed must be of type int"),
     ("arm=010", "arm must be of type str, not 10. Write '10' in quotes"), ("train.lr_scale=1e999", "finite"),
     ("train.recompute=yes", "must be of type bool"), ('data.source=""', "data.source is empty"),
     ("data.source=null", "data.source must be of type str, not None")],
)  # fmt: skip
def test_what_is_no_number_or_no_path_is_refused(item, words):
    with pytest.raises(UserError, match=words):
        from_dict(RunConfig, merge({}, [item]))


def test_a_size_has_one_spelling():
    runs = [from_dict(RunConfig, {"size": size}) for size in ("50k", "50K", "0.05m", "0050.0k")]
    assert {run.size for run in runs} == {"50k"} and len({content_hash(run) for run in runs}) == 1
    with pytest.raises(UserError, match=r"sizes is \['50k', '50k'\]; it must be a list without repeats"):
        from_dict(StudyConfig, {"sizes": ["50k", "0.05m"]})


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}", "---\n"])
def test_an_empty_file_is_no_configuration(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c.yaml is empty; write at least one key"):
        load(RunConfig, tmp_path / "c.yaml")


def test_a_repeated_key_of_a_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {seq_len: 8}\nseed: 1\ntrain: {seq_len: 16}\n")
    with pytest.raises(UserError, match=r"c.yaml is not valid YAML: the key 'train' in line 3 is a repeat"):
        load(RunConfig, tmp_path / "c.yaml")


def test_files_and_overrides_are_told_by_their_form_and_by_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    (tmp_path / "lr=3" / "s.yaml").touch()
    words = ["lr=3/s.yaml", "lr=3/absent.yaml", "./a=b.yaml", "s.yaml", "train.lr_scale=3", "seeds=[1,2]"]
    assert config.split(words) == (["lr=3/s.yaml", "./a=b.yaml", "s.yaml"],
                                   ["lr=3/absent.yaml", "train.lr_scale=3", "seeds=[1,2]"])  # fmt: skip


def test_a_record_names_text_of_known_hash_without_its_folder():
    def named(source: str, known: str = "x") -> str:
        return config.recorded(RunConfig(data=DataConfig(source, hash=known)))["data"]["source"]

    assert named("/home/me/texts") == named("/texts/") == "texts"
    assert named("hub:/home/me/c4:en") == "hub:c4:en" and named("hub:/home/me/c4") == "hub:c4"
    assert named("/home/me/*.txt") == "*.txt"
    assert named("hub:allenai/c4:en", "") == "hub:allenai/c4:en" and named("builtin", "") == "builtin"


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
