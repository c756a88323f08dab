"""Which runs to trust: what did not finish or diverged is named and left out, what looks odd is said."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qies.scaling.fits import fit_surface
from qies.scaling.table import Dropped, Runs

Array = NDArray[np.float64]

FINISHED = {"", "done", "finished", "completed", "complete", "ok", "success", "succeeded", "converged"}
# A diverged run lies above the law by more than any noise: by 10 robust standard deviations of its arm's
# residuals of log loss, and by more than a quarter (a table of good runs at an odd place of the grid does less).
DIVERGED_SIGMAS, DIVERGED_LEAST = 10.0, math.log(1.25)
MOST_DIVERGED = 0.2  # of an arm's runs: where more stand out, that is their noise
FEWEST_FOR_A_SURFACE, FEWEST_FOR_A_LINE = 10, 5


def sound(runs: Runs, *, against_fit: bool = True) -> tuple[Runs, list[Dropped]]:
    """The runs to trust, and the others with the reason.

    Left out are runs that did not finish (by `status`), whose N, D, C or L is not finite or not positive, and, with
    `against_fit`, diverged ones: loss 25 % above that of its seeds, or of runs of the arm with no more parameters
    and tokens; and log loss far above a robust fit of the rest (approach 3 from 10 cells on, a Theil-Sen line in log C
    from 5 runs on). "Far" is 10 scaled MADs of the residuals and at least 25 %.
    """
    reasons: dict[int, str] = {}
    for i in range(len(runs)):
        if runs.status[i].lower() not in FINISHED:
            reasons[i] = f"status {runs.status[i]}"
            continue
        for what in ("loss", "params", "tokens", "flops", "weight"):
            value = float(getattr(runs, what)[i])
            if not (math.isfinite(value) and value > 0):
                reasons[i] = f"{what} is {value:g}"
                break
    if against_fit:
        for arm in runs.arms:
            index = np.array([i for i in range(len(runs)) if i not in reasons and runs.arm[i] == arm], dtype=int)
            above = _above_smaller(runs.select(index))
            reasons |= _diverged(index, above, DIVERGED_LEAST, "that of runs with no more parameters and tokens")
            index = index[above <= DIVERGED_LEAST]
            excess = _excess(runs.select(index))
            scale = 1.4826 * float(np.median(np.abs(excess - np.median(excess)))) if len(excess) else 0.0
            reasons |= _diverged(index, excess, max(DIVERGED_SIGMAS * scale, DIVERGED_LEAST), "the law of its arm")
    keep = np.array([i not in reasons for i in range(len(runs))], dtype=bool)
    return runs.select(keep), [Dropped(i, runs.name[i], reasons[i]) for i in sorted(reasons)]


def _diverged(index: NDArray[np.int_], above: Array, most: float, what: str) -> dict[int, str]:
    """The reason for each run of `index` whose log loss is by more than `most` above `what`."""
    return {
        int(i): f"diverged: loss {100 * math.expm1(much):.0f} % above {what}"
        for i, much in zip(index, above, strict=True)
        if much > most
    }


def _above_smaller(runs: Runs) -> Array:
    """log loss above the median of its seeds, from three on, and above the lowest of runs of no more N and D, [n].

    More parameters and tokens make no run much worse, whatever the law. A cell that more cells stand above than any of
    those stands above is itself too low, and shows nothing. Where more than a fifth of the runs stand out, it is noise.
    """
    y = np.log(runs.loss)
    cells, of, seeds = np.unique(
        np.stack([runs.params, runs.tokens], 1), axis=0, return_inverse=True, return_counts=True
    )
    of = of.reshape(-1)
    every = range(len(cells))
    median = np.array([np.median(y[of == c]) for c in every])

    def smaller(c: int) -> NDArray[np.bool_]:  # a row at a time: a table of whole curves has many thousand cells
        return (cells <= cells[c]).all(1) & (np.arange(len(cells)) != c)

    over = [np.flatnonzero(smaller(c) & (median[c] - median > DIVERGED_LEAST)) for c in every]
    below, most = np.zeros(len(cells)), np.zeros(len(cells))
    for under in over:
        below[under] += 1
        most[under] = np.maximum(most[under], len(under))
    low = below > most
    least = np.array([median[smaller(c) & ~low].min(initial=median[c] if seeds[c] > 2 else np.inf) for c in every])
    found = y - least[of]
    return np.full(len(y), -np.inf) if (found > DIVERGED_LEAST).sum() > MOST_DIVERGED * len(y) else found


def _excess(runs: Runs) -> Array:
    """log loss above a robust law of the runs, [n]; zero where they are too few for one."""
    cells = set(zip(runs.params, runs.tokens, strict=True))
    both_vary = all(len(set(values)) > 1 for values in zip(*cells, strict=True))
    if len(cells) >= FEWEST_FOR_A_SURFACE and both_vary:
        fit = fit_surface(runs, "approach3")
        return np.log(runs.loss) - np.log(fit.predict(runs.params, runs.tokens))
    if len(runs) < FEWEST_FOR_A_LINE:
        return np.zeros(len(runs))
    x, y = np.log(runs.flops), np.log(runs.loss)
    i, j = np.triu_indices(len(x), 1)
    apart = x[i] != x[j]
    slope = float(np.median((y[i] - y[j])[apart] / (x[i] - x[j])[apart])) if apart.any() else 0.0
    return y - slope * x - np.median(y - slope * x)


# A guess over a million tokens costs ln 1e6 = 13.8 nats: a table whose median is above is in another unit.
MOST_NATS = 13.8
# Fewer parameters or tokens than any language model has: a count in thousands, millions or billions.
FEWEST_PARAMS, FEWEST_TOKENS = 1e4, 1e5
# FLOPs a token and parameter: 6, less or more by what embeddings, attention and inactive experts do.
FLOPS_RANGE = (0.3, 120.0)
# Token budgets a size from which rows that no run is named for look like points of training curves.
LIKE_CURVES = 8


def oddities(runs: Runs) -> list[str]:
    """Plain sentences on what looks like a slip in the table, or like rows that are not independent of each other."""
    if not len(runs):
        return []
    said = []
    median = float(np.median(runs.loss))
    if median > MOST_NATS:
        said.append(f"the median loss is {median:.3g}, more than a guess costs in nats a token: it may be a perplexity")
    for what, least in (("params", FEWEST_PARAMS), ("tokens", FEWEST_TOKENS)):
        most = float(getattr(runs, what).max())
        if most < least:
            said.append(
                f"no run has more than {most:.3g} {what}: if the column counts millions or billions, give "
                f"--columns {what}=COLUMN*1e6 or *1e9"
            )
    share = float(np.median(runs.flops / (runs.params * runs.tokens)))
    if not said and not FLOPS_RANGE[0] <= share <= FLOPS_RANGE[1]:
        said.append(f"FLOPs are {share:.2g} times params times tokens, where 6 is usual: check the units of all three")
    rows = list(zip(runs.arm, runs.params, runs.tokens, runs.seed, runs.loss, runs.run, strict=True))
    if repeats := len(rows) - len(set(rows)):
        said.append(f"{repeats} rows repeat another's arm, params, tokens, seed and loss, and count as further seeds")
    return [*runs.notes, *said, *_curves(runs)]


def _curves(runs: Runs) -> list[str]:
    """Whether rows are points of training curves."""
    runs_named = len({r for r in runs.run if r}) + sum(not r for r in runs.run)
    if runs_named < len(runs):
        return [
            f"the rows are points of {runs_named} training curves, and those of one curve are not independent: a "
            "bootstrap of runs resamples whole curves; t intervals, tests and likelihoods take every point for a run"
        ]
    if any(runs.run):
        return []
    budgets: dict[tuple[str, float, int], set[float]] = {}
    for arm, n, seed, d in zip(runs.arm, runs.params, runs.seed, runs.tokens, strict=True):
        budgets.setdefault((arm, float(n), int(seed)), set()).add(float(d))
    mean = float(np.mean([len(b) for b in budgets.values()]))
    if mean < LIKE_CURVES:
        return []
    return [
        f"every size has {mean:.2g} token counts on average: if they are points of one training curve, they are not "
        "independent; name the run of each row with --columns run=COLUMN, and intervals resample whole runs"
    ]
