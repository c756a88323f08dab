"""`qies fit` and `qies compare`: --best-per-cell and --power."""

import json

import numpy as np
import pytest
from scaling_tables import grid, law
from two_arms import ladder, noisy

from qies.cli import main
from qies.scaling.comparison import planning


def ends_well(words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0


def test_fit_takes_the_best_of_a_sweep(tmp_path):
    n, d = grid(6, 5)
    rows = ["params,tokens,loss"]
    rows += [f"{a:.6g},{b:.6g},{law(a, b) * worse:.8f}" for a, b in zip(n, d, strict=True) for worse in (1.04, 1, 1.1)]
    path, out = tmp_path / "sweep.csv", tmp_path / "fit.json"
    path.write_text("\n".join(rows))
    ends_well(["fit", str(path), "--json", str(out)])
    assert any("--best-per-cell" in w for w in json.loads(out.read_text())["warnings"])
    ends_well(["fit", str(path), "--best-per-cell", "--json", str(out)])
    fit = json.loads(out.read_text())
    assert fit["n"] == 30 and fit["params"]["E"] == pytest.approx(1.82, rel=1e-3)
    assert not any("--best-per-cell" in w for w in fit["warnings"])


def test_compare_prints_and_stores_the_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "power", lambda sizes, seeds, gain, *_: 0.25)
    cells = ladder()
    base = 30 * (6 * cells.prod(axis=1)) ** -0.06
    losses = noisy(np.random.default_rng(0), {"q": base, "t": base}, 2, seed_sd=0.003)
    rows = ["arm,seed,params,tokens,loss"]
    for arm, values in losses.items():
        rows += [f"{arm},{s},{n},{d},{values[i, s]}" for i, (n, d) in enumerate(cells) for s in range(2)]
    path, out = tmp_path / "runs.csv", tmp_path / "out.json"
    path.write_text("\n".join(rows))
    ends_well(["compare", str(path), "--arms", "q", "t", "--power", "--json", str(out)])
    plan = json.loads(out.read_text())["plan"]
    assert plan["gains"] == [1.1, 1.2, 1.3] and plan["rows"][0] == {"sizes": 3, "seeds": 1, "found": [0.25] * 3}
    printed = capsys.readouterr().out
    assert "gain 1.2" in printed and "25 %" in printed
