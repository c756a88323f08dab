"""The examples run, and do what they say."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_layer_in_a_plain_model_learns_to_recall():
    example = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    assert example["main"](steps=160) > 0.6  # chance is 0.06


def test_the_reference_study_makes_its_page(tmp_path):
    import shutil

    from qies.report import build_report

    shutil.copytree(EXAMPLES.parent / "results/reference/small", tmp_path / "quick")
    assert "qies" in build_report(tmp_path / "quick").read_text()
