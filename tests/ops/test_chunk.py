"""The chunk form against the recurrence: outputs, final state and all seven gradients."""

import pytest
import torch
from entangle_cases import NAMES, assert_close, evaluate, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.errors import UserError
from qies.ops.entangle import chunk, entangle, entangle_chunk, entangle_naive
from qies.ops.entangle.spans import spans

FORMS = [("real", False), ("complex", False), ("complex", True)]


@pytest.mark.parametrize("T", [1, 2, 31, 63, 64, 65, 130])
@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
def test_chunk_is_the_recurrence(T, mode, disc, channels):
    B, H, phase, state = [(1, 1, True, True), (3, 1, False, True), (1, 3, True, False)][T % 3]
    args = inputs(B, T, H, 3, 4, mode=mode, disc=disc, channels=channels, phase=phase, state=state, seed=T)
    expected = evaluate(entangle_naive, args, mode)
    assert_close(evaluate(entangle_chunk, args, mode), expected, 1e-10)
    assert_close(evaluate(entangle_chunk, args, mode, torch.float32), expected, 1e-5)


@pytest.mark.parametrize(
    "mode,disc,channels", [("real", False, False), ("real", False, True), ("complex", True, False)]
)
def test_a_thousand_tokens(mode, disc, channels):
    args = inputs(1, 1000, 1, 4, 4, mode=mode, disc=disc, channels=channels)
    args[4] = args[4] / 10
    expected = evaluate(entangle_naive, args, mode)
    assert_close(evaluate(entangle_chunk, args, mode), expected, 1e-10)
    assert_close(evaluate(entangle_chunk, args, mode, torch.float32), expected, 1e-5)


EDGES = {
    "beta 0": lambda a: a[3].zero_(),
    "beta 1": lambda a: a[3].fill_(1),
    "beta 2": lambda a: a[3].fill_(2),
    "no damping": lambda a: a[4].zero_(),
    "hardly any damping": lambda a: a[4].fill_(-1e-4),
    "damped to nothing": lambda a: a[4].fill_(-50),
    "some tokens damp to nothing": lambda a: a[4][:, ::7].fill_(-50),
    "strong damping": lambda a: a[4].fill_(-3),
    "parallel keys": lambda a: a[1].copy_(a[1][:, :1].expand_as(a[1]).clone()),
    "parallel reflections": lambda a: (
        a[1].copy_(a[1][:, :1].expand_as(a[1]).clone()),
        a[3].fill_(2),
        a[4].zero_(),
        a[5].zero_(),
    ),
    "zero-length keys and queries": lambda a: (a[1][:, ::3].zero_(), a[0][:, 1::3].zero_()),
    "thousands of radians": lambda a: a[5].mul_(3000),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("mode,channels", [("real", False), ("complex", True)])
def test_edges(edge, mode, channels):
    args = inputs(2, 70, 2, 4, 3, mode=mode, channels=channels, seed=5)
    EDGES[edge](args)
    args = [x.float().double() for x in args]
    expected = evaluate(entangle_naive, args, mode)
    exact, single = evaluate(entangle_chunk, args, mode), evaluate(entangle_chunk, args, mode, torch.float32)
    if edge.startswith("zero-length"):  # the direction of nothing: its gradient is finite, and huge
        for results in (exact, single, expected):
            for name in ("dq", "dk"):
                results[name] = results[name].clamp(-1e3, 1e3)
    assert_close(exact, expected, 1e-10)
    # strong damping leaves little of what passes a token: sums that cancel, and with nothing left only their rounding
    assert_close(
        single, expected, 3e-5 if edge == "strong damping" else 1e-5, 1 if edge == "damped to nothing" else 0.1
    )


def test_strong_damping_makes_chunks_shorter_and_only_then():
    gentle = torch.full((1, 128, 1), -1.0)
    assert chunk.calm(gentle, 32) == 32
    assert chunk.calm(3 * gentle, 32) == 16
    assert chunk.calm(torch.full((1, 128, 1), -torch.inf), 32) == 1
    reset = torch.full((1, 128, 1), -0.5)
    reset[:, 40] = -1e4  # a document that ends
    assert chunk.calm(reset, 32) == 32
    assert [tuple(s) for s in spans(70, 32)] == [(0, 64, 32), (64, 70, 6)]
    assert [tuple(s) for s in spans(5, 5)] == [(0, 5, 5)]


@pytest.mark.parametrize("mode,disc,channels", [("real", False, False), ("real", False, True), ("complex", True, True)])
def test_gradcheck(mode, disc, channels):
    args = [x.requires_grad_() for x in inputs(1, 5, 1, 2, 2, mode=mode, disc=disc, channels=channels)]
    assert torch.autograd.gradcheck(lambda *a: entangle_chunk(*a, mode), args, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(*(st.integers(1, n) for n in (3, 80, 3, 5, 5))),
    st.sampled_from(FORMS),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 1000),
)
def test_any_shape(shape, form, given_inputs, seed):
    (mode, disc), (channels, phase, state) = form, given_inputs
    args = inputs(*shape, mode=mode, disc=disc, channels=channels, phase=phase, state=state, seed=seed)
    assert_close(evaluate(entangle_chunk, args, mode), evaluate(entangle_naive, args, mode), 1e-10)


def test_batches_larger_than_a_tile_are_cut_into_columns(monkeypatch):
    args = inputs(6, 40, 2, 2, 3)
    whole = evaluate(entangle_chunk, args, "real")
    monkeypatch.setattr(chunk, "TILE", 2 * 32 * 4 * 2)
    assert_close(evaluate(entangle_chunk, args, "real"), whole, 1e-12)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("m", [8, 64])  # the larger heads multiply in bfloat16
def test_low_precision_is_within_its_rounding(autocast, m):
    args = inputs(8, 70, 2, m, 2 * m, seed=3)
    args = [x.bfloat16().double() for x in args]
    expected = evaluate(entangle_naive, args, "real")
    half = [x if name in ("log_alpha", "theta", "state") else x.bfloat16() for name, x in zip(NAMES, args, strict=True)]
    half = [x.float() if autocast or x.dtype == torch.float64 else x for x in half]

    def run(*tensors, **options):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return entangle(*tensors, **options)

    got = evaluate(run, half, "real")
    assert_close(got, expected, 0.02)
    o, state = run(*half[:6], state=half[6])
    assert o.dtype == half[2].dtype and state.dtype == torch.float32


def test_float32_is_never_rounded_and_settings_are_restored():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        args = inputs(8, 64, 2, 64, 128, seed=3)
        assert_close(evaluate(entangle, args, "real", torch.float32), evaluate(entangle_naive, args, "real"), 1e-5)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_layers_share_buffers_without_disturbing_each_other():
    first, second = inputs(2, 40, 1, seed=1), inputs(2, 40, 1, seed=2)
    alone = [evaluate(entangle_chunk, args, "real") for args in (first, second)]
    leaves = [[x.clone().requires_grad_() for x in args] for args in (first, second)]
    outputs = [entangle_chunk(*args) for args in leaves]  # both forward, then both backward
    for args, (o, state), want in zip(leaves, outputs, alone, strict=True):
        gen = torch.Generator().manual_seed(1)
        wo, ws = (torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (o, state))
        for _ in range(2):  # a graph that is kept gives the same again
            grads = torch.autograd.grad((o * wo).sum() + (state * ws).sum(), args, retain_graph=True)
            assert_close(
                {f"d{n}": g for n, g in zip(NAMES, grads, strict=True)}, {k: want[k] for k in want if k[0] == "d"}, 0
            )


def test_the_backward_keeps_no_state_per_token():
    B, T, H, m, V = 1, 256, 1, 16, 32
    args = [x.float().requires_grad_() for x in inputs(B, T, H, m, V)]
    o, _ = entangle_chunk(*args)
    kept = sum(x.numel() for x in o.grad_fn.saved_tensors if x is not None)
    assert kept < 0.4 * B * T * H * 2 * m * V
    with torch.no_grad():
        assert torch.equal(entangle_chunk(*args)[0], o)


def test_strange_memory_layouts():
    args = inputs(2, 33, 2, 3, 4)
    expected = evaluate(entangle_naive, args, "real")
    strange = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in args]
    assert_close(evaluate(entangle_chunk, strange, "real"), expected, 1e-10)
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
        ({"q": torch.zeros(1, 0, 1, 6)}, "T >= 1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    args = dict(zip(NAMES, inputs(), strict=True)) | change
    with pytest.raises(UserError, match=message) as error:
        entangle(**args)
    assert "\n" not in str(error.value)
