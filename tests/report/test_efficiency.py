"""The analysis of costs: fronts, the table of what an improvement costs, rates from a study's bench."""

import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from study_pages import page_of

from qies import presets, records
from qies.accounting.cache import cache_bytes
from qies.accounting.flops import cheaper_from, decode_flops, prefill_flops, training_flops_per_token
from qies.analyses import Finished, efficiency
from qies.analyses.records import read_study
from qies.config import StudyConfig, load

SMALL = Path(__file__).parents[2] / "results" / "reference" / "small"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The committed study of three arms and sizes, with a bench beside it."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(SMALL / "runs", folder / "runs")
    shutil.copy(SMALL / "study.yaml", folder)
    facts = {"size": "100k", "batch": 1, "context": 32_768, "tokens": 1}
    cases = [
        {"facts": facts, "tokens_per_second": {"qies": 90.0, "transformer": 30.0}},
        {"facts": facts | {"batch": 8}, "tokens_per_second": {"qies": 1.0}},
        {"facts": facts | {"context": 1024}, "tokens_per_second": {"qies": 2.0}},
    ]
    (folder / "bench").mkdir()
    (folder / "bench" / "decode.json").write_text(json.dumps({"cases": cases}))
    return folder


@pytest.fixture(scope="module")
def finished(small):
    return Finished(load(StudyConfig, small / "study.yaml"), small, records.query(small, status="done"))


@pytest.fixture(scope="module")
def result(finished):
    return json.loads(json.dumps(efficiency.compute(finished)))


def point(result, arm, size):
    [found] = [p for p in result["points"] if (p["arm"], p["size"]) == (arm, size)]
    return found


@pytest.mark.parametrize("arm", ["qies", "no_phase", "transformer"])
def test_points_hold_the_records_means_and_the_accountings_costs(arm, finished, result):
    own = point(result, arm, "100k")
    runs = [r for r in finished.done if (r.arm, r.size) == (arm, "100k")]
    values = efficiency.settings(runs[0])
    assert own["seeds"] == len(runs) == 3
    assert own["loss"] == pytest.approx(fmean(r.val_loss for r in runs)) and own["flops"] == runs[0].flops
    assert own["decode_flops"] == sum(decode_flops(values, 32_768).values())
    assert own["prefill_flops"] == sum(prefill_flops(values, 16_384).values())
    assert own["cache_bytes"] == sum(cache_bytes(values, 32_768).values())
    assert own["state_bytes"] == sum(cache_bytes(values, 0).values())
    assert own["decode_rate"] == {"qies": 90.0, "transformer": 30.0}.get(arm) and own["prefill_rate"] is None
    assert point(result, arm, "40k")["decode_rate"] is None


def test_the_contexts_are_those_of_the_accounting(finished, result):
    models = {(r.arm, r.size): efficiency.settings(r) for r in finished.done}
    assert len(result["cheaper"]) == 6
    for row in result["cheaper"]:
        own, rival = models[row["arm"], row["size"]], models["transformer", row["size"]]
        assert row["decode"] == cheaper_from(own, rival)
        assert row["training"] == cheaper_from(own, rival, training_flops_per_token)


def test_a_model_without_such_positions_and_one_from_before_a_field_have_costs(finished):
    run = finished.done[0]
    old = {key: value for key, value in run.model.items() if key not in ("register_heads", "nope_interval")}
    assert efficiency.settings(records.RunRecord(**vars(run) | {"model": old}))["register_heads"] == 0
    gpt2 = records.RunRecord(**vars(run) | {"arm": "gpt2", "model": presets.settings("gpt2", run.size, 4096)})
    found = efficiency.compute(Finished(finished.config, finished.folder, [gpt2]))
    [own] = found["points"]
    assert own["decode_flops"] is own["cache_bytes"] is own["prefill_flops"] is None and own["flops"] > 0
    assert found["cheaper"] == []


def test_a_front_holds_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 4), (3, 4.5), (4, 1), (5, 1), (2, 6)]
    assert efficiency.front(points) == [(1, 5), (2, 4), (4, 1)]
    assert efficiency.front(points, more=True) == [(5, 1)]
    assert efficiency.front([(1, 1), (2, 2), (3, 3)], more=True) == [(1, 1), (2, 2), (3, 3)]


def test_the_table_says_what_the_improvement_costs(small, result):
    study = read_study(small)
    part = efficiency.section(result, study)
    price, charts = part.blocks[0], part.blocks[1:]
    [row] = [row for row in price.rows if row[:2] == ["qies", "100k"]]
    own, rival = point(result, "qies", "100k"), point(result, "transformer", "100k")
    assert row[2] == f"{own['loss'] - rival['loss']:+.4f}"
    for column, ratio in (
        (3, own["flops"] / rival["flops"]), (4, rival["train_rate"] / own["train_rate"]),
        (5, own["memory"] / rival["memory"]), (6, own["prefill_flops"] / rival["prefill_flops"]),
        (7, own["decode_flops"] / rival["decode_flops"]), (8, own["cache_bytes"] / rival["cache_bytes"]), (9, 1 / 3),
    ):  # fmt: skip
        assert float(row[column]) == pytest.approx(ratio, rel=5e-3)
    assert len(price.rows) == 6 and len(charts) == 4
    rates = charts[-1]
    assert "tokens per second" in rates.figure.title and len(rates.table.rows) == 2
    fronts = {tuple(row[:1]) for chart in charts for row in chart.table.rows if row[-1] == "yes"}
    assert fronts  # every arm has one
    assert all("yes" in {row[-1] for row in chart.table.rows} for chart in charts)


def test_the_page_shows_it_and_survives_without_it(study):
    text = page_of(study).text
    assert "What the improvement over transformer costs" in text and "Loss against bytes of cache" in text
    assert re.search(r"qies 50k [+-]\d\.\d{4} .* 52 never", text)
    assert efficiency.section({"points": []}, read_study(study)) is None
    (study / "efficiency.json").unlink()
    assert "efficiency.json is missing" in page_of(study).text
