"""The protocol that every result shares, and which part of the package may import which."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scaling_tables import grid, law, make_runs, noisy
from two_arms import chinchilla, ladder, table

import qies.scaling
from qies.plotting import Figure
from qies.scaling import (
    compare,
    compare_forms,
    fit_approach1,
    fit_downstream,
    fit_power,
    fit_surface,
    leave_largest_out,
)
from qies.scaling.result import Result, paragraph, plain

PACKAGE = Path(qies.scaling.__file__).parent
X = np.geomspace(1e5, 1e8, 6)


def surface_runs():
    n, d = grid(4, 4)
    return make_runs(n, d, noisy(np.random.default_rng(0), law(n, d), 0.003))


def arms():
    design = ladder()
    return table(design, {arm: gain * chinchilla(*design.T)[:, None] for arm, gain in (("a", 0.99), ("b", 1.0))})


@pytest.mark.parametrize(
    "make",
    [
        lambda: fit_power(X, 20 * X**-0.1),
        lambda: fit_surface(surface_runs()),
        lambda: fit_approach1(surface_runs()),
        lambda: fit_downstream(X / 1e8, 1 / (1 + np.exp(3 * (X / 1e8 - 0.5)))),
        lambda: compare_forms(surface_runs(), ("approach3", "gadre")),
        lambda: leave_largest_out(surface_runs(), "approach3", 1),
        lambda: compare(arms(), "a", "b"),
    ],
    ids=["power", "surface", "approach1", "downstream", "forms", "held-out", "comparison"],
)
def test_every_result_is_json_a_paragraph_and_figures(make):
    result = make()
    assert isinstance(result, Result)
    stored = result.to_dict()
    assert json.loads(json.dumps(stored, allow_nan=False)) == stored
    assert {f.name for f in dataclasses.fields(result) if not f.name.startswith("_")} <= stored.keys()
    assert result.summary().endswith(".") and all(w[1:] in result.summary() for w in stored.get("warnings", []))
    shown = result.figures()
    assert shown and all(isinstance(figure, Figure) for figure in shown.values())


def test_plain_values_are_json():
    @dataclasses.dataclass
    class Inner:
        shown: float
        _hidden: int = 0

    value = {"a": (1, float("inf")), "b": np.array([0.5, np.nan]), "c": Inner(2.0), "d": True}
    assert plain(value) == {"a": [1, None], "b": [0.5, None], "c": {"shown": 2.0}, "d": True}
    assert paragraph(["fit 1", "two"], ["a warning"]) == "fit 1. two. A warning."


@pytest.mark.parametrize(
    ("part", "above"),
    [("tables", ("laws", "comparison", "figures", "pipeline")), ("laws", ("comparison", "pipeline")),
     ("comparison", ("pipeline",))],
)  # fmt: skip
def test_tables_know_no_laws_and_laws_no_comparison(part, above):
    for path in (PACKAGE / part).glob("*.py"):
        found = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [m for m in found if m.startswith(tuple(f"qies.scaling.{name}" for name in above))], path


def test_importing_the_package_draws_nothing():
    code = "import sys, qies.scaling; sys.exit(bool({'torch', 'matplotlib', 'plotly'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
