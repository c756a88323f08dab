"""Fixtures of the tests of the page."""

import pytest
from study_pages import make_study


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "synthetic")
