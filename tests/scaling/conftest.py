"""Fixtures of the tests of fits and comparisons."""

import numpy as np
import pytest
from two_arms import ALPHA, BETA, A, B, E, chinchilla, grid, ladder, table

from qies.scaling.comparison import gain_axes
from qies.scaling.comparison.joint_inference import make_law
from qies.scaling.comparison.matching import cells_of

STEPS = 12


@pytest.fixture
def quick_fits(monkeypatch):
    """The same fits in a hundredth of the time, for simulations: least squares, as the Huber fits are while no cell is
    5 % off; surfaces by Gauss-Newton steps from the law that the runs were made from."""
    truth = np.array([*np.log([E, A, B]), ALPHA, BETA])

    def power_law(x, log_loss):
        theta = np.linalg.lstsq(np.stack([np.ones_like(x), -x], axis=1), log_loss, rcond=None)[0]
        return make_law(gain_axes.power, gain_axes.POWER, theta, x[:, None], log_loss)

    def surface_law(cells, runs):
        x, theta = np.log(np.stack([cells.params, cells.tokens], axis=1)), truth
        for _ in range(STEPS):
            value, jacobian = gain_axes.surface(theta, x)
            theta = theta + np.linalg.lstsq(jacobian, cells.log_loss - value, rcond=None)[0]
        return make_law(gain_axes.surface, gain_axes.SURFACE, theta, x, cells.log_loss)

    def check(design, quick, real):
        noise = np.exp(0.002 * np.random.default_rng(0).standard_normal((len(design), 1)))
        runs = table(design, {"q": chinchilla(*design.T)[:, None] * noise})
        cells = cells_of(runs, runs)[0]
        np.testing.assert_allclose(quick(cells, runs).residual, real(cells, runs).residual, atol=1e-6)

    check(
        ladder(), *(lambda c, _, law=law: law(np.log(c.flops), c.log_loss) for law in (power_law, gain_axes._power_law))
    )
    check(grid(), surface_law, gain_axes._surface_law)
    monkeypatch.setattr(gain_axes, "_power_law", power_law)
    monkeypatch.setattr(gain_axes, "_surface_law", surface_law)
