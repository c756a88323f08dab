"""Inputs at the edges of the contract: two types, no token, any length and phase, strange memory, bad shapes."""

import pytest
import torch
from entangle_cases import NAMES, assert_close, evaluate, inputs

from qies.errors import UserError
from qies.ops.entangle import entangle, entangle_chunk, entangle_naive
from qies.ops.entangle.fused import entangle_fused


@pytest.mark.parametrize("given", ["q", "k"])
def test_queries_and_keys_of_two_types(given):
    args = [x.float() for x in inputs(2, 40, 2, 3, 4)]
    at = "qk".index(given)
    low = [*args[:at], args[at].bfloat16().requires_grad_(), *args[at + 1 :]]
    got, want = evaluate(entangle_fused, low, "real", None), evaluate(entangle_chunk, low, "real", None)
    assert_close(got, want, 1e-2)


@pytest.mark.parametrize("mode", ["real", "complex"])
@pytest.mark.parametrize("backend", ["auto", "naive", "chunk"])
def test_no_token_changes_nothing(mode, backend):
    *args, S = inputs(2, 5, 3, 2, 4, mode=mode)
    none = [x[:, :0] for x in args]
    o, state = entangle(*none, state=S, mode=mode, backend=backend)
    assert o.shape == none[2].shape and torch.equal(state, S) and state is not S
    assert torch.equal(entangle(*none, mode=mode, backend=backend)[1], torch.zeros_like(S))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e20])
@pytest.mark.parametrize("backend", ["naive", "chunk", "fused"])
def test_only_the_direction_of_queries_and_keys_counts(scale, backend):
    args = [x.float() for x in inputs(2, 40, 2, 3, 4)]
    want = entangle(*args[:6], state=args[6], backend=backend)[0]
    got = entangle(args[0] * scale, args[1] * scale, *args[2:6], state=args[6], backend=backend)[0]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("angle", [3000.3, -1e4])
def test_phases_of_thousands_of_radians_add_up_exactly(angle):
    args = inputs(1, 1000, 1, 3, 4)
    args[5] = torch.full_like(args[5], angle)
    want, got = (form(*args)[0] for form in (entangle_naive, entangle_chunk))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_strange_memory_layouts():
    args = inputs(2, 33, 2, 3, 4)
    expected = evaluate(entangle_naive, args, "real")
    strange = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in args]
    assert_close(evaluate(entangle_chunk, strange, "real"), expected, 1e-10)
    assert_close(evaluate(entangle_fused, strange, "real", torch.float32), expected, 1e-5)
    theta = args[5][:, :1, :1].expand(2, 33, 2, 3)  # a learned constant
    o, state = entangle_chunk(*args[:5], theta, args[6])
    want, final = entangle_naive(*args[:5], theta.contiguous(), args[6])
    torch.testing.assert_close(o, want)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"mode": "imaginary"}, "mode 'imaginary'"),
        ({"backend": "flash"}, "backend 'flash' is not available"),
        ({"backend": "step"}, "T = 8"),
        ({"theta": torch.zeros(1, 8, 1, 6)}, "theta is"),
        ({"state": torch.zeros(1, 1, 3, 4)}, "state is"),
        ({"beta": torch.zeros(1, 8, 1, 2)}, "beta is"),
        ({"q": torch.zeros(1, 8, 1, 5)}, "even last axis"),
        ({"q": torch.zeros(1, 0, 1, 6)}, "k is"),
    ],
)
def test_bad_input_is_one_line(change, message):
    args = dict(zip(NAMES, inputs(), strict=True)) | change
    with pytest.raises(UserError, match=message) as error:
        entangle(**args)
    assert "\n" not in str(error.value)
