"""A comparison says whether in-context copying had set in in both arms."""

import dataclasses

import numpy as np
import pytest
from scaling_tables import make_runs

from qies.scaling import compare, read_runs

SIZES = np.geomspace(1e5, 8e5, 4)


def two_arms(score: dict[str, float]):
    n = np.tile(np.repeat(SIZES, 2), 2)
    arm = tuple(["q"] * 8 + ["t"] * 8)
    induction = np.array([score[a] * (1 + 0.1 * s) for a, s in zip(arm, [0, 1] * 8, strict=True)])
    induction[n < 7e5] = 0.0  # it sets in at the largest size alone
    loss = 30 * (n * n) ** -0.06 * np.where(np.arange(16) % 2, 1.001, 0.999)
    runs = make_runs(n, 10 * n, loss, arm=arm, seed=np.array([0, 1] * 8))
    return dataclasses.replace(runs, induction=induction)


def test_both_arms_copy():
    result = compare(two_arms({"q": 1.0, "t": 0.8}), "q", "t")
    assert result.copying == pytest.approx({"q": 1.05, "t": 0.84})
    assert "In-context copying had set in in both arms" in result.summary() and "q 1.05, t 0.84" in result.summary()
    assert result.to_dict()["copying"] == result.copying


def test_one_arm_that_does_not_copy_yet_makes_no_headline():
    summary = compare(two_arms({"q": 1.0, "t": 0.2}), "q", "t").summary()
    assert "In-context copying had not set in in t, so this is no headline" in summary


@pytest.mark.parametrize("missing", ["column", "cell"])
def test_without_scores_nothing_is_said(missing):
    runs = two_arms({"q": 1.0, "t": 1.0})
    scores = None if missing == "column" else np.where(np.arange(16) == 7, np.nan, runs.induction)
    result = compare(dataclasses.replace(runs, induction=scores), "q", "t")
    assert result.copying is None and "copying" not in result.summary()


def test_scores_come_from_records_and_tables(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("params,tokens,loss,arm,induction\n1e5,1e6,4.0,q,0.7\n1e5,1e6,4.0,t,\n")
    scores = read_runs(table).induction
    assert scores is not None and scores[0] == 0.7 and np.isnan(scores[1])
