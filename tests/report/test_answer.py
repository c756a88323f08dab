"""The first screen: the answer in words, for every outcome, from records with and without induction scores."""

import json

import pytest
from study_pages import Page, edit, make_study, page_of, runs_of

from qies.analyses.records import read_study
from qies.report import build_report
from qies.report.answer import answer, positions
from qies.report.verdict import verdict
from qies.scaling import compare, read_runs


def rows_of(folder):
    found = answer(read_study(folder))
    return found.headline, {question: reply for question, reply in found.rows}


def pair_of(folder, change):
    """Change the stored comparison of qies with the transformer."""
    edit(folder / "comparison.json", lambda c: change(c["pairs"][0]))


@pytest.fixture
def seeds(tmp_path):
    return make_study(tmp_path / "seeds", seeds=(0, 1, 2))


def test_the_answer_and_its_chart_stand_before_the_navigation(study):
    text = build_report(study).read_text()
    first = Page(text[: text.index("<nav")])
    headline, rows = rows_of(study)
    assert headline in first.text and len(rows) == 6
    assert all(question in first.text and reply in first.text for question, reply in rows.items())
    assert [c["layout"]["yaxis"]["title"]["text"] for c in first.charts] == ["gain (times the FLOPs, same loss)"]


def test_exponents_gains_and_design_are_those_of_the_records(seeds):
    _, rows = rows_of(seeds)
    fits = json.loads((seeds / "fits.json").read_text())["arms"]
    pair = json.loads((seeds / "comparison.json").read_text())["pairs"][0]
    for arm in ("qies", "transformer"):
        fit = fits[arm]["flops"]
        low, high = fit["ci"]["alpha"]
        assert f"{arm} {fit['params']['alpha']:.4f} (95% CI {low:.4f} to {high:.4f})" in rows["Does qies scale better?"]
    last, params = pair["gain"]["at_largest"], pair["gain"]["params"]
    for point in (last, params):
        assert f"{point['gain']:#.3g} (95% CI {point['lo']:#.3g} to {point['hi']:#.3g})" in rows["By how much?"]
    sure = rows["How sure is it?"]
    assert f"{pair['verdict'].replace('no d', 'No d')}: {pair['reason']}." in sure
    assert "3 seeds per arm and size, 4 sizes, 24 runs, 2 degrees of freedom per law." in sure
    assert f"{pair['power']['detectable']:.3g} or more" in sure and f"(have {pair['power']['cells']})" in sure


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [
        ("qies wins", "qies wins: it needs less compute than transformer for the same loss."),
        ("transformer wins", "The baseline wins: transformer needs less compute than qies for the same loss."),
        ("no difference", "No significant difference between qies and transformer."),
    ],
)
def test_every_verdict_has_a_plain_headline(study, verdict, headline):
    pair_of(study, lambda p: p.update(verdict=verdict))
    assert rows_of(study)[0] == headline


@pytest.mark.parametrize(
    ("p", "ours", "reply"),
    [
        (0.2, 0.08, "Not shown: alpha not significantly different (F(1, 2) = 21.9, p = 0.2)."),
        (0.04, 0.08, "Yes: its exponent is significantly larger (F(1, 2) = 21.9, p = 0.04)."),
        (0.04, 0.06, "No: the exponent of transformer is significantly larger (F(1, 2) = 21.9, p = 0.04)."),
        (None, 0.08, "Unknown: no test of equal exponents."),
    ],
)
def test_scaling_better_is_what_the_test_of_the_exponents_says(study, p, ours, reply):
    separate = {"qies": {"alpha": ours}, "transformer": {"alpha": 0.07}}
    test = {"shared": ["alpha"], "statistic": 21.9, "p": p, "restrictions": 1, "dof": 2.0, "separate": separate}
    pair_of(study, lambda pair: pair.update(shared_fit=test))
    assert rows_of(study)[1]["Does qies scale better?"].startswith(reply)


def test_regime_comes_from_the_runs(study):
    assert rows_of(study)[1]["In which regime?"] == (
        "50k, 100k, 200k, 400k non-embedding parameters; 6 tokens per parameter; context of 512 tokens; corpus builtin."
    )


def test_the_baseline_is_named_with_its_positions(study):
    assert rows_of(study)[1]["Which baseline?"] == (
        "transformer: RoPE base 1e6, short convolution on the keys (4 taps). "
        "qies: no position embedding (NoPE), short convolution on the input (4 taps)."
    )


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"position": "rope", "rope_theta": 500.0, "rope_fraction": 0.5}, "RoPE base 5e2 on 50% of each head"),
        (
            {"position": "rope", "rope_theta": 1e4, "nope_interval": 4},
            "RoPE base 1e4, NoPE in every 4th attention layer",
        ),
        ({"position": "learned", "attention_conv_size": 0}, "learned position embedding, no short convolution"),
        (
            {"position": "none", "conv_size": 3, "layer_types": ["linear_attention"]},
            "no position embedding (NoPE); entanglement layers with short convolution on the input (3 taps)",
        ),
        ({"position": "none", "conv_size": 3, "layer_types": ["full_attention"]}, "no position embedding (NoPE)"),
        ({"position": "none", "conv_size": 3, "layer_types": ["not_registered"]}, "no position embedding (NoPE)"),
    ],
)
def test_positions_in_words(model, words):
    assert positions(model) == words


def test_copying_in_every_seed_of_both_arms_is_told_with_gain_and_onset(seeds):
    assert rows_of(seeds)[1]["Had in-context copying set in?"].startswith(
        "Yes. Gain on a repeated random segment at 400k, nats per token: "
        "transformer 2.10 (2.00 to 2.20), onset in tokens seed 0: 1.2M, seed 1: 1.2M, seed 2: 1.2M, qies 2.10"
    )


def test_a_seed_without_a_score_leaves_copying_unknown(seeds):
    path = next(p for p in runs_of(seeds, "qies") if json.loads(p.read_text())["seed"] == 1)
    edit(path, lambda r: [r["metrics"].pop(key) for key in ("induction", "induction_onset")])
    reply = rows_of(seeds)[1]["Had in-context copying set in?"]
    assert reply.startswith("Not known in every run.") and "seed 1: not measured, seed 2: 1.2M" in reply


def test_a_reason_that_names_the_arms_is_not_said_twice(study):
    [path] = runs_of(study, "no_phase")
    edit(path, lambda r: r["metrics"].update(induction=0.2, induction_onset=None))
    pair = compare(read_runs(study / "runs"), "no_phase", "transformer").to_dict()
    edit(study / "comparison.json", lambda c: c["pairs"].__setitem__(1, pair))
    [said] = [line for line in verdict(read_study(study)) if line.startswith("no_phase against transformer")]
    assert said.count("had not set in") == 1


def test_one_degree_of_freedom_is_singular(study):
    edit(study / "fits.json", lambda f: [fit["flops"].update(dof=1) for fit in f["arms"].values()])
    assert "8 runs, 1 degree of freedom per law." in rows_of(study)[1]["How sure is it?"]


@pytest.mark.parametrize("arm", ["qies", "transformer"])
def test_there_is_no_headline_before_copying_has_set_in_in_both_arms(seeds, arm):
    first, second, _ = runs_of(seeds, arm)
    edit(first, lambda r: r["metrics"].update(induction=0.3, induction_onset=None))
    headline, rows = rows_of(seeds)
    assert (
        headline == f"No headline: in-context copying had not set in in {arm} (gain 0.30 nats < 0.5 in 1 of 3 seeds)."
    )
    assert rows["Had in-context copying set in?"].startswith("No.")
    edit(second, lambda r: r["metrics"].update(induction=0.5))  # the onset itself counts
    assert rows_of(seeds)[0] == headline


def test_the_verdicts_of_other_pairs_carry_the_same_condition(study):
    [path] = runs_of(study, "no_phase")
    edit(path, lambda r: r["metrics"].update(induction=0.2, induction_onset=None))
    assert ", but in-context copying had not set in in no_phase (gain 0.20 nats < 0.5)." in page_of(study).text
    assert not rows_of(study)[0].startswith("No headline")


def test_copying_at_smaller_sizes_alone_does_not_decide(study):
    [path] = runs_of(study, "transformer", "200k")
    edit(path, lambda r: r["metrics"].update(induction=0.1, induction_onset=None))
    assert not rows_of(study)[0].startswith("No headline")
    [path] = runs_of(study, "transformer")
    edit(path, lambda r: r["metrics"].update(induction=0.1, induction_onset=None))
    assert rows_of(study)[0].endswith("had not set in in transformer (gain 0.10 nats < 0.5).")


def test_old_records_make_a_page_that_says_what_is_not_recorded(study):
    for path in study.glob("runs/*/run.json"):
        edit(
            path, lambda r: [r.pop("model"), r.update(config={}), [r["metrics"].pop(k) for k in list(r["metrics"])[2:]]]
        )
        steps = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
        [row.pop("induction", None) for row in steps]
        path.with_name("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    page, (headline, rows) = page_of(study), rows_of(study)
    assert headline in page.text and "Induction gain" not in page.text and "is left out" not in page.text
    assert rows["Had in-context copying set in?"].startswith("Not recorded.")
    assert rows["Which baseline?"] == "transformer: not recorded. qies: not recorded."
    assert rows["In which regime?"].endswith("context not recorded; corpus not recorded.")


def test_induction_section_holds_means_ranges_and_onsets_by_seed(seeds):
    path = next(p for p in runs_of(seeds, "qies") if json.loads(p.read_text())["seed"] == 1)
    edit(path, lambda r: r["metrics"].update(induction_onset=None))
    page = page_of(seeds)
    assert "qies 400k 2.10 (2.00 to 2.20) seed 0: 1.2M, seed 1: not reached, seed 2: 1.2M" in page.text
    [figure] = [c for c in page.charts if c["layout"]["yaxis"]["title"]["text"].startswith("gain on the repeat")][-1:]
    [line] = [t for t in figure["data"] if t["mode"] == "lines+markers" and t["x"] != [None] and t["name"] == "qies"]
    assert line["x"] == [600000, 1200000, 1800000, 2400000]
    assert line["y"] == pytest.approx([2.1 / 4, 2.1 / 2, 2.1 * 3 / 4, 2.1])
    assert line["customdata"][-1] == " (2 to 2.2)"
