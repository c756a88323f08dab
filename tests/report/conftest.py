"""Fixtures of the tests of the page."""

import pytest
from study_pages import make_study

from qies.plotting import static


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path / "synthetic")


@pytest.fixture(scope="session", autouse=True)
def drawn_once():
    """Most pages of these tests hold the same figures, so each is drawn once: an SVG depends on its figure alone."""
    svg, drawn = static.svg, {}

    def once(figure):
        key = repr(figure)
        if key not in drawn:
            drawn[key] = svg(figure)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "svg", once)
        yield
