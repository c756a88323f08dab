"""Reading runs: every kind of file, names, numbers, FLOPs, and what is left out."""

import json
import sys

import numpy as np
import pytest
from scaling_tables import grid, law, make_runs

from qies.errors import UserError
from qies.scaling import read_runs, sound
from qies.scaling.tables.filtering import oddities
from qies.scaling.tables.number_parsing import parse_number

ROWS = [
    {"params": 1e6, "tokens": 2e7, "loss": 4.5, "arm": "a", "seed": 1, "status": "done"},
    {"params": 2e6, "tokens": 4e7, "loss": 4.0, "arm": "b", "seed": 2, "status": "done"},
]


def write(path, text):
    path.write_text(text)
    return path


def csv_of(rows, separator=","):
    return "\n".join([separator.join(rows[0]), *(separator.join(str(v) for v in r.values()) for r in rows)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", csv_of(ROWS)),
        ("t.tsv", csv_of(ROWS, "\t")),
        ("semicolons.csv", "\ufeff" + csv_of(ROWS, ";") + "\n\n"),
        ("excel.csv", "sep=;\n" + csv_of(ROWS, ";")),
        ("named.csv", "SEP=|\n" + csv_of(ROWS, "|")),
        ("hash.csv", "# two runs, of two arms\n#" + csv_of(ROWS)),
        ("hashes.csv", "# from a; b; c; d; e; f; g\n# " + csv_of(ROWS, "\t").replace("\n", "\n\n", 1) + "\n# end"),
        ("comment.csv", "# two runs, of two arms, as, they, were\n" + csv_of(ROWS, ";")),
        ("t.jsonl", "\n".join(json.dumps(r) for r in ROWS)),
        ("t.json", json.dumps(ROWS)),
        ("runs.json", json.dumps({"runs": ROWS})),
        ("columns.json", json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]})),
    ],
)
def test_every_kind_of_file_gives_the_same_runs(tmp_path, name, text):
    runs = read_runs(write(tmp_path / name, text))
    assert runs.params.tolist() == [1e6, 2e6] and runs.tokens.tolist() == [2e7, 4e7]
    assert runs.flops.tolist() == [1.2e14, 4.8e14] and runs.convention == "6ND"
    assert (runs.arm, runs.seed.tolist(), runs.name) == (("a", "b"), [1, 2], ("row 1", "row 2"))
    assert np.isnan(runs.wall_seconds).all() and runs.weight.tolist() == [1, 1]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert read_runs(tmp_path / "t.parquet").loss.tolist() == [4.5, 4.0]


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_runs(write(tmp_path / "t.parquet", ""))


def test_folder_of_run_records(tmp_path):
    from qies.records import SCHEMA

    for i, status in enumerate(["done", "diverged"]):
        record = {
            "schema": SCHEMA, "arm": "qies", "size": "50k", "seed": i, "status": status, "config": {},
            "config_hash": str(i), "code_version": "0", "environment": {}, "steps": 1, "flops_per_token": 7e6,
            "params": {"non_embedding": 50000, "total": 900_000}, "tokens": 1000, "flops": 7e9,
            "flops_convention": "matrix products", "wall_seconds": 3.5,
            "metrics": {"val_loss": 5.0} if status == "done" else {},
        }  # fmt: skip
        (tmp_path / f"runs/{i}").mkdir(parents=True)
        (tmp_path / f"runs/{i}/run.json").write_text(json.dumps(record))
    runs = read_runs(tmp_path)
    assert runs.params.tolist() == [50000, 50000] and runs.flops.tolist() == [7e9, 7e9]
    assert runs.convention == "matrix products" and runs.wall_seconds.tolist() == [3.5, 3.5]
    kept, dropped = sound(runs)
    assert kept.name == ("runs/0",)
    assert [(d.index, d.name, d.reason) for d in dropped] == [(1, "runs/1", "status diverged")]
    assert read_runs(tmp_path, {"params": "params.total"}).params[0] == 9e5
    assert read_runs(tmp_path, flops="6ND").flops[0] == 6 * 50000 * 1000


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1,200,000", 1.2e6), ("1.2M", 1.2e6), ("70 B", 7e10), ("1.4T", 1.4e12), ("400k", 4e5), ("3.5 %", 0.035),
     ("410M params", 4.1e8), ("300 billion tokens", 3e11), ("3.2 EFLOPs", 3.2e18), ("5e18 FLOPs", 5e18),
     ("2 PF-days", 2 * 8.64e19), ("12 s", 12.0),
     ("+2e-3", 2e-3), ("1_000", 1000.0), (".5", 0.5), ("12.", 12.0), (7, 7.0), ("inf", np.inf), ("1,234.5", 1234.5)],
)  # fmt: skip
def test_numbers_as_people_write_them(cell, value):
    assert parse_number(cell) == pytest.approx(value)


@pytest.mark.parametrize("cell", ["", "NaN", "n/a", None, " - "])
def test_missing_numbers(cell):
    assert np.isnan(parse_number(cell))


@pytest.mark.parametrize("cell", ["1,5", "0,050", "12,34", "abc", "1.2.3", "M", "3E", "2 Z", "FLOPs", "4 days"])
def test_what_is_no_number(cell):
    with pytest.raises(ValueError):
        parse_number(cell)


@pytest.mark.parametrize(
    ("cell", "value"),
    [("0,050", 0.05), ("1,2M", 1.2e6), ("1.234,5", 1234.5), ("1.200.000", 1.2e6), ("6,851", 6.851), ("2,5e9", 2.5e9),
     ("3,5 %", 0.035), ("12", 12.0)],
)  # fmt: skip
def test_numbers_with_decimal_commas(cell, value):
    assert parse_number(cell, ",") == pytest.approx(value)


@pytest.mark.parametrize(
    ("rows", "tokens", "loss", "commas"),
    [
        # a group of thousands does not begin with 0, so the whole column has decimal commas
        ("10000000;0,050;6.851\n20000000;1,250;6.5", [0.05, 1.25], [6.851, 6.5], ["tokens"]),
        ("10000000;0,5;6,851\n20000000;1.250,5;6,512", [0.5, 1250.5], [6.851, 6.512], ["tokens", "loss"]),
        ("1,000,000;2,500;6.85\n900,000;9,000;6.512", [2500, 9000], [6.85, 6.512], []),
        ("10.000.000;2.500;6.85\n9;9.000;6,51", None, None, "'loss' has a decimal comma in '6,51' and a decimal point"),
        ("10000000;2,500;6,851\n20000000;9,000;6,512", None, None, "comma of '2,500' may mark decimals or thousands"),
        # points that can only separate thousands decide for their column, and for others of a table without points
        ("1.000.000;1.234.567,8;6,85\n850.000;20.000;6,5", [1234567.8, 20000], [6.85, 6.5], ["tokens", "loss"]),
        ("1.000.000;17.000;6,85\n850.000;20.000;6,5", [17000, 20000], [6.85, 6.5], ["loss"]),
        ("1.000.000;1.000.000;6.8514\n850.000;9.000.000;6.5", [1e6, 9e6], [6.8514, 6.5], []),
        ("1.000.000;17.000;6.85\n850.000;20.000;6.5", None, None, "point of '17.000' may mark decimals or thousands"),
        ("1.000.000;9.000.000;6.851\n850.000;9.500.000;6.512", None, None, "the point of '6.851' may mark"),
        ("1.000.000;17.000;6,851\n850.000;20.000;6,512", [17000, 20000], [6.851, 6.512], ["loss"]),
        ("10000000;17.000;6,85\n20000000;20.000;6,5", None, None, "point of '17.000' may mark decimals or thousands"),
        ("10000000;0,5;6.85\n20000000;9.000;6.5", None, None, "the point of '9.000' may mark decimals or thousands"),
    ],
)  # fmt: skip
def test_commas_are_decided_by_the_column_and_then_by_the_table(tmp_path, rows, tokens, loss, commas):
    path = write(tmp_path / "t.csv", "params;tokens;loss\n" + rows)
    if tokens is None:
        with pytest.raises(UserError, match=commas) as error:
            read_runs(path)
        assert "\n" not in str(error.value)
        return
    runs = read_runs(path, {"tokens": "tokens*1e9"})
    np.testing.assert_allclose(runs.tokens, np.array(tokens) * 1e9)
    np.testing.assert_allclose(runs.loss, loss)
    said = [note for note in oddities(runs) if "decimal commas" in note]
    assert [note.split("'")[1::2] for note in said] == ([commas] if commas else [])
    assert any("points are read as separators of thousands in 'params'" in note for note in runs.notes) == (
        rows.startswith("1.000.000")
    )


def test_numbers_of_json_have_decimal_points(tmp_path):
    rows = [{"params": "500,000", "tokens": 2e7, "loss": 4.5}, {"params": "900,000", "tokens": 2e7, "loss": 4.1}]
    assert read_runs(write(tmp_path / "t.json", json.dumps(rows))).params.tolist() == [5e5, 9e5]


def test_unique_tokens_are_read_and_selected(tmp_path):
    runs = read_runs(write(tmp_path / "t.csv", "params,tokens,unique,loss\n1e6,4e7,1e7,4.5\n2e6,4e7,4e7,4\n"))
    assert runs.unique.tolist() == [1e7, 4e7] and runs.select([1]).unique.tolist() == [4e7]
    assert read_runs(write(tmp_path / "u.csv", "params,tokens,loss\n1e6,4e7,4.5\n")).unique is None


def test_columns_that_may_be_settings_are_kept(tmp_path):
    """Those whose values recur: not what is measured (bits), nor what is the same in every row, nor what is read."""
    rows = [f"{n}e6,{n}e8,{4 - n / 10},{lr},{4.1 - n / 10 + lr},adam" for n in (1, 2, 3) for lr in (0.1, 0.2)]
    runs = read_runs(write(tmp_path / "t.csv", "\n".join(["params,tokens,loss,lr,bits,optimizer", *rows])))
    assert dict(runs.settings) == {"lr": ("0.1", "0.2") * 3}
    assert dict(runs.select([0, 3]).settings) == {"lr": ("0.1", "0.2")}


def test_two_of_params_tokens_and_flops_are_enough(tmp_path):
    path = write(tmp_path / "t.csv", "Model Size,Training FLOP,loss\n1e9,6e19,3.0\n2e9,2.4e20,2.8\n")
    runs = read_runs(path, {"params": "Model Size", "flops": "Training FLOP"})
    np.testing.assert_allclose(runs.tokens, [1e10, 2e10])
    assert runs.flops.tolist() == [6e19, 2.4e20] and runs.convention == "given, D = C/6N"
    path = write(tmp_path / "u.csv", "tokens,flops,loss\n1e10,6e19,3.0\n")
    assert read_runs(path).params[0] == pytest.approx(1e9)


def test_names_in_another_case_and_columns_in_another_unit(tmp_path):
    path = write(tmp_path / "t.csv", "N (M),Tokens,D*,PFdays,LOSS\n1000,7,10,1,3.0\n2000,7,20,2,2.8\n")
    runs = read_runs(path, {"params": "n (m) * 1e6", "tokens": "D**1B", "flops": "PFdays*8.64e19"})
    assert runs.params.tolist() == [1e9, 2e9] and runs.tokens.tolist() == [1e10, 2e10]
    assert runs.flops.tolist() == [8.64e19, 1.728e20] and runs.loss.tolist() == [3.0, 2.8]
    assert read_runs(path, {"params": "N (M)"}).tokens.tolist() == [7, 7]
    both = write(tmp_path / "u.csv", "N,n,tokens,loss\n1,2,3,4\n")
    assert read_runs(both, {"params": "n"}).params[0] == 2


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"params": "N*1e6"}, "Unknown column 'N' for params"),
        ({"params": "params*big"}, "multiplied by 'big', which is not a positive number"),
        ({"params": "params*-1"}, "not a positive number"),
        ({"arm": "params*2"}, "Unknown column 'params\\*2' for arm"),
    ],
)
def test_bad_factors_are_refused(tmp_path, columns, says):
    path = write(tmp_path / "t.csv", "params,tokens,loss\n1,2,3\n")
    with pytest.raises(UserError, match=says):
        read_runs(path, columns)


def test_flops_conventions(tmp_path):
    path = write(tmp_path / "t.csv", "params,tokens,flops,loss\n1e9,1e10,7e19,3\n2e9,1e10,,3\n")
    assert read_runs(path).flops.tolist() == [7e19, 1.2e20]
    assert read_runs(path).convention == "given, 6ND where missing"
    assert read_runs(path, flops="8ND").flops.tolist() == [8e19, 1.6e20]
    assert read_runs(path, flops="8nd").convention == "8ND"


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("N,tokens,loss\n1,2,3\n", {}, "no column 'params'; name it with --columns params="),
        ("params,tokens,lss\n1,2,3\n", {}, "Did you mean 'lss'"),
        ("params,tokens,loss\n1,2,3\n", {"columns": {"params": "parms"}}, "Did you mean 'params'"),
        (
            "params,tokens,loss\n1,2,3\n",
            {"columns": {"parms": "params"}},
            "Unknown column 'parms' in --columns. Did you mean 'params'",
        ),
        ("params,tokens,loss\n1,2,three\n", {}, "row 1, column 'loss': 'three' is not a number"),
        ("Step,a - loss,a - loss__MIN,a - loss__MAX\n1,2,3,4\n", {}, "wide export of W&B.*'a - loss', without loss"),
        ("Step,a - loss\n1,2\n", {"columns": {"loss": "a - loss"}}, "wide export of W&B.*without params"),
        ("params,tokens,loss\n1,200,000,3\n", {}, "row 1 has 4 cells and the head 3; quote"),
        ("params,params,loss\n1,2,3\n", {}, "two columns are called 'params'"),
        ("", {}, "no rows"),
        ("params,tokens,loss\n1,2,3\n", {"flops": "7DN"}, "'7DN' is unknown"),
        ("params,tokens,loss\n1,2,3\n", {"flops": "given"}, "no FLOPs to take as given"),
        ("params,tokens,loss,flops,flops_convention\n1,2,3,4,x\n1,2,3,4,y\n", {}, "2 conventions"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, text, options, says):
    with pytest.raises(UserError, match=says) as error:
        read_runs(write(tmp_path / "t.csv", text), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.xlsx", "", "unknown suffix"),
        ("t.jsonl", "{", "not valid JSONL"),
        ("t.json", "3", "a list of runs"),
        ("t.json", "[3]", "an object"),
        ("t.json", '{"a": [1], "b": [1, 2]}', "differ in length"),
        ("t.parquet", "no", "not a readable Parquet"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, text, says):
    with pytest.raises(UserError, match=says):
        read_runs(write(tmp_path / name, text))


def test_absent_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no table at"):
        read_runs(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="no run record"):
        read_runs(tmp_path)


def test_selection_keeps_every_column_in_step():
    n, d = grid()
    runs = make_runs(n, d, law(n, d), arm=tuple("ab"[i % 2] for i in range(len(n))))
    assert runs.arms == ("a", "b") and len(runs.of_arm("b")) == 15
    picked = runs.select([3, 3, 0])
    assert picked.name == ("row 4", "row 4", "row 1") and picked.params.tolist() == [n[3], n[3], n[0]]
    assert len(runs.select(runs.params > 1e9)) == int((n > 1e9).sum())
    with pytest.raises(UserError, match="Did you mean"):
        make_runs(n, d, law(n, d), arm=("qies",) * len(n)).of_arm("qeis")
