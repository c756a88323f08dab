import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qies.errors import UserError
from qies.ops import loss as module
from qies.ops.loss import linear_cross_entropy


def definition(hidden, weight, targets, softcap=15.0):
    logits = hidden @ weight.T
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets)


def inputs(tokens, width, vocab, dtype=torch.float32, size=0.5):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = (size * torch.randn(vocab, width, dtype=dtype)).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,))


def value_and_grads(function, hidden, weight, *args, **kwargs):
    value = function(hidden, weight, *args, **kwargs)
    return value.detach(), *torch.autograd.grad(value, (hidden, weight))


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(params=["one chunk", "many"])
def chunks(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(module, "CHUNK", 16)
        monkeypatch.setattr(module, "TILE", 200)


@pytest.mark.parametrize("softcap", [15.0, 2.0, 50.0, 100.0, None])
def test_fp32_equals_the_definition(chunks, softcap):
    torch.manual_seed(0)
    hidden, weight, targets = inputs(53, 24, 71)
    expected = value_and_grads(definition, hidden, weight, targets, softcap)
    for a, b in zip(
        value_and_grads(linear_cross_entropy, hidden, weight, targets, softcap=softcap), expected, strict=True
    ):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("softcap", [15.0, None])
def test_bf16_autocast_is_as_near_to_the_truth_as_the_definition(chunks, softcap):
    torch.manual_seed(0)
    hidden, weight, targets = inputs(67, 32, 131)
    exact = value_and_grads(definition, hidden, weight, targets, softcap)
    with torch.autocast("cpu", torch.bfloat16):
        plain = value_and_grads(definition, hidden, weight, targets, softcap)
        fast = value_and_grads(linear_cross_entropy, hidden, weight, targets, softcap=softcap)
    assert abs(fast[0] - exact[0]) < 1e-2
    for a, b, c in zip(fast[1:], plain[1:], exact[1:], strict=True):
        assert a.dtype == torch.float32
        assert distance(a, c) < 2 * distance(b, c)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(2, 60),
    st.sampled_from([3.0, 15.0, None]),
    st.integers(0, 9),
)
def test_any_shape_with_ignored_targets(tokens, width, vocab, softcap, seed):
    torch.manual_seed(seed)
    hidden, weight, targets = inputs(tokens, width, vocab, torch.float64)
    targets[torch.rand(tokens) < 0.3] = -100
    targets[0] = vocab - 1
    expected = value_and_grads(definition, hidden, weight, targets, softcap)
    found = value_and_grads(linear_cross_entropy, hidden, weight, targets, softcap=softcap)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("softcap", [3.0, None])
def test_gradcheck(softcap):
    hidden, weight, targets = inputs(5, 3, 7, torch.float64)
    targets[2] = 0
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, softcap=softcap, ignore_index=0), (hidden, weight)
    )


def test_uniform_logits_cost_log_v():
    hidden, weight, targets = inputs(9, 4, 32)
    assert linear_cross_entropy(0 * hidden, weight, targets).item() == pytest.approx(math.log(32), abs=1e-6)


def test_large_logits_stay_finite_and_right():
    hidden = torch.full((3, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    capped = linear_cross_entropy(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(capped.detach(), torch.tensor([0.0, 30.0, 15.0]), atol=1e-5, rtol=1e-5)
    bare = linear_cross_entropy(hidden.detach(), weight.detach(), targets, softcap=None, reduction="none")
    torch.testing.assert_close(bare, torch.tensor([0.0, 2e4, 1e4]))
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_nothing_to_predict_costs_nothing():
    hidden, weight, targets = inputs(6, 4, 10)
    value, *grads = value_and_grads(linear_cross_entropy, hidden, weight, torch.full_like(targets, -100))
    assert value == 0 and all(not g.any() for g in grads)


@pytest.mark.parametrize("grad", [True, False])
def test_per_token_losses(grad):
    hidden, weight, targets = inputs(40, 8, 30)
    targets[::3] = -100
    with torch.set_grad_enabled(grad):
        losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.requires_grad == grad and not losses[::3].any()
    kept = targets != -100
    for token in kept.nonzero()[:3, 0].tolist():
        alone = definition(hidden[token : token + 1], weight, targets[token : token + 1])
        assert losses[token].item() == pytest.approx(alone.item(), rel=1e-5)
    mean = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(losses.sum() / kept.sum(), mean)
    if grad:
        grads = torch.autograd.grad(losses.sum() / kept.sum(), (hidden, weight))
        torch.testing.assert_close(grads, torch.autograd.grad(mean, (hidden, weight)))


def test_strides_and_the_incoming_gradient():
    hidden, weight, targets = inputs(20, 6, 12)
    slanted = hidden.T.contiguous().T, weight.T.contiguous().T
    expected = value_and_grads(lambda *a: 3 * definition(*a), hidden, weight, targets)
    torch.testing.assert_close(value_and_grads(lambda *a: 3 * linear_cross_entropy(*a), *slanted, targets), expected)


def test_a_frozen_operand_gets_no_gradient():
    hidden, weight, targets = inputs(8, 4, 10)
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    _, expected, _ = value_and_grads(definition, hidden, weight, targets)
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_the_logits_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "TILE", 4096)
    hidden, weight, targets = inputs(1024, 8, 300)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.numel <= 64 * 300


def test_it_differentiates_once():
    hidden, weight, targets = inputs(4, 3, 5)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


def test_bad_input_says_what_is_wrong():
    hidden, weight, targets = inputs(4, 3, 5)
    for bad in (-1, 5):
        with pytest.raises(UserError, match=r"outside \[0, 5\)"):
            linear_cross_entropy(hidden, weight, torch.full_like(targets, bad))
    with pytest.raises(UserError, match=r"hidden \[N, D\]"):
        linear_cross_entropy(hidden, weight.T, targets)
    with pytest.raises(UserError, match="softcap"):
        linear_cross_entropy(hidden, weight, targets, softcap=0.0)
    with pytest.raises(UserError, match="reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="sum")


@pytest.mark.parametrize("softcap", [15.0, None])
def test_nan_is_never_taken_for_a_number(softcap):
    hidden, weight, targets = inputs(9, 8, 20)
    weight.data[3, 2] = torch.nan
    assert linear_cross_entropy(hidden, weight, targets, softcap=softcap).isnan()
