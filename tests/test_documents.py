"""What README.md and docs/comparing.md say of the committed studies is what their records say."""

from pathlib import Path

import numpy as np
import pytest

from qies import records
from qies.config import StudyConfig, load
from qies.scaling import compare, read_runs

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "results" / "reference" / "small"
FAIR = SMALL.parent / "fair-200k"
QUICK = SMALL.parent / "quick"
SIZES = ("40k", "60k", "100k")


def words(path: str) -> str:
    return " ".join((ROOT / path).read_text().split())


@pytest.mark.parametrize("arm", ["transformer", "qies", "no_phase"])
def test_the_readmes_losses(arm):
    means = []
    for size in SIZES:
        found = records.query(SMALL, arm=arm, size=size, status="done")
        assert len(found) == 3
        means.append(np.mean([record.metrics["val_bpb"] for record in found]))
    name = "no_phase (control)" if arm == "no_phase" else arm
    assert f"| {name} | {' | '.join(f'{mean:.4f}' for mean in means)} |" in words("README.md")


@pytest.mark.parametrize("baseline", ["transformer", "no_phase"])
@pytest.mark.parametrize("document", ["README.md", "docs/comparing.md"])
def test_the_verdicts(document, baseline):
    result = compare(read_runs(SMALL), "qies", baseline)
    verdict = f"{result.verdict}: {result.reason}".split(", and its ")[0]
    assert f'"{verdict[0].upper() if verdict.startswith("no diff") else verdict[0]}{verdict[1:]}' in words(document)


@pytest.mark.parametrize(
    ("arm", "name"),
    [("transformer", "transformer (RoPE base 1e8)"), ("qies", "qies"), ("real_registers", "real_registers (twin)"),
     ("no_phase", "no_phase (control)")],
)  # fmt: skip
def test_the_readmes_table_of_the_fair_comparison(arm, name):
    found = [record.metrics for record in records.query(FAIR, arm=arm, status="done")]
    assert len(found) == 5
    loss, induction = (np.mean([metrics[key] for metrics in found]) for key in ("val_loss", "induction"))
    against = ""
    if arm != "transformer":
        [pair] = compare(read_runs(FAIR), arm, "transformer").to_dict()["paired"]
        against = f"{pair['difference']:+.3f} ({pair['lo']:+.3f} to {pair['hi']:+.3f}) "
    assert f"| {name} | {loss:.4f} | {against}| {induction:.2f} |" in words("README.md")


def test_the_readmes_comparison_at_twice_the_tokens():
    folder = FAIR.parent / "fair-200k-4m"
    means = {
        arm: np.mean([r.metrics["val_loss"] for r in records.query(folder, arm=arm)]) for arm in ("transformer", "qies")
    }
    [pair] = compare(read_runs(folder), "qies", "transformer").to_dict()["paired"]
    said = (
        f"transformer {means['transformer']:.4f}, qies {means['qies']:.4f}, a difference of {pair['difference']:+.3f} "
    )
    assert f"{said}(95% CI {pair['lo']:+.3f} to {pair['hi']:+.3f};" in words("README.md")


@pytest.mark.parametrize("arm", ["transformer", "qies"])
def test_the_readmes_losses_of_the_quick_study(arm):
    study = load(StudyConfig, QUICK / "study.yaml")
    means = []
    for size in study.sizes:
        found = records.query(QUICK, arm=arm, size=size, status="done")
        assert {record.seed for record in found} == set(study.seeds)
        means.append(np.mean([record.metrics["val_bpb"] for record in found]))
    assert f"| {arm} | {' | '.join(f'{mean:.4f}' for mean in means)} |" in words("README.md")


def test_the_quick_studys_records_are_of_the_study_that_make_study_runs():
    preset, recorded = (
        load(StudyConfig, path) for path in (ROOT / "src/qies/studies/quick.yaml", QUICK / "study.yaml")
    )
    for name in ("arms", "sizes", "seeds", "budgets", "train"):
        assert getattr(preset, name) == getattr(recorded, name)


def test_the_readmes_verdict_of_the_quick_study():
    result = compare(read_runs(QUICK), "qies", "transformer")
    verdict = f"{result.verdict}: {result.reason}".split(", and its ")[0]
    assert f'"{verdict[0].upper() if verdict.startswith("no diff") else verdict[0]}{verdict[1:]}' in words("README.md")
