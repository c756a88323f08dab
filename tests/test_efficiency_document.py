"""docs/efficiency.md and the README's paragraph on speed say what the committed benches and the accounting say."""

import json
from pathlib import Path

import pytest

from qies import presets
from qies.accounting.cache import cache_bytes
from qies.accounting.flops import cheaper_from, training_flops_per_token

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "results" / "reference" / "bench"
SIZES = ("200k", "400k", "6m")
ARMS = ("qies", "real_registers", "no_phase", "complex")


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def cases(what: str) -> list[dict]:
    return json.loads((BENCH / f"{what}.json").read_text())["cases"]


def inference_rows(what: str) -> list[str]:
    """Size, batch, context; tokens per second of three arms; speed-up; MiB of cache."""
    rows = []
    for case in cases(what):
        facts, rate = case["facts"], case["tokens_per_second"]
        low, high = case["quartiles"]["transformer"]
        cells = [facts["size"], f"{facts['batch']}", f"{facts['context']:,}"]
        cells += [f"{rate[arm]:,.0f}" for arm in ("qies", "no_phase", "transformer")]
        cells.append(f"{case['ratio']['transformer']:.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{case['costs'][arm]['cache_bytes'] / 2**20:,.2f}" for arm in ("qies", "transformer")]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def training_rows() -> list[str]:
    rows = []
    for case in cases("train"):
        facts = case["facts"]
        for name, ratio in case["ratio"].items():
            low, high = case["quartiles"][name]
            spread = "" if name == case["subject"] else f" ({low:.2f} to {high:.2f})"
            cells = [facts["size"], f"{facts['context']:,}", name, f"{1e3 * case['seconds'][name]:.0f}"]
            rows.append(f"| {' | '.join(cells)} | {ratio:.2f}{spread} |")
    return rows


def context_rows() -> list[str]:
    rows = []
    for arm in ARMS:
        cells = [arm]
        for cost in ((), (training_flops_per_token,)):
            for size in SIZES:
                own, rival = (presets.settings(name, size, 4096) for name in (arm, "transformer"))
                cells.append(f"{cheaper_from(own, rival, *cost):,}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


@pytest.mark.parametrize(
    "rows",
    [lambda: inference_rows("decode"), lambda: inference_rows("prefill"), training_rows, context_rows],
    ids=["decode", "prefill", "train", "contexts"],
)
def test_the_documents_tables(rows):
    document = text("docs/efficiency.md")
    made = rows()
    assert len(made) >= 2
    assert [row for row in made if row not in document] == []


def test_the_shares_of_the_cache():
    own, rival = (presets.settings(arm, "400k", 4096) for arm in ("qies", "transformer"))
    shares = [sum(cache_bytes(own, n).values()) / sum(cache_bytes(rival, n).values()) for n in (32_768, 131_072)]
    said = f"`qies` keeps {shares[0]:.4f} of the transformer's cache at 400k, and {shares[1]:.4f} at 131,072"
    assert said in " ".join(text("docs/efficiency.md").split())


def test_the_readme_says_how_fast_it_is():
    readme = " ".join(text("README.md").split())
    train = {case["facts"]["context"]: case for case in cases("train") if case["facts"]["size"] == "400k"}
    short, long = (train[n]["ratio"] for n in (512, 2048))
    assert f"{short['transformer arm']:.2f} times the step time of `qies` at 512 tokens" in readme
    assert f"and {long['transformer arm']:.2f} times at 2,048" in readme
    assert f"{short['no_phase arm']:.2f} of it without register heads" in readme
    speeds = {
        (what, c["facts"]["size"], c["facts"]["batch"], c["facts"]["context"]): c["ratio"]["transformer"]
        for what in ("decode", "prefill")
        for c in cases(what)
    }
    assert f"{speeds['decode', '400k', 1, 32768]:.1f} times as many tokens per second after 32,768" in readme
    assert f"{speeds['decode', '400k', 8, 32768]:.1f} times in a batch of 8" in readme
    assert f"reads a prompt of 16,384 {speeds['prefill', '400k', 1, 16384]:.1f} times as fast" in readme
