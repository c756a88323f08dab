"""Runs of two arms made from known laws."""

import numpy as np

from qies.scaling.tables.runs import Runs

E, A, B, ALPHA, BETA = 1.8, 60.0, 400.0, 0.30, 0.34
SIZES = np.array([1e6, 3e6, 1e7, 3e7])
RATIOS = np.array([5.0, 10.0, 20.0, 40.0, 80.0])


def chinchilla(n, d, e=E, a=A, b=B, alpha=ALPHA, beta=BETA):
    """Loss of a surface, nats per token."""
    return e + a * n**-alpha + b * d**-beta


def grid(sizes=SIZES, ratios=RATIOS):
    """[cells, 2] of (N, D): every size at the token budgets of the middle size's ratios."""
    budgets = np.median(sizes) * ratios
    return np.array([(n, d) for n in sizes for d in budgets])


def ladder(sizes=SIZES, ratio=20.0):
    """[cells, 2]: one token budget a size."""
    return np.stack([sizes, ratio * sizes], axis=1)


def table(cells, losses, seeds=1, flops=None, seconds=None):
    """Runs from {arm: [cells, seeds] losses}; flops and seconds {arm: [cells]}, 6ND and unknown by default."""
    rows = []
    for arm, values in losses.items():
        for i, (n, d) in enumerate(cells):
            for s in range(seeds):
                c = 6 * n * d if flops is None else flops[arm][i]
                t = np.nan if seconds is None else seconds[arm][i]
                rows.append((n, d, c, values[i, s], arm, s, t))
    n, d, c, loss, arm, seed, t = zip(*rows, strict=True)
    return runs_of(n, d, c, loss, arm, seed, t)


def noisy(rng, law, seeds, seed_sd=0.0, shared_sd=0.0, cell_sd=0.0, size_sd=0.0, cells=None):
    """Two arms' losses [cells, seeds] from their noise-free ones {arm: [cells]}, with deviations in log loss.

    `shared_sd` moves both arms of a cell and seed alike, `seed_sd` each run, `cell_sd` each arm's (size, tokens) cell,
    `size_sd` all cells of an arm's size in `cells` [cells, 2] alike.
    """
    shape = (len(next(iter(law.values()))), seeds)
    size = np.arange(shape[0]) if cells is None else np.unique(cells[:, 0], return_inverse=True)[1]
    common = shared_sd * rng.standard_normal(shape)
    return {
        arm: values[:, None]
        * np.exp(
            common
            + size_sd * rng.standard_normal(shape[0])[size][:, None]
            + cell_sd * rng.standard_normal((shape[0], 1))
            + seed_sd * rng.standard_normal(shape)
        )
        for arm, values in law.items()
    }


def runs_of(params, tokens, flops, loss, arm, seed, seconds):
    count = len(loss)
    return Runs(
        params=np.array(params, float),
        tokens=np.array(tokens, float),
        flops=np.array(flops, float),
        loss=np.array(loss, float),
        arm=tuple(arm),
        seed=np.array(seed, np.int64),
        weight=np.ones(count),
        wall_seconds=np.array(seconds, float),
        status=("done",) * count,
        name=tuple(f"run {i}" for i in range(count)),
        run=("",) * count,
        convention="6ND",
    )
