"""Runs made from a known law, and the published tables where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from qies.scaling.tables.runs import Runs

CHINCHILLA = {"E": 1.82, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}


def law(n, d, p=CHINCHILLA):
    return p["E"] + (p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]) ** p.get("gamma", 1.0)


def make_runs(params, tokens, loss, **columns):
    n = len(loss)
    given = {
        "flops": 6 * params * tokens,
        "arm": ("",) * n,
        "seed": np.zeros(n, np.int64),
        "weight": np.ones(n),
        "wall_seconds": np.full(n, np.nan),
        "status": ("",) * n,
        "name": tuple(f"row {i + 1}" for i in range(n)),
        "run": ("",) * n,
        "convention": "6ND",
        **columns,
    }
    return Runs(
        params=np.asarray(params, float), tokens=np.asarray(tokens, float), loss=np.asarray(loss, float), **given
    )


def grid(sizes=6, ratios=5, low=2e7, high=5e9):
    """Sizes by tokens per parameter, the usual design: N, D [sizes * ratios]."""
    n, m = np.meshgrid(np.geomspace(low, high, sizes), np.geomspace(2, 200, ratios))
    return n.reshape(-1), (n * m).reshape(-1)


def noisy(rng, loss, scatter):
    return loss * np.exp(scatter * rng.standard_normal(len(loss)))


def published(name):
    """A table of the folder `shared` beside the checkout, or where QIES_SHARED points."""
    shared = Path(os.environ.get("QIES_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    path = shared / "published_fits" / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand: put the published tables beside the checkout or set QIES_SHARED")
    return path
