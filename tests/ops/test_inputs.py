"""Inputs at the edges of the contract: two types, no token, any length and phase, strange memory, bad shapes."""

import pytest
import torch
from entangle_cases import NAMES, assert_close, entangle_chunk, entangle_fused, entangle_naive, evaluate, inputs

from qies.errors import UserError
from qies.ops.entangle import entangle


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
        ({"backend": "flash"}, "Unknown backend 'flash'. Did you mean 'fla'"),
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


@pytest.mark.parametrize("mode,disc", [("real", False), ("complex", True)])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("backend", ["naive", "chunk", "auto"])
def test_packed_texts_each_start_from_the_initial_state(mode, disc, carried, backend):
    """Also from one that is learned: its gradient is the sum over all texts."""
    lengths = [[3, 40, 1, 20], [30, 2, 32]]
    args = inputs(2, 64, 2, 3, 4, mode=mode, disc=disc, state=carried)
    dtype = torch.float32 if backend == "auto" else torch.float64
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]

    def packed(*six, state, mode):
        return entangle(*six, state=state, mode=mode, backend=backend, texts=torch.stack(numbers))

    def alone(*six, state, mode):
        outputs, states = [], []
        for b, row in enumerate(lengths):
            texts = zip(*(x[b : b + 1].split(row, 1) for x in six), strict=True)
            S = None if state is None else state[b : b + 1]
            o, last = zip(*(entangle_naive(*text, S, mode) for text in texts), strict=True)
            outputs.append(torch.cat(o, 1))
            states.append(last[-1])
        return torch.cat(outputs), torch.cat(states)

    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_close(evaluate(packed, args, mode, dtype), evaluate(alone, args, mode), tolerance)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"log_alpha": None}, "log_alpha must be a tensor, not NoneType; without damping give zeros"),
        ({"beta": None}, "beta must be a tensor, not NoneType"),
        ({"beta": torch.full((1, 8, 1), 3.0)}, r"beta must lie in \[0, 2\] but spans \[3, 3\]"),
        ({"beta": torch.full((1, 8, 1), -0.5)}, r"beta must lie in \[0, 2\]"),
        ({"log_alpha": torch.full((1, 8, 1), 0.25)}, "log_alpha must be <= 0 but reaches 0.25"),
        ({"texts": torch.zeros(1, 7)}, r"texts is \[1, 7\]"),
        (
            {"mode": "complex", "beta": torch.tensor([1.0, 1.5]).expand(1, 8, 1, 2), "state": None},
            r"\|1 - beta\| <= 1 but it reaches 1.5",
        ),
    ],
)
def test_values_out_of_range_are_one_line(change, message):
    args = dict(zip(NAMES, inputs(), strict=True)) | change
    with pytest.raises(UserError, match=message) as error:
        entangle(**args)
    assert "\n" not in str(error.value)


def test_values_at_the_ends_of_their_range():
    *args, S = (x.bfloat16() for x in inputs())
    for beta, log_alpha in ((0.0, -torch.inf), (2.0, 0.0), (torch.nan, -1.0)):
        given = [*args[:3], torch.full_like(args[3], beta), torch.full_like(args[4], log_alpha), args[5]]
        assert entangle(*given, state=S, backend="chunk")[0].shape == args[2].shape
    angles = torch.rand(1, 8, 1, 1) * 7  # eigenvalues on the unit circle, rounded
    beta = torch.cat([1 - angles.cos(), -angles.sin()], -1).bfloat16()
    entangle(*args[:3], beta, *args[4:], mode="complex", state=S[..., :2], backend="chunk")
