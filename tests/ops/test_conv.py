import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.errors import UserError
from qies.ops import conv
from qies.ops.conv import causal_conv


def definition(x, weight, state=None):
    taps = weight.shape[1]
    state = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if state is None else state
    past = torch.cat([state, x], 1)
    return F.conv1d(past.transpose(1, 2), weight[:, None], groups=x.shape[2]).transpose(1, 2)


shapes = {"batch": st.integers(1, 3), "length": st.integers(1, 9), "width": st.integers(1, 7)}


@settings(deadline=None, max_examples=30)
@given(**shapes, taps=st.integers(1, 5), seed=st.integers(0, 99))
def test_value_and_gradients_are_conv1ds(batch, length, width, taps, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, length, width, requires_grad=True)
    weight = torch.randn(width, taps, requires_grad=True)
    grad = torch.randn(batch, length, width)
    y, _ = causal_conv(x, weight)
    torch.testing.assert_close(y, definition(x, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, weight), grad),
        torch.autograd.grad(definition(x, weight), (x, weight), grad),
        rtol=1e-5,
        atol=1e-5,
    )


@settings(deadline=None, max_examples=30)
@given(**shapes, taps=st.integers(1, 5), cut=st.integers(0, 9), seed=st.integers(0, 99))
def test_splitting_a_sequence_changes_nothing(batch, length, width, taps, cut, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(batch, length, width), torch.randn(width, taps)
    whole, last = causal_conv(x, weight)
    cut = min(cut, length)
    head, state = causal_conv(x[:, :cut], weight)
    tail, state = causal_conv(x[:, cut:], weight, state)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, last) and state.shape == (batch, taps - 1, width)


def test_the_last_tap_is_the_present_token():
    x = torch.arange(1.0, 5.0)[None, :, None]
    y, state = causal_conv(x, torch.tensor([[100.0, 10.0, 1.0]]))
    assert y.flatten().tolist() == [1, 12, 123, 234]
    assert state.flatten().tolist() == [3, 4]


def test_gradcheck_with_and_without_a_state():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(causal_conv, (x, weight))
    assert torch.autograd.gradcheck(causal_conv, (x, weight, state))


def test_strided_input_and_gradient():
    x = torch.randn(6, 2, 5).transpose(0, 1)[..., ::2].requires_grad_()
    weight = torch.randn(4, 3).T[:, :3].requires_grad_()
    grad = torch.randn(1, 6, 3).expand(2, 6, 3)
    found = torch.autograd.grad(causal_conv(x, weight)[0], (x, weight), grad)
    torch.testing.assert_close(found, torch.autograd.grad(definition(x, weight), (x, weight), grad))


def test_bf16_stays_within_its_rounding():
    torch.manual_seed(0)
    x = torch.randn(3, 40, 16).bfloat16().requires_grad_()
    weight = torch.randn(16, 4, requires_grad=True)
    grad = torch.randn(3, 40, 16).bfloat16()
    y, _ = causal_conv(x, weight)
    exact = definition(x.float(), weight)
    found = torch.autograd.grad(y, (x, weight), grad)
    expected = torch.autograd.grad(exact, (x, weight), grad.float())
    assert y.dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for a, b in zip((y, *found), (exact, *expected), strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def test_the_state_owns_its_memory():
    x, weight = torch.zeros(1, 4, 2), torch.ones(2, 3)
    for _, state in (causal_conv(x, weight), causal_conv(x, weight, torch.zeros(1, 2, 2))):
        x.fill_(1)
        assert not state.any() and state.untyped_storage().nbytes() == state.numel() * 4
        x.zero_()


def test_it_differentiates_once():
    x, weight = torch.randn(1, 4, 2, requires_grad=True), torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(causal_conv(x, weight)[0].sum(), x, create_graph=True)


def test_bad_shapes_are_named():
    x = torch.randn(2, 4, 3)
    with pytest.raises(UserError, match=r"x \[B, T, D\]"):
        causal_conv(x, torch.randn(2, 3))
    with pytest.raises(UserError, match="state is"):
        causal_conv(x, torch.randn(3, 4), torch.randn(2, 4, 3))


@settings(deadline=None, max_examples=30)
@given(**shapes, taps=st.integers(1, 5), seed=st.integers(0, 99))
def test_packed_texts_are_convolved_alone(batch, length, width, taps, seed):
    torch.manual_seed(seed)
    x = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, taps, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(batch, length, width, dtype=torch.float64)
    texts = (torch.rand(batch, length) < 0.3).cumsum(1)
    rows = [[row[number == i][None] for i in number.unique()] for row, number in zip(x, texts, strict=True)]
    want = torch.cat([torch.cat([definition(t, weight) for t in row], 1) for row in rows])
    for y in (
        causal_conv(x, weight, texts=texts)[0],
        conv._definition(x, weight, x.new_zeros(batch, taps - 1, width), texts)[0],
    ):
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, weight), grad, retain_graph=True),
            torch.autograd.grad(want, (x, weight), grad, retain_graph=True),
        )
    with pytest.raises(UserError, match="not both"):
        causal_conv(x, weight, x.new_zeros(batch, taps - 1, width), texts)
