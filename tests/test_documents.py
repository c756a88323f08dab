"""What README.md and docs/comparing.md say of the quick study is what its committed records say."""

from pathlib import Path

import numpy as np
import pytest

from qies import runs
from qies.scaling import compare, read_runs

ROOT = Path(__file__).parent.parent
QUICK = ROOT / "results" / "reference" / "quick"
SIZES = ("40k", "60k", "100k")


def words(path: str) -> str:
    return " ".join((ROOT / path).read_text().split())


@pytest.mark.parametrize("arm", ["transformer", "qies", "no_phase"])
def test_the_readmes_losses(arm):
    means = []
    for size in SIZES:
        found = runs.query(QUICK, arm=arm, size=size, status="done")
        assert len(found) == 3
        means.append(np.mean([record["metrics"]["val_bpb"] for record in found]))
    name = "no_phase (control)" if arm == "no_phase" else arm
    assert f"| {name} | {' | '.join(f'{mean:.4f}' for mean in means)} |" in words("README.md")


@pytest.mark.parametrize("baseline", ["transformer", "no_phase"])
@pytest.mark.parametrize("document", ["README.md", "docs/comparing.md"])
def test_the_verdicts(document, baseline):
    result = compare(read_runs(QUICK), "qies", baseline)
    verdict = f"{result.verdict}: {result.reason}".split(", and its ")[0]
    assert f'"{verdict[0].upper() if verdict.startswith("no diff") else verdict[0]}{verdict[1:]}' in words(document)
