"""What must hold whatever the numbers: quantum gates, gauge, norm, linearity, causality, continuation.

Of every form: the torch forms in float64, the kernel in float32.
"""

import pytest
import torch
from entangle_cases import entangle_chunk, entangle_fused, entangle_naive, entangle_step, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.ops.pairs import rotate, times_i, to_complex, to_pair

FORMS = [("real", False), ("complex", False), ("complex", True)]
EXACT, SINGLE = {"atol": 1e-10, "rtol": 1e-10}, {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(params=["naive", "chunk", "fused"])
def run(request):
    """A form of the op on float64 inputs, and how near to the truth it must be."""
    f = {"naive": entangle_naive, "chunk": entangle_chunk, "fused": entangle_fused}[request.param]
    single = f is entangle_fused

    def call(*args, mode, state=None):
        args = [x if x is None or not single else x.float() for x in (*args, state)]
        return tuple(x.double() for x in f(*args, mode))

    call.within = SINGLE if single else EXACT
    return call


@pytest.mark.parametrize("f", [entangle_naive, entangle_chunk, entangle_step, entangle_fused])
def test_one_token_is_any_single_qubit_gate(f):
    gen = torch.Generator().manual_seed(0)
    n = 20
    U, _ = torch.linalg.qr(torch.randn(n, 2, 2, generator=gen, dtype=torch.complex128))
    eigenvalues, vectors = torch.linalg.eig(U)
    k = vectors[:, :, 1] / torch.linalg.vector_norm(vectors[:, :, 1], dim=-1, keepdim=True)
    phase = eigenvalues[:, 0].angle()
    beta = 1 - eigenvalues[:, 1] / eigenvalues[:, 0]  # |1 - beta| = 1: a phase gate along k
    Psi = torch.randn(n, 2, 3, generator=gen, dtype=torch.complex128)
    zero = torch.zeros(n, 1, 1, dtype=torch.float64)
    _, state = f(
        to_pair(k)[:, None, None],
        to_pair(k)[:, None, None],
        torch.zeros(n, 1, 1, 6, dtype=torch.float64),
        torch.view_as_real(beta)[:, None, None],
        zero,
        phase[:, None, None, None].expand(n, 1, 1, 2),
        to_pair(Psi, -2)[:, None],
        "complex",
    )
    within = 1e-5 if f is entangle_fused else 1e-10
    torch.testing.assert_close(to_complex(state.double(), -2).squeeze(1), U @ Psi, atol=within, rtol=0)


def test_the_complex_rule_is_two_real_householder_steps(run):
    q, k, v, beta, log_alpha, theta, S = inputs(2, 20, 2, 3, 4, mode="complex")

    def twice(first, second):
        return torch.stack([first, second], 2).flatten(1, 2)

    zero = torch.zeros_like
    real, imag = v.chunk(2, -1)
    steps = twice(k, times_i(k)), twice(real, imag), twice(beta, beta), twice(log_alpha, zero(log_alpha))
    phase = twice(theta, zero(theta))
    o, state = run(q, k, v, beta, log_alpha, theta, state=S, mode="complex")
    o_re, state_2 = run(twice(q, q), *steps, phase, state=S, mode="real")
    o_im, _ = run(twice(q, times_i(q)), *steps, phase, state=S, mode="real")
    torch.testing.assert_close(o, torch.cat([o_re[:, 1::2], o_im[:, 1::2]], -1), **run.within)
    torch.testing.assert_close(state, state_2, **run.within)


@pytest.mark.parametrize("mode,disc", FORMS)
def test_gauge(run, mode, disc):
    """Phases of keys, queries and state are a matter of description: no output and no singular value depends on it."""
    q, k, v, beta, log_alpha, theta, S = inputs(2, 40, 2, 3, 4, mode=mode, disc=disc)
    o, state = run(q, k, v, beta, log_alpha, theta, state=S, mode=mode)
    turn = torch.randn(3, dtype=torch.float64)
    turned = rotate(q, turn), rotate(k, turn)
    o_turned, state_turned = run(*turned, v, beta, log_alpha, theta, state=rotate(S, turn[:, None], -2), mode=mode)
    torch.testing.assert_close(o_turned, o, **run.within)
    torch.testing.assert_close(state_turned, rotate(state, turn[:, None], -2), **run.within)
    Theta = theta.cumsum(1)
    o_still, state_still = run(rotate(q, -Theta), rotate(k, -Theta), v, beta, log_alpha, None, state=S, mode=mode)
    torch.testing.assert_close(o_still, o, **run.within)
    singular = [torch.linalg.svdvals(to_complex(x, -2)) for x in (state, state_still)]
    torch.testing.assert_close(*singular, **run.within)


@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
def test_without_creation_the_norm_never_grows(run, mode, disc, channels):
    *args, S = inputs(2, 40, 2, 3, 4, mode=mode, disc=disc, channels=channels)
    args[2].zero_()
    norms = [S.flatten(2).norm(dim=-1)]
    for t in range(1, 41):
        _, state = run(*(x[:, :t] for x in args), state=S, mode=mode)
        norms.append(state.flatten(2).norm(dim=-1))
    assert (torch.stack(norms).diff(dim=0) <= run.within["atol"]).all()


@pytest.mark.parametrize("f", [entangle_chunk, entangle_fused])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.3, 0.99), form=st.sampled_from(FORMS))
def test_the_state_stays_bounded_when_alpha_is_below_one(f, seed, alpha, form):
    mode, disc = form
    args = inputs(1, 200, 1, 2, 3, mode=mode, disc=disc, state=False, seed=seed)
    args[4].fill_(torch.tensor(alpha).log())
    _, state = f(*args, mode=mode)
    loudest = (2 * args[2].norm(dim=-1)).max()  # |beta| <= 2, |k| = 1
    assert state.norm() <= loudest / (1 - alpha) * (1 + 1e-5)


@pytest.mark.parametrize("mode,disc", FORMS)
def test_linear_in_values_and_state(run, mode, disc):
    q, k, v, beta, log_alpha, theta, S = inputs(1, 50, 2, 3, 4, mode=mode, disc=disc)
    v2, S2 = torch.randn_like(v), torch.randn_like(S)
    results = [
        run(q, k, values, beta, log_alpha, theta, state=state, mode=mode)
        for values, state in ((v, S), (v2, S2), (v - 3 * v2, S - 3 * S2))
    ]
    for a, b, both in zip(*results, strict=True):
        torch.testing.assert_close(both, a - 3 * b, **run.within)


@pytest.mark.parametrize("mode,disc", FORMS)
def test_causal(run, mode, disc):
    args = inputs(1, 70, 2, 3, 4, mode=mode, disc=disc)
    o, _ = run(*args[:6], state=args[6], mode=mode)
    for t in (0, 31, 40, 69):
        for i in range(6):
            changed = [x.clone() for x in args]
            changed[i][:, t] *= 0.5
            o_changed, _ = run(*changed[:6], state=args[6], mode=mode)
            torch.testing.assert_close(o_changed[:, :t], o[:, :t], atol=run.within["atol"] / 10, rtol=0)
            same = torch.allclose(o_changed[:, t:], o[:, t:], atol=run.within["atol"])
            assert same == (i in (0, 1))  # queries and keys have unit length


@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("cut", [1, 31, 32, 64, 69])
def test_a_sequence_may_be_split_anywhere(run, mode, disc, channels, cut):
    *args, S = inputs(2, 70, 1, 3, 4, mode=mode, disc=disc, channels=channels)
    o, state = run(*args, state=S, mode=mode)
    first, middle = run(*(x[:, :cut] for x in args), state=S, mode=mode)
    second, last = run(*(x[:, cut:] for x in args), state=middle, mode=mode)
    torch.testing.assert_close(torch.cat([first, second], 1), o, **run.within)
    torch.testing.assert_close(last, state, **run.within)
