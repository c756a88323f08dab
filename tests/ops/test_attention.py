import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.ops import attention as module
from qies.ops.attention import causal_attention


def definition(q, k, v):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def inputs(*shape, dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3))


@pytest.fixture(params=["one block", "many"])
def blocks(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(module, "ROWS", 4)
        monkeypatch.setattr(module, "SCORES", 100)


def check(found, expected, grad, **tolerance):
    (out, args), (expected, exact) = found, expected
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(out, args, grad), torch.autograd.grad(expected, exact, grad), **tolerance
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 19), st.integers(1, 8), st.integers(0, 99))
def test_any_shape_in_float64(batch, heads, length, width, seed):
    torch.manual_seed(seed)
    args = inputs(batch, heads, length, width, dtype=torch.float64)
    grad = torch.randn(args[0].shape, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", 5)
        patch.setattr(module, "SCORES", 150)
        check((causal_attention(*args), args), (definition(*args), args), grad)


@pytest.mark.parametrize("length", [1, 37, 128, 300])
def test_fp32_equals_the_definition(length):
    torch.manual_seed(0)
    args = inputs(2, 3, length, 16)
    grad = torch.randn(args[0].shape)
    check((causal_attention(*args), args), (definition(*args), args), grad, rtol=1e-5, atol=1e-5)


def test_bf16_stays_within_its_rounding(blocks):
    torch.manual_seed(0)
    args = inputs(2, 2, 50, 16)
    grad = torch.randn(args[0].shape)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_attention(*args)
    assert out.dtype == torch.bfloat16
    exact = definition(*args)
    found = (out, *torch.autograd.grad(out, args, grad.bfloat16()))
    for a, b in zip(found, (exact, *torch.autograd.grad(exact, args, grad)), strict=True):
        assert (a.float() - b).norm() < 1e-2 * b.norm()


def test_gradcheck(blocks):
    assert torch.autograd.gradcheck(causal_attention, inputs(1, 2, 9, 3, dtype=torch.float64))


def test_no_token_sees_a_later_one(blocks):
    q, k, v = inputs(1, 2, 20, 4)
    (grad,) = torch.autograd.grad(causal_attention(q, k, v)[:, :, 11].sum(), v)
    assert grad[:, :, :12].all() and not grad[:, :, 12:].any()
    with torch.no_grad():
        before = causal_attention(q, k, v)
        k[:, :, 12:] = 50
        assert torch.equal(causal_attention(q, k, v)[:, :, :12], before[:, :, :12])


def test_heads_seen_as_a_transpose_and_an_expanded_gradient(blocks):
    args = tuple(torch.randn(2, 13, 3, 8).transpose(1, 2)[..., ::2].requires_grad_() for _ in range(3))
    grad = torch.randn(1, 1, 13, 4).expand(2, 3, 13, 4)
    check((causal_attention(*args), args), (definition(*args), args), grad)


def test_scores_of_hundreds_stay_finite(blocks):
    q, k, v = inputs(1, 1, 12, 4)
    out = causal_attention(100 * q, 100 * k, v)
    assert all(torch.isfinite(g).all() for g in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


def test_long_sequences_and_frozen_inputs_go_to_torch():
    for args in (inputs(1, 1, module.LONGEST + 1, 2), tuple(t.detach() for t in inputs(1, 1, 30, 2))):
        torch.testing.assert_close(causal_attention(*args), definition(*args), rtol=1e-4, atol=1e-5)


def test_it_differentiates_once():
    args = inputs(1, 1, 4, 2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(causal_attention(*args).sum(), args, create_graph=True)


def test_packed_texts_attend_to_themselves(blocks):
    torch.manual_seed(0)
    args = inputs(2, 3, 21, 8)
    texts = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(n)) for n in ([5, 1, 15], [9, 9, 3])])
    grad = torch.randn(args[0].shape)
    allowed = (texts[:, :, None] == texts[:, None]).tril()[:, None]
    q, k, v = args
    for found in (causal_attention(*args, texts), module._definition(*args, texts), module._written_out(*args, texts)):
        want = (q @ k.mT * 8**-0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
        check((found, args), (want, args), grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*args, texts), want)
