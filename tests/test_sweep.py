"""A sweep: variants of the runs of a grid, and their table from records alone."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from qies import records
from qies.cli import main
from qies.config import DataConfig, RunConfig, StudyConfig, content_hash, from_dict, override
from qies.errors import UserError
from qies.ladder.grid import claim
from qies.ladder.sweep import sweep
from qies.study import run_study

VARIANTS = [{}, {"train.lr_scale": 0.5}, {"model.position": "rope", "model.rope_theta": 1e6}]


def study(**more) -> StudyConfig:
    return from_dict(StudyConfig, {"arms": ["qies"], "sizes": ["50k"], "seeds": [0, 1], "variants": VARIANTS, **more})


def test_every_run_comes_once_in_every_variant():
    configs = study().runs()
    assert len(configs) == len({content_hash(c) for c in configs}) == 6
    assert [c.train.lr_scale for c in configs] == [1.0, 0.5, 1.0] * 2
    assert configs[2].model == {"position": "rope", "rope_theta": 1e6}
    plain = from_dict(StudyConfig, {"arms": ["qies"], "sizes": ["50k"], "seeds": [0, 1]})
    assert content_hash(configs[0]) == content_hash(plain.runs()[0])


@pytest.mark.parametrize(
    ("variant", "words"),
    [({"train.lr_scal": 1.0}, "lr_scale"), ({"seed.x": 1}, "goes below 'seed'"), ({"train.lr_scale": -1}, "positive"),
     ({"arm": "qies"}, "cannot set 'arm': it is an axis"), ({"size": "100k"}, "cannot set 'size'"),
     ({"seed": 3}, "cannot set 'seed'"), ({"tokens": 10**6}, "cannot set 'tokens'"),
     ({"data.vocab_size": 512}, "cannot set 'data.vocab_size': a ladder trains on one corpus"),
     ({"train": {"lr_scale": 2.0}}, "sets 'train' as a whole"), ({"model": {}}, "sets 'model' as a whole")],
)  # fmt: skip
def test_a_bad_variant_is_one_line(variant, words):
    with pytest.raises(UserError, match=words):
        study(variants=[variant]).runs()


@pytest.mark.parametrize(
    "variants",
    [[{}, {"train.lr_scale": 1.0}], [{"train.lr_scale": 0.5}, {}, {"train.lr_scale": 0.5}],
     [{"train.lr_scale": 2}, {"train.lr_scale": 2.0}]],
)  # fmt: skip
def test_variants_that_repeat_each_other_are_refused(variants):
    with pytest.raises(UserError, match=r"are the same runs; keep one of them"):
        study(variants=variants)


def test_a_study_refuses_a_sweep(tmp_path):
    with pytest.raises(UserError, match="qies ladder sweep"):
        run_study(claim(study(), tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def write(folder, losses: dict[str, list[float]]) -> None:
    """Finished runs of learning rates, a loss for each seed."""
    for rate, values in losses.items():
        for seed, loss in enumerate(values):
            config = override(RunConfig(arm="qies", size="50k", seed=seed), {"train.lr_scale": float(rate)})
            metrics = {"val_loss": loss, "val_bpb": 2.0, "induction": 0.2, "induction_onset": None}
            record = replace(records.plan(config, 4096), status="done", metrics=metrics)
            records.write(folder / "runs" / record.config_hash, record)


def test_means_standard_errors_and_paired_differences_by_hand(tmp_path, capsys):
    write(tmp_path, {"0.5": [4.0, 4.2], "1.0": [4.1, 4.1], "2.0": [4.0]})
    [cell] = sweep(tmp_path)["cells"]
    rows = {row["variant"]["train.lr_scale"]: row for row in cell["variants"]}
    assert (cell["arm"], cell["size"], cell["tokens"]) == ("qies", "50k", 999_424)
    assert rows[0.5]["loss"] == pytest.approx(4.1) and rows[0.5]["se"] == pytest.approx(0.1)
    assert [row["best"] for row in rows.values()].count(True) == 1 and not rows[2.0]["best"]  # one seed is no mean
    assert rows[1.0]["behind" if not rows[1.0]["best"] else "loss"] is not None
    other = rows[1.0 if rows[0.5]["best"] else 0.5]["behind"]
    assert other["difference"] == pytest.approx(0, abs=1e-12) and other["se"] == pytest.approx(0.1) and other["n"] == 2
    with pytest.raises(SystemExit) as stop:
        main(["ladder", "sweep", "--out", str(tmp_path), "--json"])
    assert stop.value.code == 0 and json.loads(capsys.readouterr().out)["swept"] == ["train.lr_scale"]
    with pytest.raises(SystemExit) as stop:
        main(["ladder", "sweep", "--out", str(tmp_path)])
    assert "lr_scale=0.5" in capsys.readouterr().out


def finish(folder, loss: float, source: str = "builtin", known: str = "", **values) -> None:
    """A finished run with dotted keys replaced."""
    plain = RunConfig(arm="qies", size="50k", data=DataConfig(source, hash=known))
    config = override(plain, {key.replace("__", "."): value for key, value in values.items()})
    metrics = {"val_loss": loss, "val_bpb": 2.0, "induction": 0.2, "induction_onset": None}
    record = replace(records.plan(config, 4096), status="done", metrics=metrics)
    records.write(folder / record.config_hash, record)


def test_values_that_are_lists_are_told_apart(tmp_path, capsys):
    for loss, steps in ((4.0, []), (4.1, [5]), (4.2, [5, 9])):
        finish(tmp_path, loss, train__milestones=steps)
    [cell] = sweep(tmp_path)["cells"]
    found = [(list(row["variant"]["train.milestones"]), row["loss"]) for row in cell["variants"]]
    assert found == [([], 4.0), ([5], 4.1), ([5, 9], 4.2)]
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            main(["ladder", "sweep", "--out", str(tmp_path), *words])
        assert stop.value.code == 0
    assert '"train.milestones": [' in capsys.readouterr().out


def test_texts_are_told_apart_by_their_hash_and_else_by_their_name(tmp_path):
    finish(tmp_path, 4.0, "registry")
    finish(tmp_path, 4.1, "builtin", data__seed=5)
    finish(tmp_path, 4.2, "/here/texts", "a" * 64)
    finish(tmp_path, 4.3, "/there/texts", "b" * 64)
    found = sweep(tmp_path)
    assert found["swept"] == ["data.hash", "data.seed", "data.source"]
    assert [row["loss"] for row in found["cells"][0]["variants"]] == [4.0, 4.1, 4.2, 4.3]
    finish(tmp_path / "moved", 4.2, "/moved/other", "a" * 64)
    with pytest.raises(UserError, match="two identical runs: qies 50k seed 0"):
        sweep(tmp_path)


def test_no_run_and_the_same_run_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        sweep(tmp_path)
    write(tmp_path / "a", {"0.5": [4.0]})
    write(tmp_path / "b", {"0.5": [4.0]})
    with pytest.raises(UserError, match="two identical runs: qies 50k seed 0"):
        sweep(tmp_path)


def test_runs_without_an_induction_score_have_no_onset(tmp_path, capsys):
    write(tmp_path, {"0.5": [4.0, 4.2]})
    for path in tmp_path.glob("runs/*/run.json"):
        record = json.loads(path.read_text())
        record["metrics"] = {"val_loss": 4.0, "val_bpb": 2.0}
        path.write_text(json.dumps(record))
    [row] = sweep(tmp_path)["cells"][0]["variants"]
    assert row["onsets"] == {}
    with pytest.raises(SystemExit):
        main(["ladder", "sweep", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "not measured" in printed and "never" not in printed


def test_onsets_are_in_order_of_seeds(tmp_path):
    write(tmp_path, {"0.5": [4.0] * 12})
    [row] = sweep(tmp_path)["cells"][0]["variants"]
    assert list(row["onsets"]) == [str(seed) for seed in range(12)]
