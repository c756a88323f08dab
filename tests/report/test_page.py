"""The page of a synthetic study: what it says, that it says no more, and that nothing in a record can break it."""

import json
import re
import subprocess
import sys
from html import unescape
from itertools import pairwise

import pytest
from plotly.offline import get_plotlyjs
from study_pages import Page, edit, make_study, page_of, runs_of

from qies.analyses.records import read_study
from qies.errors import UserError
from qies.plotting import styles
from qies.report import build_report, write_summary_svg
from qies.report.verdict import verdict


def record_of(study, arm, size):
    return next(
        p for p in study.glob("runs/*/run.json") if json.loads(p.read_text())["config_hash"] == f"{arm[:4]}{size}0"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = make_study(tmp_path_factory.mktemp("results") / "synthetic")
    return folder, build_report(folder).read_text()


def test_page_holds_every_part(whole):
    page = Page(whole[1])
    for words in (
        "transformer", "qies", "no_phase", "Bits per byte", "Power laws", "Training loss at 200k", "Peak memory",
        "Training throughput", "Entropy per layer and head, qies 400k", "Mean entropy of all heads",
        "Mean Schmidt spectrum per layer, no_phase 400k", "And the king said unto him,", "Sources of the corpus",
        "Go up to the house of the LORD", "public domain text", "c0ffee11", "Run records", "tran400k0", "0.1.0+abc",
        "2.13.0", "qies study", "Compute-equivalent gain", "Induction gain at 400k", "Difference at each matched size",
        "Residuals",
        "Frontier: least loss at each compute", "Runs needed to detect the observed gain",
    ):  # fmt: skip
        assert words in page.text, words
    # loss, gains, residuals, induction, training, speed, entanglement, efficiency
    assert len(page.charts) == page.elements.count("svg") == 2 + 4 + 1 + 4 + 4 + 2 + 5 + 3
    assert page.elements.count("table") >= len(page.charts)
    assert "left out" not in page.text


def test_page_is_one_file_that_asks_the_network_for_nothing(whole):
    text = whole[1]
    assert text.count(get_plotlyjs()) == 1
    ours = text.replace(get_plotlyjs(), "")
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?(?!#|\{)[^"'>]+""", ours)
    assert (
        "http://" not in ours
        and "https://" not in ours
        and "@import" not in ours
        and not re.search(r"url\((?!#)", ours)
    )
    assert "default-src 'none'" in ours
    assert len(ours) < 550_000


def test_table_shows_the_differences_of_the_records(whole):
    page = Page(whole[1])
    values = {}
    for path in whole[0].glob("runs/*/run.json"):
        record = json.loads(path.read_text())
        values[record["arm"], record["size"]] = record["metrics"]
    for size in ("50k", "400k"):
        ours, base = values["qies", size], values["transformer", size]
        for key in ("val_bpb", "val_loss"):
            assert f"{ours[key]:.4f} ({ours[key] - base[key]:+.4f})" in page.text


def test_loss_on_the_clean_part_is_a_table_where_runs_have_it(whole, study):
    assert "clean part" not in Page(whole[1]).text  # of runs older than the measure
    for path in study.glob("runs/*/run.json"):
        edit(path, lambda r: r["metrics"].update(val_loss_clean=1.25 * r["metrics"]["val_loss"]))
    page = page_of(study)
    assert (
        "Validation loss on the clean part on held-out text (nats per token) and difference to transformer" in page.text
    )
    arms = ("qies", "transformer")
    ours, base = (json.loads(record_of(study, arm, "50k").read_text())["metrics"]["val_loss_clean"] for arm in arms)
    assert f"{ours:.4f} ({ours - base:+.4f})" in page.text


def test_loss_chart_holds_points_laws_and_bands(whole):
    figure = Page(whole[1]).charts[1]
    kinds = [(trace["mode"], trace.get("fill")) for trace in figure["data"] if not trace["showlegend"]]
    assert kinds.count(("markers", None)) == 3
    assert kinds.count(("lines", "toself")) == 3
    assert kinds.count(("lines", None)) == 6  # each law within the data and beyond
    legend = [trace for trace in figure["data"] if trace["showlegend"]]
    assert [trace["name"] for trace in legend] == ["transformer", "qies", "no_phase"]
    assert len({trace["marker"]["symbol"] for trace in legend}) == len({trace["line"]["dash"] for trace in legend}) == 3
    assert figure["layout"]["xaxis"]["type"] == figure["layout"]["yaxis"]["type"] == "log"


def test_verdict_is_computed_and_claims_no_more_than_one_seed_allows(study):
    said = verdict(read_study(study))
    losses = {
        arm: json.loads(record_of(study, arm, "400k").read_text())["metrics"]["val_loss"]
        for arm in ("transformer", "qies")
    }
    pairs = {p["candidate"]: p for p in json.loads((study / "comparison.json").read_text())["pairs"]}
    assert "At 400k" in said[0] and "qies has the lowest validation loss" in said[0]
    assert f"{losses['qies']:.4f} nats per token" in said[0]
    assert f"{losses['transformer'] - losses['qies']:.4f} nats" in said[0]
    for sentence, arm in ((said[1], "qies"), (said[2], "no_phase")):
        assert sentence.startswith(f"{arm} against transformer: {pairs[arm]['verdict']}; {pairs[arm]['reason']}")
    assert "One seed at every matched size" in said[3]
    assert len(said) == len(set(said))  # what both pairs warn of is said once


def test_verdict_of_an_old_folder_without_comparison_says_what_the_losses_say(study):
    (study / "comparison.json").unlink()
    said = verdict(read_study(study))
    assert "lower at 4 of 4 sizes" in said[1]
    assert "lower at 0 of 4 sizes" in said[2]
    assert "from seed to seed is unknown" in said[3]
    page = page_of(study)
    assert "comparison.json is missing" in page.text and "Gains between arms" not in page.text
    assert "Validation loss against training FLOPs" in page.text and "Residuals" in page.text


def test_a_law_read_beyond_its_runs_says_so_in_the_verdict(study):
    edit(study / "comparison.json", lambda c: c["pairs"][0]["gain"]["at_largest"].update(reach=2.5))
    edit(study / "comparison.json", lambda c: c["pairs"][1]["gain"]["at_largest"].update(reach=1.0))
    said = verdict(read_study(study))
    assert said[1].endswith("(a law is extrapolated 2.5 times beyond its runs there).") and "beyond" not in said[2]


def test_gain_chart_and_its_table_hold_the_stored_curve(whole):
    pairs = json.loads((whole[0] / "comparison.json").read_text())["pairs"]
    page = Page(whole[1])
    [figure] = [c for c in page.charts if "gain (times the FLOPs" in c["layout"]["yaxis"]["title"]["text"]]
    x, y = ([point[key] for point in pairs[0]["gain"]["curves"]["compute"]] for key in ("compute", "gain"))
    assert any(t["x"] == x and t["y"] == y for t in figure["data"])
    for stored in pairs:
        last = stored["gain"]["at_largest"]
        assert f"{last['gain']:.3g} ({last['lo']:.3g} to {last['hi']:.3g})" in page.text
        assert f"{stored['paired'][0]['difference']:+.4f}" in page.text


def test_sentences_that_all_pairs_share_are_said_once(whole):
    text = Page(whole[1]).text
    assert text.count("matmul FLOPs, forward and backward, attention scores included") == 2  # and at the laws
    assert "For all pairs: FLOPs: matmul" in text


def test_pairs_that_could_not_be_compared_are_told(study):
    refused = {"candidate": "complex", "baseline": "transformer", "reason": "arm 'complex' is not in these runs"}
    edit(study / "comparison.json", lambda c: c["not_compared"].append(refused))
    assert "Not compared: complex with transformer (arm 'complex' is not in these runs)" in page_of(study).text


def test_open_intervals_and_unknown_gains_are_words_not_errors(study):
    def open_ends(c):
        for point in c["pairs"][0]["gain"]["curves"]["compute"]:
            point.update(hi=None)
        for point in c["pairs"][1]["gain"]["curves"]["compute"]:
            point.update(gain=None, lo=None, hi=None)
        for row in c["pairs"][0]["paired"]:
            row.update(lo=None, hi=None, p=None, test="one seed")
        c["pairs"][0]["power"] = None
        c["pairs"][1]["power"].update(cells_needed=None, best=None)

    edit(study / "comparison.json", open_ends)
    text = page_of(study).text
    assert "to unbounded)" in text and "over 1,000" in text and "left out" not in text


def test_bootstrapped_laws_show_their_cloud(study):
    draws = [[30.0 + 0.1 * i, 0.1 + 0.001 * i] for i in range(20)]
    edit(study / "fits.json", lambda f: f["arms"]["qies"]["flops"].update(draws=draws))
    page = page_of(study)
    assert "Bootstrap of the law in FLOPs, qies" in page.text
    [cloud] = [t["x"] for c in page.charts for t in c["data"] if t.get("x") == [d[0] for d in draws]]
    assert len(cloud) == 20


def test_an_outlier_of_a_law_is_named_in_the_residuals(study):
    path = record_of(study, "no_phase", "100k")
    edit(path, lambda r: r["metrics"].update(val_loss=1.1 * r["metrics"]["val_loss"]))
    [figure] = [c for c in page_of(study).charts if "run against law" in c["layout"]["yaxis"]["title"]["text"]]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["no_phase, 100k, seed 0"]


def test_verdict_says_when_the_baseline_wins_or_ties(study):
    (study / "comparison.json").unlink()
    path = record_of(study, "qies", "400k")
    base = json.loads(record_of(study, "transformer", "400k").read_text())["metrics"]["val_loss"]
    edit(path, lambda r: r["metrics"].update(val_loss=base + 0.02))
    said = verdict(read_study(study))
    assert "transformer has the lowest validation loss" in said[0] and "lower at 3 of 4 sizes" in said[1]
    edit(path, lambda r: r["metrics"].update(val_loss=base))
    assert "have the same validation loss to four digits" in verdict(read_study(study))[0]


def test_training_curves_of_all_arms_have_the_same_seed(tmp_path):
    study = make_study(tmp_path / "seeds", seeds=(7, 0, 1))
    for seed, path in enumerate(runs_of(study, "qies")):  # folders in another order than for the other arms
        path.parent.rename(path.parent.with_name(f"a{9 - seed}"))

    def shown(seed):
        title = f"Training loss at 400k, seed {seed}"
        page = page_of(study)
        assert title in page.text
        last = [c for c in page.charts if c["layout"]["yaxis"]["title"]["text"].startswith("training loss")][-1]
        return {t["name"]: t["y"] for t in last["data"] if t["x"] != [None]}

    def trained(arm, seed):
        [path] = [p for p in runs_of(study, arm) if json.loads(p.read_text())["seed"] == seed]
        return [json.loads(line)["loss"] for line in path.with_name("metrics.jsonl").read_text().splitlines()]

    first = {arm: trained(arm, 7) for arm in ("transformer", "qies", "no_phase")}
    for arm, losses in shown(7).items():  # the study's first; windows of 2 of the 120 steps
        assert losses == pytest.approx([first[arm][0], *((x + y) / 2 for x, y in pairwise(first[arm]))])
    [path] = [p for p in runs_of(study, "qies") if json.loads(p.read_text())["seed"] == 7]
    path.with_name("metrics.jsonl").unlink()
    assert set(shown(0)) == {"transformer", "qies", "no_phase"}  # the first that every arm has


def test_hover_names_the_run_and_the_law_with_its_ci_there(whole):
    law = json.loads((whole[0] / "fits.json").read_text())["arms"]["qies"]["params"]
    chart = next(c for c in Page(whole[1]).charts if "non-embedding" in c["layout"]["xaxis"]["title"]["text"])
    [runs] = [t for t in chart["data"] if t["mode"] == "markers" and t["name"] == "qies"]
    record = json.loads(record_of(whole[0], "qies", "400k").read_text())
    at = runs["text"].index(next(text for text in runs["text"] if text.startswith("qies, 400k, seed 0; law ")))
    assert runs["y"][at] == record["metrics"]["val_loss"]
    predicted, low, high = map(float, re.search(r"law (\S+) \(95% CI (\S+) to (\S+)\)", runs["text"][at]).groups())
    params = law["params"]
    assert predicted == pytest.approx(params["A"] * runs["x"][at] ** -params["alpha"], rel=2e-4)
    assert low < predicted < high
    [line] = [t for t in chart["data"] if t["mode"] == "lines" and t.get("name") == "qies" and t.get("customdata")]
    assert line["customdata"][0] == f" ({law['curve']['lo'][0]:.4g} to {law['curve']['hi'][0]:.4g})"


def test_static_figures_stand_where_the_charts_are_without_scripts(whole):
    static = re.findall(r'<div class="static">(<svg.*?</svg>)', whole[1], re.S)
    titles = [re.search("<title>(.*?)</title>", svg)[1] for svg in static]
    assert titles == re.findall(r'<div class="chart" role="group" aria-label="(.*?)">', whole[1])
    assert all("<path" in svg and "xmlns" not in svg for svg in static)
    ids = re.findall(r'<clipPath id="(.*?)">', whole[1])
    assert len(ids) == len(set(ids)) >= len(static)


def test_settings_that_differ_within_an_arm_are_told(study):
    edit(record_of(study, "qies", "100k"), lambda r: r["config"].update(model={"position": "rope"}))
    assert "qies was trained with 2 different settings (variants)" in page_of(study).text


def test_verdict_pairs_seeds(tmp_path):
    study = make_study(tmp_path / "seeds", seeds=(0, 1, 2))
    assert "paired t" in page_of(study).text
    assert "One seed" not in " ".join(verdict(read_study(study)))
    (study / "comparison.json").unlink()
    said = " ".join(verdict(read_study(study)))
    assert "With up to 3 seeds" in said and "no significance test" in said and "unknown" not in said


def test_runs_without_a_result_are_told_and_not_compared(study):
    edit(
        record_of(study, "qies", "400k"), lambda r: r.update(status="diverged", error="11 steps with a non-finite loss")
    )
    edit(record_of(study, "transformer", "400k"), lambda r: r.update(status="planned", metrics={}, wall_seconds=None))
    edit(record_of(study, "no_phase", "50k"), lambda r: r["metrics"].update(val_loss=None))
    text = page_of(study).text
    assert "3 of 12 runs have no result (1 diverged, 1 done without a loss, 1 planned)" in text
    assert "11 steps with a non-finite loss" in text
    assert "At 200k, the largest size to compare" in text


def test_only_planned_runs_make_a_page(study):
    for path in study.glob("runs/*/run.json"):
        edit(path, lambda r: r.update(status="planned", metrics={}))
        path.with_name("metrics.jsonl").unlink()
    for name in PARTS:
        (study / name).unlink()
    page = page_of(study)
    assert "No run has finished" in page.text and "fits.json is missing" in page.text
    assert page.charts == []


PARTS = (
    "fits.json",
    "comparison.json",
    "entanglement.json",
    "efficiency.json",
    "samples.json",
    "data/manifest.json",
    "study.yaml",
)
MALFORMED = (
    '{"pairs": 3, "not_compared": [1]}',
    '{"pairs": [1, {"candidate": "a", "baseline": "b", "verdict": "a wins", "reason": "r", "summary": "s"}]}',
    "",
    "{",
    "[1]",
    "\x00",
    '{"arms": 3}',
    '{"arms": {"qies": {}}, "text": {"source": "x", "tokens": 1}}',
    '{"arms": {"qies": {"400k": {"layers": "x"}, "params": {"curve": {"x": [1], "loss": ["2"]}}}}}',
)


@pytest.mark.parametrize("content", MALFORMED)
def test_malformed_parts_never_break_the_page(study, content):
    for name in PARTS:
        (study / name).write_text(content)
    page = page_of(study)
    assert "qies has the lowest validation loss" in page.text
    assert "Validation loss against training FLOPs" in page.text


def test_malformed_parts_are_named(study):
    (study / "entanglement.json").write_text('{"arms": {"qies": {"400k": {}}}}')
    (study / "samples.json").write_text("{")
    text = page_of(study).text
    assert "The part on entanglement is left out" in text
    assert "samples.json could not be read" in text


def test_fields_of_another_type_never_break_the_page(study):
    path = record_of(study, "no_phase", "100k")
    edit(
        path,
        lambda r: r.update(
            params="many", flops=10**400, metrics=[1], tokens="x", environment=7, seed=None, size=["100k"], data=0
        ),
    )
    path.with_name("metrics.jsonl").write_text('{"step": 1, "tokens": "x", "loss": null}\n[1]\n{"tok')
    text = page_of(study).text
    assert f"runs/{path.parent.name} could not be read and is ignored." in text


def test_runs_of_another_corpus_are_told(study):
    edit(record_of(study, "qies", "100k"), lambda r: r.update(data={"hash": "0ther"}))
    assert "The runs come from 2 different data." in page_of(study).text


def test_unequal_parameters_are_told(study):
    edit(record_of(study, "qies", "100k"), lambda r: r["params"].update(non_embedding=110_000))
    assert "At 100k the arms differ by more than 1%" in page_of(study).text


def test_hostile_records_stay_text(tmp_path):
    evil = '</script><script>alert("x")</script><img src=http://evil.example/ onerror=alert(1)>'
    study = make_study(tmp_path / "hostile", arms=("transformer", "qies", evil))
    edit(study / "samples.json", lambda s: s["prompts"].__setitem__(0, evil))
    edit(study / "data/manifest.json", lambda m: m["sources"][0].update(licence=evil, name=evil))
    edit(study / "fits.json", lambda f: f["arms"]["qies"]["params"].update(warnings=[evil]))
    edit(study / "comparison.json", lambda c: c["pairs"][0].update(reason=evil, warnings=[evil], summary=evil))
    edit(study / "comparison.json", lambda c: c["pairs"][0]["paired"][0].update(test=evil))
    edit(record_of(study, "qies", "400k"), lambda r: r.update(code_version=evil, error=evil, environment={evil: evil}))
    text = build_report(study).read_text()
    page = Page(text)
    assert "img" not in page.elements
    assert page.elements.count("script") == 2 + len(page.charts)  # plotly, the page's own, and one of data a chart
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert evil in page.text  # shown, as text
    for figure in page.charts:  # plotly reads markup in names: only its entities may stand there
        names = [trace.get("name", "") for trace in figure["data"]]
        assert all("<" not in name for name in names)
    assert any(unescape(trace.get("name", "")) == evil for trace in page.charts[1]["data"])


def test_folder_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no readable run record"):
        build_report(tmp_path)
    run = tmp_path / "runs" / "abc" / "run.json"
    run.parent.mkdir(parents=True)
    run.write_text("{")
    with pytest.raises(UserError, match="no readable run record"):
        build_report(tmp_path)


def test_one_unreadable_record_is_left_out_and_said(study):
    record_of(study, "qies", "100k").write_text("{")
    assert "could not be read and is ignored" in page_of(study).text


def test_summary_figure_is_clean_svg(study, tmp_path):
    import xml.etree.ElementTree as ElementTree

    text = write_summary_svg(study, tmp_path / "loss.svg").read_text()
    root = ElementTree.fromstring(text)
    tags = [element.tag.split("}")[1] for element in root.iter()]
    [circle] = {
        e.get("id")
        for e in root.iter()
        if styles(["transformer"])["transformer"].colour.lower() in e.get("style", "") and e.get("id")
    }
    circles = [e for e in root.iter() if e.get("href") == f"#{circle}"]
    assert len(circles) == 4 + 1  # the transformer's runs and its place in the legend
    assert set(tags) <= {"svg", "title", "rect", "clipPath", "g", "path", "text", "use", "defs"}
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    for word in (
        "transformer",
        "qies",
        "no_phase",
        "non-embedding parameters",
        "validation loss (nats per token)",
        "100k",
    ):
        assert word in words
    assert len(text) < 12_000 and text.count("http") == 1  # the name space


def test_summary_figure_escapes_and_refuses(study, tmp_path):
    edit(record_of(study, "qies", "100k"), lambda r: r.update(arm="<b>&"))
    assert "&lt;b&gt;&amp;" in write_summary_svg(study, tmp_path / "loss.svg").read_text()
    for path in study.glob("runs/*/run.json"):
        edit(path, lambda r: r.update(status="running"))
    with pytest.raises(UserError, match="no finished run"):
        write_summary_svg(study, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_page_needs_no_torch():
    code = "import sys, qies.report, qies.scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
