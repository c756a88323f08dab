"""`qies fit` from a file to JSON: the contract, what is left out, and bad input in one line."""

import json

import numpy as np
import pytest
from scaling_tables import grid, law, noisy

from qies import cli


def call(*argv):
    with pytest.raises(SystemExit) as e:
        cli.main(["fit", *map(str, argv)])
    return e.value.code or 0


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    n, d = grid()
    loss = noisy(rng, law(n, d), 0.003)
    loss[8] = np.nan
    loss[20] *= 3
    path = tmp_path / "runs.csv"
    rows = [
        f'"{a:,.0f}",{b},{c},{"qies" if i < 30 else "x"}' for i, (a, b, c) in enumerate(zip(n, d, loss, strict=True))
    ]
    path.write_text("\n".join(["N,D,Val Loss,arm", *rows]))
    return path


COLUMNS = ("--columns", "params=N,tokens=D", "loss=Val Loss")


def test_the_json_holds_the_contract(table, tmp_path, capsys):
    out = tmp_path / "fit.json"
    code = call(table, "--form", "approach3", "--delta", "1e-3", "--bootstrap", "40", *COLUMNS, "--predict", "1B,20B",
                "--leave-largest", "1", "--beside", "gadre", "--json", out)  # fmt: skip
    assert code == 0
    found = json.loads(out.read_text())
    assert (found["form"], found["n"], found["convention"]) == ("approach3", 28, "6ND")
    assert set(found["params"]) == {"E", "A", "B", "alpha", "beta"} and set(found["exponents"]) == {"a", "b"}
    assert found["objective"] > 0 and len(found["ci"]["alpha"]) == 2
    assert [(d["index"], d["reason"][:8]) for d in found["dropped"]] == [(8, "loss is "), (20, "diverged")]
    [point] = found["predictions"]
    assert point["lo"] < point["loss"] < point["hi"] and point["loss"] == pytest.approx(law(1e9, 2e10), rel=0.01)
    assert len(found["held_out"]["runs"]) == 5 and found["comparison"]["scores"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "alpha" in printed and "FLOPs 6ND" in printed and "diverged" in printed


def test_names_with_commas_and_decimal_commas_go_through_the_verb(tmp_path, capsys):
    rng = np.random.default_rng(0)
    n, d = grid()
    rows = [f"{a};{b / 1e9:.9f};{c}" for a, b, c in zip(n, d, noisy(rng, law(n, d), 0.001), strict=True)]
    path, out = tmp_path / "t.csv", tmp_path / "fit.json"
    path.write_text("\n".join(["N, all;D;loss, val", *rows]).replace(".", ","))
    code = call(path, "--columns", "params=N, all,tokens=D*1e9,loss=loss, val", "--json", out)
    assert code == 0 and "decimal commas in 'N, all' (20" in " ".join(capsys.readouterr().out.split())
    found = json.loads(out.read_text())
    assert found["n"] == 30 and found["residuals"][3]["tokens"] == pytest.approx(d[3])
    assert found["params"]["alpha"] == pytest.approx(0.348, abs=0.05)


def test_drop_worst_replaces_the_search_for_diverged_runs(table, tmp_path):
    out = tmp_path / "fit.json"
    assert call(table, *COLUMNS, "--drop-worst", "2", "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["n"] == 27 and [d["index"] for d in found["dropped"]][:1] == [8]
    assert 20 in [d["index"] for d in found["dropped"]] and len(found["dropped"]) == 3


def test_drop_worst_of_none_keeps_what_looks_diverged(table, tmp_path):
    out = tmp_path / "fit.json"
    assert call(table, *COLUMNS, "--drop-worst", "0", "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["n"] == 29 and [d["index"] for d in found["dropped"]] == [8]


def test_equal_losses_are_refused(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("params,tokens,loss\n" + "".join(f"{n},{20 * n},3\n" for n in range(1000000, 1000012)))
    assert call(path, "--form", "power") == 2
    assert "every loss is 3" in capsys.readouterr().err


@pytest.mark.parametrize("axis", ["params", "tokens", "flops"])
def test_power_laws_go_through_the_same_verb(tmp_path, axis):
    x = np.geomspace(1e6, 1e9, 8)
    columns = {"params": x, "tokens": x, "flops": x}
    path, out = tmp_path / "p.jsonl", tmp_path / "fit.json"
    rows = [{**{k: float(v[i]) for k, v in columns.items()}, "loss": 9 * x[i] ** -0.1} for i in range(8)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    assert call(path, "--form", "power", "--axis", axis, "--json", out) == 0
    found = json.loads(out.read_text())
    assert (
        found["params"]["alpha"] == pytest.approx(0.1) and found["exponents"] == {} and found["convention"] == "given"
    )


def test_weights_are_read_for_power_laws_and_curves(tmp_path):
    x = np.geomspace(1e7, 3e9, 8)
    rows = [f"{n},{20 * n},{50 * n**-0.15 * (1 if i else 1.2)},{1 if i else 1e-9}" for i, n in enumerate(x)]
    path, out = tmp_path / "p.csv", tmp_path / "fit.json"
    path.write_text("\n".join(["params,tokens,loss,weight", *rows]))
    assert call(path, "--form", "power", "--json", out) == 0
    assert json.loads(out.read_text())["params"]["alpha"] == pytest.approx(0.15, abs=1e-6)
    x = np.linspace(0.5, 1.3, 20)
    rows = [f"{a},{0.2 + 0.8 / (1 + np.exp(8 * (a - 0.8))) * (i > 0)},{1 if i else 1e-9}" for i, a in enumerate(x)]
    path.write_text("\n".join(["bpb,accuracy,weight", *rows]))
    assert call(path, "--form", "downstream", "--json", out) == 0
    assert json.loads(out.read_text())["params"]["slope"] == pytest.approx(8, rel=1e-4)


def test_arms_are_chosen_and_a_mixture_is_warned_of(table, tmp_path):
    text = table.read_text().splitlines()
    table.write_text("\n".join([*text, *(line.replace("qies", "gpt2") for line in text[1:])]))
    out = tmp_path / "fit.json"
    assert call(table, *COLUMNS, "--arm", "gpt2", "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["n"] == 28 and [d["index"] for d in found["dropped"]] == [38, 50]
    assert call(table, *COLUMNS, "--json", out) == 0
    assert any("2 arms are fitted as one" in w for w in json.loads(out.read_text())["warnings"])


@pytest.mark.parametrize("form", ["approach1", "approach2"])
def test_envelopes_go_through_the_same_verb(tmp_path, form):
    compute = np.repeat(np.geomspace(1e18, 1e21, 5), 9)
    n = np.concatenate([c**0.5 * np.geomspace(0.03, 0.5, 9) for c in compute[::9]])
    d = compute / 6 / n
    path, out = tmp_path / "iso.csv", tmp_path / "fit.json"
    path.write_text("\n".join(["params,tokens,loss", *(f"{a},{b},{law(a, b)}" for a, b in zip(n, d, strict=True))]))
    assert call(path, "--form", form, "--json", out) == 0
    found = json.loads(out.read_text())
    assert found["form"] == form and found["exponents"]["a"] == pytest.approx(0.51, abs=0.08) and found["dropped"] == []


def test_akima_and_the_optimum_at_a_compute_can_be_asked_for(tmp_path, capsys):
    compute = np.repeat(np.geomspace(1e18, 1e21, 5), 9)
    n = np.concatenate([c**0.5 * np.geomspace(0.03, 0.5, 9) for c in compute[::9]])
    d = compute / 12 / n  # the table counts 12 FLOPs a parameter and token
    path, out = tmp_path / "iso.csv", tmp_path / "fit.json"
    rows = [f"{a},{b},{c},{law(a, b)}" for a, b, c in zip(n, d, compute, strict=True)]
    path.write_text("\n".join(["params,tokens,flops,loss", *rows]))
    found = {}
    for form, *options in (["approach1"], ["approach2"], ["approach2", "--method", "akima"], ["approach3"]):
        assert call(path, "--form", form, *options, "--at-compute", "1e20", "4e21", "--json", out) == 0
        found[(form, *options)] = json.loads(out.read_text())
        assert "compute-optimal" in capsys.readouterr().out
        for optimum, reach in zip(found[(form, *options)]["optima"], (1, 4), strict=True):
            assert 12 * optimum["params"] * optimum["tokens"] == pytest.approx(optimum["compute"], rel=0.2)
            assert optimum["params_lo"] <= optimum["params"] <= optimum["params_hi"]
            assert optimum["tokens_lo"] <= optimum["tokens"] <= optimum["tokens_hi"]
            assert optimum["reach"] == pytest.approx(reach, rel=0.2)
    parabola, akima = (found[k] for k in (("approach2",), ("approach2", "--method", "akima")))
    assert parabola["points"] != akima["points"]
    # N^(alpha + beta) = alpha A / (beta B) (C / 12)^beta
    exact = (0.348 * 482 / (0.366 * 2085) * (1e20 / 12) ** 0.366) ** (1 / 0.714)
    for key, near in ((("approach3",), 1e-3), (("approach2",), 0.2), (("approach2", "--method", "akima"), 0.2)):
        assert found[key]["optima"][0]["params"] == pytest.approx(exact, rel=near)
    loss = found[("approach3",)]["optima"][0]["loss"]
    assert loss == pytest.approx(law(exact, 1e20 / 12 / exact), rel=1e-4)


def test_residuals_of_the_loss_can_be_asked_for(table, tmp_path):
    out, found = tmp_path / "fit.json", {}
    for criterion in ("log", "loss"):
        options = ("--criterion", criterion, "--drop-worst", "1", "--leave-largest", "1", "--bootstrap", "0")
        assert call(table, *COLUMNS, *options, "--json", out) == 0
        found[criterion] = json.loads(out.read_text())
    squares = [(r["loss"] - r["predicted"]) ** 2 for r in found["loss"]["residuals"]]
    assert found["loss"]["objective"] == pytest.approx(sum(squares) / 2)
    assert (found["loss"]["delta"], found["log"]["delta"]) == (None, 1e-3)
    assert found["loss"]["held_out"] != found["log"]["held_out"]
    assert call(table, *COLUMNS, "--form", "power+floor", "--criterion", "loss", "--json", out) == 0
    assert json.loads(out.read_text())["criterion"] == "loss"


def test_a_law_that_ignores_repeated_data_says_so(tmp_path, capsys):
    n, d = grid()
    path = tmp_path / "t.csv"
    rows = [f"{a},{b},{b / 2 if i < 7 else b},{law(a, b)}" for i, (a, b) in enumerate(zip(n, d, strict=True))]
    path.write_text("\n".join(["params,tokens,unique,loss", *rows]))
    assert call(path, "--form", "power") == 0
    assert "7 of 30 runs repeat data (unique below tokens), which power ignores" in " ".join(
        capsys.readouterr().out.split()
    )


def test_every_run_left_out_is_printed(tmp_path, capsys):
    n, d = grid()
    rows = [
        f"{a},{b},{law(a, b)},{'failed' if i % 2 else 'done'},run-{i}"
        for i, (a, b) in enumerate(zip(n, d, strict=True))
    ]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["params,tokens,loss,status,name", *rows]))
    assert call(path) == 0
    printed = capsys.readouterr().out
    assert all(f"run-{i} " in printed for i in range(1, 30, 2)) and "left out: 15 runs" in printed


def test_curves_go_through_the_same_verb(tmp_path):
    x = np.linspace(0.5, 1.3, 20)
    y = 0.25 + 0.75 / (1 + np.exp(8 * (x - 0.8)))
    path, out = tmp_path / "d.csv", tmp_path / "fit.json"
    path.write_text("\n".join(["BPB,acc", *(f"{a},{100 * b}%" for a, b in zip(x, y, strict=True))]))
    assert call(path, "--form", "downstream", "--columns", "bpb=BPB,accuracy=acc", "--json", out) == 0
    assert json.loads(out.read_text())["params"]["midpoint"] == pytest.approx(0.8, rel=1e-4)
    for floor, ceiling, known in (
        ("0.25", "free", {"slope", "midpoint", "ceiling"}),
        ("0.25", "1", {"slope", "midpoint"}),
    ):
        options = ("--columns", "bpb=BPB,accuracy=acc", "--floor", floor, "--ceiling", ceiling)
        assert call(path, "--form", "downstream", *options, "--json", out) == 0
        fit = json.loads(out.read_text())
        assert set(fit["ci"]) == known and fit["params"]["ceiling"] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--form", "aproach3"], "Did you mean 'approach3'"),
        (["--form", "power", "--axis", "param"], "Did you mean 'params'"),
        (["--columns", "params"], "--columns needs OURS=THEIRS"),
        (["--predict", "1e9"], "--predict needs N,D"),
        (["--predict", "1e9,-3"], "--predict needs N,D"),
        (
            ["--form", "power", "--leave-largest", "1"],
            "--leave-largest is for approach3, approach3-gamma, data-constrained, gadre",
        ),
        (["--form", "approach1", "--bootstrap", "9"], "--bootstrap is for approach3"),
        (["--form", "approach1", "--method", "akima"], "--method is for approach2, not for approach1"),
        (["--form", "approach2", "--criterion", "loss"], "--criterion is for approach3"),
        (["--floor", "0.0"], "--floor is for downstream, not for approach3"),
        (["--form", "power", "--at-compute", "1e21"], "--at-compute is for approach3"),
        (["--at-compute", "big"], "--at-compute needs FLOPs such as 1e21"),
        (["--at-compute", "-1e21"], "--at-compute"),
        (["--criterion", "lss"], "criterion"),
        (["--arm", "qeis"], "Did you mean 'qies'"),
        (["--drop-wrst", "1"], "Did you mean '--drop-worst'"),
        (["--delta", "-1"], "delta > 0"),
        (["--json", "absent/fit.json"], "the folder absent does not exist"),
    ],
)
def test_bad_input_is_one_line_and_two(table, options, says, capsys):
    extra = () if "--columns" in options else COLUMNS
    assert call(table, *extra, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("qies: ") and says in error
