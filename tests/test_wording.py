"""Wordings that the editing passes have replaced by the field's own (wordings.txt, a regular expression a line)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDINGS = (ROOT / "tests" / "wordings.txt").read_text(encoding="utf-8").splitlines()
SUFFIXES = (".py", ".md", ".html", ".yaml")
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for folder in ("src", "docs") for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES),
]


@pytest.fixture(scope="module")
def texts():
    """Every text with its white space joined, so that a line break hides nothing."""
    return {str(path.relative_to(ROOT)): " ".join(path.read_text(encoding="utf-8").split()) for path in FILES}


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_replaced_wording_does_not_come_back(wording, texts):
    assert [name for name, text in texts.items() if re.search(wording, text)] == []


def test_the_list_is_long_and_has_no_repeats():
    assert len(WORDINGS) == len(set(WORDINGS)) >= 100


def test_a_wording_is_found_across_a_line_break():
    assert re.search("bits a byte", " ".join(["so", "many", "bits", "a", "byte"]))
