"""Closed-form states, invariances and the gradient of the entanglement measures."""

import math

import pytest
import torch

from qies.entanglement import (
    entropy_ceiling,
    page_entropy,
    participation_ratio,
    renyi2_entropy,
    schmidt_spectrum,
    von_neumann_entropy,
)
from qies.errors import UserError


def as_state(psi):
    """Complex [..., m, V] to the real pair [..., 2m, V]."""
    return torch.cat([psi.real, psi.imag], -2)


def random_psi(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def unitary(n, seed):
    return torch.linalg.qr(random_psi(n, n, seed=seed)).Q


def entropies(state):
    p = schmidt_spectrum(state)
    return von_neumann_entropy(p), renyi2_entropy(state), participation_ratio(p)


@pytest.mark.parametrize(("m", "V"), [(1, 1), (3, 5), (6, 2)])
def test_product_state_holds_none(m, V):
    s1, s2, ratio = entropies(as_state(random_psi(m, 1) * random_psi(1, V, seed=1)))
    expected = torch.tensor([0.0, 0.0, 1.0]).double()
    torch.testing.assert_close(torch.stack([s1, s2, ratio]), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("m", "V"), [(2, 2), (4, 7), (8, 3)])
def test_maximally_entangled_state_reaches_the_ceiling(m, V):
    psi = unitary(m, 2) @ torch.eye(m, V, dtype=torch.complex128) @ unitary(V, 3)
    s1, s2, ratio = entropies(as_state(psi))
    d = min(m, V)
    assert entropy_ceiling(m, V) == pytest.approx(math.log(d))
    torch.testing.assert_close(torch.stack([s1, s2, ratio]), torch.tensor([math.log(d)] * 2 + [d]).double())


def test_ghz_like_spectrum():
    """cos a |00> + sin a |11> in 4 x 5: p = (cos^2 a, sin^2 a, 0, 0)."""
    a = 0.4
    psi = torch.zeros(4, 5, dtype=torch.complex128)
    psi[0, 0], psi[1, 1] = math.cos(a), 1j * math.sin(a)
    p = schmidt_spectrum(as_state(psi))
    c, s = math.cos(a) ** 2, math.sin(a) ** 2
    torch.testing.assert_close(p, torch.tensor([c, s, 0, 0]).double())
    s1, s2, ratio = entropies(as_state(psi))
    assert s1.item() == pytest.approx(-c * math.log(c) - s * math.log(s))
    assert s2.item() == pytest.approx(-math.log(c**2 + s**2))
    assert ratio.item() == pytest.approx(1 / (c**2 + s**2))


def test_real_pair_is_read_as_a_complex_matrix():
    """Re = e_00, Im = e_01 is rank 1 as a complex matrix and rank 2 as a real one of twice the rows."""
    psi = torch.tensor([[1, 1j], [0, 0]])
    torch.testing.assert_close(schmidt_spectrum(as_state(psi)), torch.tensor([1.0, 0.0]))
    assert renyi2_entropy(as_state(psi)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("m", "V", "value"), [(1, 9, 0), (2, 2, 1 / 3), (2, 3, 1 / 4 + 1 / 5)])
def test_page_formula_by_hand(m, V, value):
    assert page_entropy(m, V) == pytest.approx(value)
    assert page_entropy(V, m) == pytest.approx(value)


@pytest.mark.parametrize(("m", "V"), [(4, 6), (8, 3)])
def test_random_states_average_to_page(m, V):
    p = schmidt_spectrum(as_state(random_psi(4000, m, V)))
    s1 = von_neumann_entropy(p)
    assert abs(s1.mean() - page_entropy(m, V)) < 4 * s1.std() / math.sqrt(len(s1))
    assert page_entropy(m, V) < entropy_ceiling(m, V)


def test_renyi_by_norms_is_renyi_by_spectrum_and_orders_below_von_neumann():
    state = as_state(random_psi(50, 3, 4, 6))
    p = schmidt_spectrum(state)
    assert p.shape == (50, 3, 4)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, 3).double())
    assert (p.diff(dim=-1) <= 0).all()
    s1, s2, ratio = entropies(state)
    torch.testing.assert_close(s2, -p.square().sum(-1).log())
    torch.testing.assert_close(s2, ratio.log())
    assert (s2 <= s1 + 1e-12).all() and (s1 <= entropy_ceiling(4, 6) + 1e-12).all()


def test_invariant_under_local_unitaries_the_gauge_and_the_norm():
    psi = random_psi(5, 4, 6)
    gauge = torch.polar(torch.ones(4).double(), torch.linspace(-3, 40, 4).double())
    for moved in (unitary(4, 7) @ psi, psi @ unitary(6, 8), gauge[:, None] * psi, 1e-3 * psi):
        for before, after in zip(entropies(as_state(psi)), entropies(as_state(moved)), strict=True):
            torch.testing.assert_close(after, before)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_far_from_one_neither_overflow_nor_underflow(scale):
    state = as_state(random_psi(4, 6)).float()
    torch.testing.assert_close(renyi2_entropy(scale * state), renyi2_entropy(state))
    torch.testing.assert_close(schmidt_spectrum(scale * state), schmidt_spectrum(state))


def test_zero_state_counts_as_a_product_state():
    state = torch.zeros(2, 8, 3, requires_grad=True)
    p = schmidt_spectrum(state.detach())
    assert p.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert von_neumann_entropy(p).tolist() == [0.0, 0.0]
    s2 = renyi2_entropy(state)
    s2.sum().backward()
    assert s2.tolist() == [0.0, 0.0]
    assert state.grad.abs().max() == 0


def test_zero_state_does_not_disturb_its_batch():
    state = as_state(random_psi(2, 4, 3))
    state[0] = 0
    torch.testing.assert_close(renyi2_entropy(state)[1], renyi2_entropy(state[1]))
    torch.testing.assert_close(schmidt_spectrum(state)[1], schmidt_spectrum(state[1]))


@pytest.mark.parametrize(("m", "V"), [(2, 5), (4, 2)])
def test_gradient_of_renyi2(m, V):
    assert torch.autograd.gradcheck(renyi2_entropy, as_state(random_psi(3, m, V)).requires_grad_())


def test_half_precision_is_raised():
    state = as_state(random_psi(4, 6)).bfloat16()
    assert renyi2_entropy(state).dtype == torch.float32
    torch.testing.assert_close(renyi2_entropy(state), renyi2_entropy(state.float()))


@pytest.mark.parametrize("state", [torch.ones(3, 4), torch.ones(4), torch.ones(4, 0), torch.ones(4, 4) * 1j])
def test_malformed_state_is_refused(state):
    with pytest.raises(UserError, match="2m, V"):
        renyi2_entropy(state)


def test_a_diverged_state_is_said_to_be_one():
    state = torch.full((4, 4), float("nan"))
    assert renyi2_entropy(state).isnan()
    with pytest.raises(UserError, match="not finite"):
        schmidt_spectrum(state)


def test_dimensions_are_checked():
    with pytest.raises(UserError, match="m >= 1"):
        page_entropy(0, 4)
