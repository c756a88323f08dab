"""A comparison says whether in-context copying had set in in both arms."""

import dataclasses

import numpy as np
import pytest
from scaling_tables import make_runs

from qies.scaling import compare, read_runs
from qies.scaling.comparison.copying import Copying, before_onset, set_in

SIZES = np.geomspace(1e5, 8e5, 4)


def two_arms(score: dict[str, float], lead: float = 1.0):
    n = np.tile(np.repeat(SIZES, 2), 2)
    arm = tuple(["q"] * 8 + ["t"] * 8)
    induction = np.array([score[a] * (1 + 0.1 * s) for a, s in zip(arm, [0, 1] * 8, strict=True)])
    induction[n < 7e5] = 0.0  # it sets in at the largest size alone
    loss = 30 * (n * n) ** -0.06 * np.where(np.arange(16) % 2, 1.001, 0.999)
    loss[8:] *= lead
    runs = make_runs(n, 10 * n, loss, arm=arm, seed=np.array([0, 1] * 8))
    onset = np.where(np.arange(16) % 2, np.nan, 4e6)
    return dataclasses.replace(runs, induction=induction, induction_onset=onset)


def test_both_arms_copy():
    result = compare(two_arms({"q": 1.0, "t": 0.8}), "q", "t")
    found = result.to_dict()["copying"]
    assert found["threshold"] == 0.5 and found["set_in"] is True
    assert found["arms"]["q"]["scores"] == pytest.approx([1.0, 1.1]) and found["arms"]["t"]["mean"] == pytest.approx(
        0.84
    )
    assert found["arms"]["q"]["seeds"] == ["0", "1"] and found["arms"]["q"]["onsets"] == [4e6, None]
    assert "Copying had set in in both arms" in result.summary() and "q 1.05, t 0.84" in result.summary()
    assert "No headline" not in result.summary() and "in-context" not in result.reason


@pytest.mark.parametrize("other", [1.0, 0.3])
def test_a_win_before_copying_has_set_in_is_no_headline(other):
    """By the mean over seeds, 0.5, copying would have set in in t; one of its seeds does not copy yet."""
    runs = two_arms({"q": other, "t": 0.4762}, lead=1.05)
    result = compare(runs, "q", "t")
    late = ["q (gain 0.30 nats < 0.5 in 2 of 2 seeds)"] * (other < 0.5) + ["t (gain 0.48 nats < 0.5 in 1 of 2 seeds)"]
    clause = f"in-context copying had not set in in {' and '.join(late)}"
    assert result.verdict == "q wins" and result.reason.endswith(f"excludes 1, but {clause}")
    assert result.summary().startswith("No headline; at these budgets q wins: ")
    assert result.to_dict()["copying"]["set_in"] is False


def test_a_missing_score_leaves_it_unknown():
    runs = two_arms({"q": 1.0, "t": 1.0})
    scores = np.where(np.arange(16) == 7, np.nan, runs.induction)
    result = compare(dataclasses.replace(runs, induction=scores), "q", "t")
    assert result.to_dict()["copying"]["set_in"] is None and result.copying["q"].scores == (1.0, None)
    assert "whether copying had set in is unknown" in result.summary()


def test_without_scores_nothing_is_said():
    result = compare(dataclasses.replace(two_arms({"q": 1.0, "t": 1.0}), induction=None), "q", "t")
    assert result.to_dict()["copying"] is None and "copying" not in result.summary()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((0.5, 2.0), True), ((0.49, 2.0), False), ((0.5, None), None), ((0.2, None), False), ((None,), None), ((), None)],
)
def test_the_rule_asks_every_seed(scores, expected):
    arm = Copying("q", tuple(map(str, range(len(scores)))), scores, (None,) * len(scores))
    sure = Copying("t", ("0",), (3.0,), (1e6,))
    assert arm.set_in is expected and set_in([arm, sure]) is expected
    assert bool(before_onset([arm, sure])) is (expected is False)


def test_scores_come_from_records_and_tables(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("params,tokens,loss,arm,induction\n1e5,1e6,4.0,q,0.7\n1e5,1e6,4.0,t,\n")
    scores = read_runs(table).induction
    assert scores is not None and scores[0] == 0.7 and np.isnan(scores[1])
