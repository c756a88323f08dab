"""The main job on a small corpus: done once, resumed after a kill, refused where another study lives."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from qies import config as configs
from qies import ladder, presets, records, study
from qies.analyses import Finished, comparison, samples
from qies.cli import VERBS
from qies.config import DataConfig, RunConfig, StudyConfig
from qies.errors import UserError
from qies.ladder.grid import claim
from qies.ladder.run import result_table, run_all
from qies.report.page import build_report
from qies.terminal import run


@pytest.fixture(scope="module")
def settings(data_config, tiny) -> StudyConfig:
    return StudyConfig(
        name="tiny", arms=("transformer", "qies"), sizes=("50k", "100k", "200k"), tokens_per_parameter=0.012,
        data=data_config, train=tiny, prompts=("Ada", "Bell wrote"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "tiny"
    return folder, study.run_study(claim(settings, folder), Console(quiet=True))


def facts(record):
    """What must not depend on how often a run was interrupted."""
    return {
        k: getattr(record, k)
        for k in ("config_hash", "status", "metrics", "tokens", "flops", "params", "skipped_steps")
    }


def test_every_run_is_done_and_recorded(finished, settings):
    folder, records = finished
    assert [r.config_hash for r in records] == [configs.content_hash(c) for c in settings.runs()]
    assert {r.status for r in records} == {"done"}
    assert len({r.data["hash"] for r in records}) == 1
    fits = json.loads((folder / "fits.json").read_text())
    assert set(fits["arms"]) == {"transformer", "qies"}
    assert all(fit["params"]["alpha"] == fit["params"]["alpha"] for a in fits["arms"].values() for fit in a.values())
    compared = json.loads((folder / "comparison.json").read_text())
    [pair] = compared["pairs"]
    assert (pair["candidate"], pair["baseline"]) == ("qies", "transformer") and compared["not_compared"] == []
    assert pair["runs"] == {"qies": 3, "transformer": 3}
    assert pair["flops_convention"] == fits["flops_convention"]
    entropy = json.loads((folder / "entanglement.json").read_text())
    assert set(entropy["arms"]) == {"qies"}
    for layer in entropy["arms"]["qies"]["200k"]["layers"]:
        for head in layer["heads"]:
            assert 0 <= head["renyi2"][0] <= head["von_neumann"][0] + 1e-6 <= head["ceiling"] + 1e-5
            assert sum(head["spectrum"]) == pytest.approx(1, abs=1e-4)
    samples = json.loads((folder / "samples.json").read_text())
    assert all(len(s["continuations"]) == 2 for s in samples["arms"].values())


def test_the_page_is_made_of_the_records(finished):
    folder, records = finished
    page = build_report(folder).read_text()
    for record in records:
        assert record.config_hash in page or record.config_hash[:8] in page
    assert f"{records[0].metrics['val_bpb']:.4f}" in page or f"{records[0].metrics['val_bpb']:.3f}" in page


def test_the_table_has_the_loss_on_the_clean_part_where_it_was_measured(finished, settings):
    text = io.StringIO()
    measured = [replace(r, metrics=r.metrics | {"val_loss_clean": 7.125}) for r in finished[1] if r.arm == "qies"]
    older = [r for r in finished[1] if r.arm == "transformer"]
    older = [replace(r, metrics={k: v for k, v in r.metrics.items() if "clean" not in k}) for r in older]
    Console(file=text, width=200).print(result_table(settings, [*measured, *older]))
    rows = {line.split()[0]: line for line in text.getvalue().splitlines() if line.strip()}
    assert rows["qies"].count("; 7.125)") == 3
    assert f"({older[0].val_loss:.3f})" in rows["transformer"]


def test_every_arm_is_compared_with_the_baseline_and_the_model_with_its_controls(finished, settings, tmp_path):
    _, found = finished
    arms = ["qies", "transformer", "no_phase", "gpt2"]
    everything = configs.from_dict(StudyConfig, configs.to_dict(settings) | {"arms": arms})
    for record in found:
        for arm in {"qies": ("qies", "no_phase"), "transformer": ("transformer",)}[record.arm]:
            records.write(tmp_path / "runs" / f"{arm}{record.size}", replace(record, arm=arm))
    compared = comparison.compute(Finished(everything, tmp_path, []))
    pairs = [(pair["candidate"], pair["baseline"]) for pair in compared["pairs"]]
    assert pairs == [("qies", "transformer"), ("no_phase", "transformer"), ("qies", "no_phase")]
    assert compared["pairs"][2]["verdict"] == "no difference"  # the same runs under two names
    [refused] = compared["not_compared"]
    assert refused["candidate"] == "gpt2" and "Unknown arm 'gpt2' in these runs" in refused["reason"]


def test_a_second_call_trains_nothing(finished, settings):
    folder, records = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/**/*")}
    assert study.run_study(claim(settings, folder), Console(quiet=True)) == records
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/**/*")}


@pytest.mark.parametrize("error", [UserError("no room for it"), ZeroDivisionError("by design")])
def test_an_analysis_that_fails_costs_neither_the_runs_nor_the_page(error, finished, settings, tmp_path, monkeypatch):
    """It is one line of the page, the exit code is 1, and the next call makes it."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "tiny")
    (tmp_path / "tiny" / "samples.json").unlink()
    whole = (folder / "samples.json").read_text()
    configs.save(settings, tmp_path / "tiny.yaml")
    again = ["study", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "tiny")]

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(samples, "compute", fails)
        assert run(VERBS, again, "") == 1
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert "The analysis of samples.json failed" in page and str(error) in page
    assert run(VERBS, again, "") == 0
    assert (tmp_path / "tiny" / "samples.json").read_text() == whole
    assert "The analysis of samples.json failed" not in (tmp_path / "tiny" / "report.html").read_text()


def test_samples_end_with_the_positions_that_a_model_has_learned(settings, shard_folder, tmp_path, monkeypatch):
    """A prompt that takes them all is named; another arm's samples are made."""
    from qies.data.shards import open_shards
    from qies.model import QiesConfig, QiesForCausalLM

    tokenizer = open_shards(shard_folder).tokenizer()
    few = replace(settings, arms=("gpt2",), prompts=("Ada", "Ada " * 20))
    [record, *_] = [replace(records.plan(c, 400), status="done") for c in few.runs()]
    values = presets.settings("gpt2", record.size, 400, max_position_embeddings=16)
    model = tmp_path / "runs" / record.config_hash / "model"
    QiesForCausalLM(QiesConfig(**values, eos_token_id=tokenizer.eos_token_id)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    short, long = samples.compute(Finished(few, tmp_path, [record]))["arms"]["gpt2"]["continuations"]
    assert short and long == "(the prompt takes all 16 learned positions)"


def test_another_study_is_refused_and_nothing_is_overwritten(finished, settings, tmp_path):
    folder, _ = finished
    before = (folder / "study.yaml").read_text()
    for changed, words in (
        ({"model": {"conv_size": 0}}, r"model.conv_size: absent -> 0"),
        ({"train": {**configs.to_dict(settings)["train"], "lr_scale": 2.0}}, r"train.lr_scale: 1.0 -> 2.0"),
        ({"name": "other"}, r"name: tiny -> other"),
        ({"seeds": [0, 1], "data": {**configs.to_dict(settings)["data"], "seed": 5}}, r"data.seed: 0 -> 5"),
    ):
        other = configs.from_dict(StudyConfig, configs.to_dict(settings) | changed)
        with pytest.raises(UserError, match=f"different study .*{words}"):
            study.run_study(claim(other, folder), Console(quiet=True))
    assert (folder / "study.yaml").read_text() == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no study"):
        study.run_study(claim(settings, tmp_path), Console(quiet=True))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_claimed_grid_has_what_was_there_and_what_is_added(settings, tmp_path):
    (tmp_path / "out").mkdir()
    configs.save(settings, tmp_path / "out" / "study.yaml")
    same = {"name", "data", "train", "model"}
    own = {k: v for k, v in configs.to_dict(settings).items() if k in same}
    more = configs.from_dict(StudyConfig, own | {
        "arms": ["qies", "no_phase"], "sizes": ["50k", "0.06m"], "seeds": [3], "tokens_per_parameter": 0.02,
        "variants": [{"train.lr_scale": 0.5}], "workers": 1, "prompts": ["x"],
    })  # fmt: skip
    grid = claim(more, tmp_path / "out").study
    assert grid.arms == ("transformer", "qies", "no_phase") and grid.sizes == ("50k", "100k", "200k", "60k")
    assert grid.seeds == (0, 3) and grid.budgets == (0.012, 0.02) and grid.variants == ({}, {"train.lr_scale": 0.5})
    assert grid.workers == 1 and grid.prompts == ("x",)
    hashes = {configs.content_hash(c) for c in grid.runs()}
    assert {configs.content_hash(c) for c in (*settings.runs(), *more.runs())} < hashes
    assert claim(settings, tmp_path / "out").study == settings  # a claim writes nothing


@pytest.mark.slow
def test_a_finished_study_grows_and_keeps_its_runs(finished, settings, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "grown")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/**/*") if p.is_file()}
    more = replace(settings, arms=("no_phase",), sizes=("50k",))
    records = study.run_study(claim(more, folder), Console(quiet=True))
    assert {r.arm for r in records} == {"transformer", "qies", "no_phase"} and len(records) == 9
    assert {r.status for r in records} == {"done"}
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    known = configs.load(StudyConfig, folder / "study.yaml")
    assert known.arms == ("transformer", "qies", "no_phase") and known.sizes == settings.sizes
    pairs = json.loads((folder / "comparison.json").read_text())["pairs"]
    assert ("no_phase", "transformer") in {(p["candidate"], p["baseline"]) for p in pairs}
    assert "no_phase" in build_report(folder).read_text()
    told = io.StringIO()
    run_all(claim(settings, folder), Console(file=told))
    assert "9 of 9 runs are done already" in told.getvalue()


def test_a_study_whose_arm_was_defined_anew_is_refused(finished, settings, tmp_path):
    """Its finished runs do not pass for those of today's arm, and nothing is written."""
    folder = shutil.copytree(finished[0], tmp_path / "old")
    config = next(c for c in settings.runs() if c.arm == "qies")
    own = ladder.run_folder(folder / "runs", config)
    record = records.read(own)
    records.write(own, replace(record, model=record.model | {"register_heads": 2}))
    before = (folder / "study.yaml").read_text()
    more = replace(settings, seeds=(0, 1))
    with pytest.raises(UserError, match=r"model.register_heads: 2 -> 4\); give another --out"):
        study.run_study(claim(more, folder), Console(quiet=True))
    assert (folder / "study.yaml").read_text() == before


@pytest.mark.slow
def test_a_study_killed_in_the_middle_ends_as_the_undisturbed_one(finished, settings, tmp_path):
    undisturbed, expected = finished
    configs.save(settings, tmp_path / "tiny.yaml")
    out = tmp_path / "out"
    shutil.copytree(undisturbed / "data", out / "data")
    shutil.copy(undisturbed / "study.yaml", out / "study.yaml")
    command = [sys.executable, "-m", "qies", "study", str(tmp_path / "tiny.yaml"), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 120
    while len(list(out.glob("runs/*/metrics.jsonl"))) < 3 and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = study.run_study(claim(settings, out), Console(quiet=True))
    assert [facts(r) for r in found] == [facts(r) for r in expected]
    for record in expected:
        name = f"runs/{record.config_hash}"
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in records.steps(f / name)]
                for f in (out, undisturbed)]  # fmt: skip
        assert rows[0] == rows[1]
        assert (out / name / "model/model.safetensors").read_bytes() == (
            undisturbed / name / "model/model.safetensors"
        ).read_bytes()


def test_a_study_killed_while_it_reads_its_corpus_is_known_again(settings, tmp_path):
    """What such a kill leaves: the claim and a half-built data folder."""
    study_folder = tmp_path / "out"
    (study_folder / "data").mkdir(parents=True)
    (study_folder / "data" / ".building").touch()
    configs.save(settings, study_folder / "study.yaml")
    claim(settings, study_folder)
    claim(configs.from_dict(StudyConfig, configs.to_dict(settings) | {"workers": 1}), study_folder)


def test_a_bad_corpus_leaves_no_claim_behind(settings, tmp_path):
    empty = replace(settings, data=DataConfig(str(tmp_path / "nothing")))
    with pytest.raises(UserError):
        study.run_study(claim(empty, tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out" / "study.yaml").exists()


def test_slots_read_each_row_once_and_start_again_after_a_resume(tmp_path):
    slot = ladder.Slot(RunConfig(), tmp_path, None)
    first, second = {"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}
    assert slot.new_rows() == []
    records.append(tmp_path, first)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 1, ')
    assert slot.new_rows() == [first]
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('"loss": 1.0}\n')
    assert slot.new_rows() == [second]
    records.truncate_steps(tmp_path, 1)
    assert slot.new_rows() == [first]


def test_presets_are_valid_studies():
    for path in study.PRESETS.glob("*.yaml"):
        assert study.preset(path.stem).name == path.stem
