"""What is left out of a table with its reason, and what is said of the rest."""

import re

import numpy as np
import pytest
from scaling_tables import grid, law, make_runs, noisy

from qies.scaling import sound
from qies.scaling.tables.filtering import best_per_cell, oddities


def test_unfinished_and_impossible_runs_are_left_out_with_the_reason():
    n, d = grid()
    loss = law(n, d)
    loss[1], loss[2] = np.nan, -1.0
    n[3] = 0.0
    status = ["done"] * len(n)
    status[4], status[5] = "failed", "Running"
    kept, dropped = sound(make_runs(n, d, loss, status=tuple(status)))
    assert [d.index for d in dropped] == [1, 2, 3, 4, 5]
    assert [d.reason for d in dropped] == [
        "loss is nan",
        "loss is -1",
        "params is 0",
        "status failed",
        "status Running",
    ]
    assert len(kept) == len(n) - 5


@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0])
def test_diverged_runs_are_found_against_the_fit(factor):
    rng = np.random.default_rng(2)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.01)
    loss[[7, 29]] *= factor
    kept, dropped = sound(make_runs(n, d, loss))
    assert [d.index for d in dropped] == [7, 29]
    assert all("diverged" in d.reason for d in dropped) and len(kept) == 28


def test_a_diverged_run_among_few_is_found_against_a_line_in_compute():
    n = np.geomspace(1e6, 1e8, 6)
    loss = 20 * n**-0.1
    loss[4] *= 2
    _, dropped = sound(make_runs(n, 20 * n, loss))
    assert [d.index for d in dropped] == [4]


@pytest.mark.parametrize("bad", range(12))
def test_a_diverged_seed_on_a_wide_ladder_is_found(bad):
    """Few sizes far apart: the law's curvature around a line in log C hides it, its own seeds do not."""
    n = np.repeat([1e6, 1e7, 1e8, 1e9], 3)
    loss = noisy(np.random.default_rng(bad), law(n, 20 * n), 0.005)
    loss[bad] *= 1.6
    _, dropped = sound(make_runs(n, 20 * n, loss))
    assert [d.index for d in dropped] == [bad]


def test_runs_of_the_largest_size_that_all_diverged_are_found():
    n, tokens = np.repeat([1e6, 1e7, 3e7, 1e8, 1e9], 3), np.tile([5.0, 20.0, 80.0], 5)
    loss = noisy(np.random.default_rng(0), law(n, tokens * n), 0.005)
    loss[12:] *= 2
    _, dropped = sound(make_runs(n, tokens * n, loss))
    assert [d.index for d in dropped] == [12, 13, 14]
    assert "above that of runs with no more parameters and tokens" in dropped[0].reason


def test_a_run_that_is_too_low_condemns_no_other():
    n, d = grid(4, 3)
    loss = noisy(np.random.default_rng(0), law(n, d), 0.005)
    loss[0] *= 0.2
    assert sound(make_runs(n, d, loss))[1] == []


@pytest.mark.parametrize("scatter", [0.001, 0.01, 0.05])
def test_good_runs_stay(scatter):
    rng = np.random.default_rng(5)
    n, d = grid(8, 6)
    arms = ("a",) * len(n) + ("b",) * len(n)
    loss = np.concatenate([noisy(rng, law(n, d), scatter), noisy(rng, 1.3 * law(n, d), scatter)])
    _, dropped = sound(make_runs(np.tile(n, 2), np.tile(d, 2), loss, arm=arms))
    assert dropped == []


def test_one_size_at_many_budgets_is_searched_along_a_line():
    d = np.geomspace(1e9, 1e11, 12)
    loss = 20 * d**-0.1
    loss[6] *= 3
    _, dropped = sound(make_runs(np.full(12, 1e8), d, loss))
    assert [run.index for run in dropped] == [6]


def test_nothing_is_said_of_an_ordinary_table():
    n, d = grid()
    assert oddities(make_runs(n, d, law(n, d))) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n, d, y: (n, d, np.exp(y) * 5, {}), "it may be a perplexity"),
        (lambda n, d, y: (n / 1e9, d, y, {}), "more than 5 params: if the column counts millions"),
        (lambda n, d, y: (n, d / 1e9, y, {}), "more than 1e\\+03 tokens: if the column counts"),
        (lambda n, d, y: (n, d, y, {"flops": 6e-18 * n * d}), "FLOPs are 6e-18 times params times tokens"),
        (lambda n, d, y: (np.append(n, n[:2]), np.append(d, d[:2]), np.append(y, y[:2]), {}), "2 rows repeat"),
        (lambda n, d, y: (n, d, y, {"run": tuple(f"{v:g}" for v in n)}), "points of 6 training curves"),
    ],
)
def test_slips_are_said(change, says):
    n, d = grid()
    n, d, loss, columns = change(n, d, law(n, d))
    [said] = oddities(make_runs(n, d, loss, **columns))
    assert re.search(says, said)


def test_many_budgets_a_size_may_be_curves():
    n, d = grid(4, 8)
    assert "--columns run=COLUMN" in oddities(make_runs(n, d, law(n, d)))[0]
    assert oddities(make_runs(n, d, law(n, d), run=tuple(map(str, range(32))))) == []


def too_large_for_their_tokens(rng):
    """Ten sizes at twelve budgets: models with far more parameters than tokens are worse than smaller ones."""
    n, d = (v.reshape(-1) for v in np.meshgrid(np.geomspace(1e6, 1e9, 10), np.geomspace(1e7, 1e11, 12)))
    return n, d, noisy(rng, law(n, d) * (1 + n / d / 5) ** 0.3, 0.005)


def repeated_data(rng):
    """Eight sizes, three amounts of unique tokens, 1 to 256 epochs: beyond some epochs the larger models overfit."""
    n, unique, epochs = (
        v.reshape(-1) for v in np.meshgrid(np.geomspace(1e7, 4e9, 8), [1e8, 3e8, 1.5e9], 2.0 ** np.arange(9))
    )
    worth = unique * (1 + 15 * (1 - np.exp(-(epochs - 1) / 15)))
    overfit = (1 + epochs / 40 * (n / unique) ** 0.5) ** 0.25
    return n, unique * epochs, noisy(rng, law(n, worth) * overfit, 0.005)


def hyperparameter_sweep(rng):
    """Twelve (N, D) with 60 learning rates and batch sizes each, of which the worst double the loss."""
    n, d = (np.repeat(v, 60) for v in grid(4, 3))
    off = np.abs(rng.standard_normal(len(n))) * 1.2
    return n, d, noisy(rng, law(n, d) * (1 + 0.03 * off**2 + 0.02 * off**4), 0.003)


UNUSUAL = [too_large_for_their_tokens, repeated_data, hyperparameter_sweep]


@pytest.mark.parametrize("table", UNUSUAL)
@pytest.mark.parametrize("seed", [0, 1])
def test_healthy_runs_of_unusual_tables_stay(table, seed):
    n, d, loss = table(np.random.default_rng(seed))
    assert loss.max() / law(n, d)[loss.argmax()] > 1.5
    assert sound(make_runs(n, d, loss))[1] == []


@pytest.mark.parametrize("table", UNUSUAL[:2])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.8])
def test_a_run_that_diverged_in_such_a_table_is_found(table, place):
    n, d, loss = table(np.random.default_rng(2))
    usual = np.flatnonzero(loss < 1.05 * law(n, d))
    bad = int(usual[np.argsort((n * d)[usual], kind="stable")[int(place * len(usual))]])
    loss[bad] *= 2
    assert [run.index for run in sound(make_runs(n, d, loss))[1]] == [bad]


def test_a_cell_of_a_sweep_whose_best_run_diverged_is_found():
    n, d, loss = hyperparameter_sweep(np.random.default_rng(3))
    last = np.flatnonzero((n == n.max()) & (d == d[n == n.max()].max()))
    loss[last] *= 2
    assert [run.index for run in sound(make_runs(n, d, loss))[1]] == [last[loss[last].argmin()]]


def test_a_sweep_is_named_and_its_best_runs_are_taken_on_request():
    n, d, loss = hyperparameter_sweep(np.random.default_rng(0))
    runs = make_runs(n, d, loss, arm=("a", "b") * (len(n) // 2))
    assert "at 24 (N, D) several rows have one seed" in oddities(runs)[0]
    best = runs.select(best_per_cell(runs))
    assert len(best) == 24 and oddities(best) == []
    for arm in "ab":
        own, left = runs.of_arm(arm), best.of_arm(arm)
        for i in range(12):
            assert left.loss[i] == own.loss[(own.params == left.params[i]) & (own.tokens == left.tokens[i])].min()


def test_rows_of_other_unique_tokens_are_neither_seeds_nor_a_sweep():
    n, d = (np.repeat(v, 4) for v in grid())
    unique = d / np.tile([1, 2, 4, 8], 30)
    loss = law(n, d) * np.tile([1.0, 1.02, 1.05, 1.1], 30)
    runs = make_runs(n, d, loss, unique=unique)
    assert oddities(runs) == [] and len(best_per_cell(runs)) == 120
    assert oddities(make_runs(n, d, loss)) != []


@pytest.mark.parametrize("numbered", [False, True])
def test_the_columns_of_a_sweep_are_named(numbered):
    """A column that only repeats the seed's number is none, nor is one that does not vary inside a cell."""
    n, d = (np.repeat(v, 3) for v in grid())
    which = np.tile([0, 1, 2], 30)
    loss = noisy(np.random.default_rng(0), law(n, d), 0.003)
    size, again = tuple(f"{v:.0e}" for v in n), tuple(f"s{i}" for i in which)
    rate = tuple(str(1e-3 * (1 + (i + j // 3) % 3)) for j, i in enumerate(which))
    seed = which if numbered else np.zeros(90, np.int64)
    runs = make_runs(n, d, loss, seed=seed, settings={"size": size, "lr": rate, "again": again})
    [said] = oddities(runs)
    assert f"differ in 'lr'{'' if numbered else ', ' + repr('again')}, and count as further seeds" in said
    assert "--best-per-cell" in said and oddities(runs.select(best_per_cell(runs))) == []


def test_seeds_are_no_sweep_unless_they_differ_too_much():
    n, d = (np.repeat(v, 3) for v in grid())
    seed = np.tile([0, 1, 2], 30)
    rng = np.random.default_rng(0)
    assert oddities(make_runs(n, d, noisy(rng, law(n, d), 0.005), seed=seed)) == []
    [said] = oddities(make_runs(n, d, noisy(rng, law(n, d), 0.1), seed=seed))
    assert "more than seeds do" in said
