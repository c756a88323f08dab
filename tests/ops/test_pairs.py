import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.ops.pairs import rotate, times_i, to_complex, to_pair, unit


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_pairs_are_complex_numbers(m, seed):
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(3, m, generator=gen, dtype=torch.complex128)
    phase = 100 * torch.randn(3, m, generator=gen, dtype=torch.float64)
    torch.testing.assert_close(to_complex(to_pair(z)), z)
    torch.testing.assert_close(to_complex(times_i(to_pair(z))), 1j * z)
    torch.testing.assert_close(to_complex(rotate(to_pair(z), phase)), z * torch.exp(1j * phase))
    torch.testing.assert_close(to_complex(unit(to_pair(z))), z / torch.linalg.vector_norm(z, dim=-1, keepdim=True))


def test_the_pair_may_lie_on_any_axis():
    x, phase = torch.randn(4, 5), torch.randn(2, 1)
    torch.testing.assert_close(rotate(x, phase, dim=0), rotate(x.T, phase.T).T)
    torch.testing.assert_close(times_i(x, dim=0), times_i(x.T).T)


def test_the_zero_vector_has_no_direction_and_no_gradient():
    x = torch.zeros(4, requires_grad=True)
    unit(x).sum().backward()
    assert torch.equal(unit(x), torch.zeros(4))
    assert torch.equal(x.grad, torch.zeros(4))


@pytest.mark.parametrize("scale", [1e-44, 1e-20, 1.0, 1e20, 5e37])
def test_a_direction_is_the_same_at_any_length(scale):
    x = torch.tensor([3.0, -4.0, 0.0, 0.0]) * scale
    torch.testing.assert_close(
        unit(x), torch.tensor([0.6, -0.8, 0.0, 0.0]), atol=0.1 if scale == 1e-44 else 1e-6, rtol=0
    )
