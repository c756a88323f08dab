import pytest
import torch

from qies.ops.activation import mlp, relu_squared


def definition(x):
    return torch.where(x > 0, x * x, 0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (0, 4)])
def test_value_and_gradient(shape):
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    torch.testing.assert_close(relu_squared(x), definition(x))
    (found,) = torch.autograd.grad(relu_squared(x), x, grad)
    torch.testing.assert_close(found, torch.autograd.grad(definition(x), x, grad)[0])


def test_by_hand_with_strides_and_at_zero():
    x = torch.tensor([[-2.0, 9.0], [0.0, 9.0], [3.0, 9.0]])[:, 0].requires_grad_()
    y = relu_squared(x)
    y.backward(torch.tensor([5.0]).expand(3))
    assert y.tolist() == [0, 0, 9] and x.grad.tolist() == [0, 0, 30]


def test_gradcheck():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w_up, w_down = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 6)))
    assert torch.autograd.gradcheck(relu_squared, x)
    assert torch.autograd.gradcheck(mlp, (x, w_up, w_down))


def test_bf16_rounds_each_step_once():
    x = torch.randn(100, requires_grad=True)
    half = x.detach().bfloat16().requires_grad_()
    relu_squared(x).sum().backward()
    y = relu_squared(half)
    y.sum().backward()
    assert y.dtype == half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), definition(half.float()), rtol=2**-8, atol=0)
    torch.testing.assert_close(half.grad.float(), x.grad, rtol=2**-7, atol=0)


def test_mlp_is_two_products_around_it():
    x, w_up, w_down = torch.randn(2, 5, 3), torch.randn(7, 3), torch.randn(3, 7)
    expected = torch.einsum("btf,df->btd", definition(torch.einsum("btd,fd->btf", x, w_up)), w_down)
    torch.testing.assert_close(mlp(x, w_up, w_down), expected)


def test_it_differentiates_once():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(relu_squared(x).sum(), x, create_graph=True)
