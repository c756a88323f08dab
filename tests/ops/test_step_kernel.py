"""One token as one kernel on the CPU: the numbers of the recurrence, and only where no gradient is wanted."""

import pytest
import torch
from entangle_cases import inputs

from qies.ops import entangle as op
from qies.ops.entangle import entangle, evolve
from qies.ops.entangle.cpu import step
from qies.ops.entangle.layout import Inputs
from qies.ops.entangle.naive import entangle_naive


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("mode,disc", [("real", False), ("complex", False), ("complex", True)])
@pytest.mark.parametrize("channels", [False, True])
def test_the_kernel_is_one_token_of_the_recurrence(mode, disc, channels):
    for phase in (False, True):
        for state in (False, True):
            exact = inputs(3, 1, 2, 5, 7, mode=mode, disc=disc, channels=channels, phase=phase, state=state)
            x = Inputs(*(None if y is None else y.float() for y in exact))
            before = None if x.state is None else x.state.clone()
            close(step.entangle_step_fused(x, mode), entangle_naive(Inputs(*exact), mode), 1e-5)
            assert before is None or torch.equal(x.state, before)  # the state handed in is left as it was


def test_extreme_tokens():
    q, k, v, beta, log_alpha, theta, state = (y.float() for y in inputs(1, 1, 2, 3, 4))
    k[0, 0, 0] = 0  # a zero key writes nothing
    log_alpha[0, 0, 1] = -torch.inf  # forgets all before
    o, after = step.entangle_step_fused(Inputs(q, k, v, beta, log_alpha, 1e4 * theta, state))
    expected = entangle_naive(Inputs(*(y.double() for y in (q, k, v, beta, log_alpha, 1e4 * theta, state))))
    close((o, after), expected, 1e-4)
    assert torch.linalg.matrix_rank(after[0, 1]) == 1


def test_half_precision_is_rounded_once():
    x = [y.bfloat16() if i < 3 else y.float() for i, y in enumerate(inputs(2, 1, 2, 3, 4))]
    o, state = step.entangle_step_fused(Inputs(*x))
    exact, exact_state = entangle_naive(Inputs(*(y.double() for y in x)))
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (o.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (state.double() - exact_state).abs().max() <= 1e-5 * exact_state.abs().max()


def test_auto_takes_the_kernel_where_no_gradient_is_wanted(monkeypatch):
    calls = []
    real = step.entangle_step_fused
    monkeypatch.setattr(step, "entangle_step_fused", lambda x, mode: calls.append(mode) or real(x, mode))
    args = [y.float() for y in inputs(1, 1, 2, 3, 4)]
    evolve(Inputs(*args))
    assert calls == ["real"]
    args[0].requires_grad_()
    o, _ = entangle(*args[:6], state=args[6])
    o.sum().backward()
    assert calls == ["real"] and args[0].grad is not None
    with torch.no_grad():
        evolve(Inputs(*args))
    evolve(Inputs(*(y.detach().double() for y in args)))  # float64 stays float64
    assert calls == ["real"] * 2 and op._fits_kernel(Inputs(*args))
