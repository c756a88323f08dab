import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.ops.norm import rms_norm


def definition(x, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_value_and_gradient_are_the_definitions(shape, scale, seed):
    torch.manual_seed(seed)
    x = (scale * torch.randn(shape)).requires_grad_()
    grad = torch.randn(shape)
    torch.testing.assert_close(rms_norm(x), definition(x), rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad(rms_norm(x), x, grad)
    (expected,) = torch.autograd.grad(definition(x.double()), x, grad.double())
    size = x.square().mean(-1, keepdim=True).sqrt()  # the gradient is a difference of terms as large as 1 / size
    torch.testing.assert_close(found * size, expected * size, rtol=1e-5, atol=1e-5)


def test_gradcheck_with_an_eps_that_matters():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, 0.3), x)


def test_unit_root_mean_square_and_no_scale():
    x = torch.randn(7, 64)
    torch.testing.assert_close(rms_norm(x).square().mean(-1), torch.ones(7), rtol=1e-4, atol=0)
    torch.testing.assert_close(rms_norm(1000 * x), rms_norm(x), rtol=1e-5, atol=1e-5)


def test_strided_input():
    x = torch.randn(6, 4, 5).transpose(0, 1)[..., ::2].requires_grad_()
    grad = torch.randn(6, 4, 3).transpose(0, 1)
    (found,) = torch.autograd.grad(rms_norm(x), x, grad)
    (expected,) = torch.autograd.grad(definition(x), x, grad)
    torch.testing.assert_close(found, expected)


def test_bf16_rounds_only_the_result():
    torch.manual_seed(0)  # one value in 2^16 lies so near a tie that the order of a sum in float32 decides it
    x = torch.randn(50, 48, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(50, 48).bfloat16()
    assert torch.equal(rms_norm(x), definition(x.float()).bfloat16())
    (found,) = torch.autograd.grad(rms_norm(x), x, grad)
    (expected,) = torch.autograd.grad(definition(x.float()), x, grad.float())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_zero_vectors_and_empty_batches():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))
    assert rms_norm(torch.zeros(0, 4)).shape == (0, 4)


def test_it_differentiates_once():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(rms_norm(x).sum(), x, create_graph=True)
