"""What must hold whatever the numbers: quantum gates, gauge, norm, linearity, causality, continuation."""

import pytest
import torch
from entangle_cases import inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from qies.ops.entangle import entangle, entangle_chunk, entangle_naive, entangle_step
from qies.ops.pairs import rotate, times_i, to_complex, to_pair

FORMS = [("real", False), ("complex", False), ("complex", True)]


@pytest.mark.parametrize("f", [entangle_naive, entangle_chunk, entangle_step])
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
    torch.testing.assert_close(to_complex(state, -2).squeeze(1), U @ Psi, atol=1e-10, rtol=0)


def test_the_complex_rule_is_two_real_householder_steps():
    q, k, v, beta, log_alpha, theta, S = inputs(2, 20, 2, 3, 4, mode="complex")

    def twice(first, second):
        return torch.stack([first, second], 2).flatten(1, 2)

    zero = torch.zeros_like
    real, imag = v.chunk(2, -1)
    steps = twice(k, times_i(k)), twice(real, imag), twice(beta, beta), twice(log_alpha, zero(log_alpha))
    phase = twice(theta, zero(theta))
    o, state = entangle_chunk(q, k, v, beta, log_alpha, theta, S, "complex")
    o_re, state_2 = entangle_chunk(twice(q, q), *steps, phase, S, "real")
    o_im, _ = entangle_chunk(twice(q, times_i(q)), *steps, phase, S, "real")
    torch.testing.assert_close(o, torch.cat([o_re[:, 1::2], o_im[:, 1::2]], -1))
    torch.testing.assert_close(state, state_2)


@pytest.mark.parametrize("mode,disc", FORMS)
def test_gauge(mode, disc):
    """Phases of keys, queries and state are a matter of description: no output and no singular value depends on it."""
    q, k, v, beta, log_alpha, theta, S = inputs(2, 40, 2, 3, 4, mode=mode, disc=disc)
    o, state = entangle(q, k, v, beta, log_alpha, theta, state=S, mode=mode)
    turn = torch.randn(3, dtype=torch.float64)
    o_turned, state_turned = entangle(
        rotate(q, turn), rotate(k, turn), v, beta, log_alpha, theta, state=rotate(S, turn[:, None], -2), mode=mode
    )
    torch.testing.assert_close(o_turned, o)
    torch.testing.assert_close(state_turned, rotate(state, turn[:, None], -2))
    Theta = theta.cumsum(1)
    o_still, state_still = entangle(rotate(q, -Theta), rotate(k, -Theta), v, beta, log_alpha, None, state=S, mode=mode)
    torch.testing.assert_close(o_still, o)
    singular = [torch.linalg.svdvals(to_complex(x, -2)) for x in (state, state_still)]
    torch.testing.assert_close(*singular)


@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
def test_without_creation_the_norm_never_grows(mode, disc, channels):
    q, k, v, beta, log_alpha, theta, S = inputs(2, 30, 2, 3, 4, mode=mode, disc=disc, channels=channels)
    norms = [S.flatten(2).norm(dim=-1)]
    for t in range(30):
        now = slice(t, t + 1)
        _, S = entangle_step(
            q[:, now], k[:, now], 0 * v[:, now], beta[:, now], log_alpha[:, now], theta[:, now], S, mode
        )
        norms.append(S.flatten(2).norm(dim=-1))
    assert (torch.stack(norms).diff(dim=0) <= 1e-12).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.3, 0.99), st.sampled_from(FORMS))
def test_the_state_stays_bounded_when_alpha_is_below_one(seed, alpha, form):
    mode, disc = form
    args = inputs(1, 200, 1, 2, 3, mode=mode, disc=disc, state=False, seed=seed)
    args[4].fill_(torch.tensor(alpha).log())
    _, state = entangle_chunk(*args, mode)
    loudest = (2 * args[2].norm(dim=-1)).max()  # |beta| <= 2, |k| = 1
    assert state.norm() <= loudest / (1 - alpha) * (1 + 1e-6)


@pytest.mark.parametrize("mode,disc", FORMS)
def test_linear_in_values_and_state(mode, disc):
    q, k, v, beta, log_alpha, theta, S = inputs(1, 50, 2, 3, 4, mode=mode, disc=disc)
    v2, S2 = torch.randn_like(v), torch.randn_like(S)
    run = [
        entangle_chunk(q, k, values, beta, log_alpha, theta, state, mode)
        for values, state in ((v, S), (v2, S2), (v - 3 * v2, S - 3 * S2))
    ]
    for a, b, both in zip(*run, strict=True):
        torch.testing.assert_close(both, a - 3 * b)


@pytest.mark.parametrize("mode,disc", FORMS)
def test_causal(mode, disc):
    args = inputs(1, 70, 2, 3, 4, mode=mode, disc=disc)
    o, _ = entangle_chunk(*args, mode)
    for t in (0, 31, 40, 69):
        for i in range(6):
            changed = [x.clone() for x in args]
            changed[i][:, t] *= 0.5
            o_changed, _ = entangle_chunk(*changed, mode)
            torch.testing.assert_close(o_changed[:, :t], o[:, :t], atol=1e-13, rtol=0)
            assert torch.allclose(o_changed[:, t:], o[:, t:]) == (i in (0, 1))  # queries and keys have unit length


@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("cut", [1, 31, 32, 64, 69])
def test_a_sequence_may_be_split_anywhere(mode, disc, channels, cut):
    *args, S = inputs(2, 70, 1, 3, 4, mode=mode, disc=disc, channels=channels)
    o, state = entangle(*args, state=S, mode=mode)
    first, middle = entangle(*(x[:, :cut] for x in args), state=S, mode=mode)
    second, last = entangle(*(x[:, cut:] for x in args), state=middle, mode=mode)
    torch.testing.assert_close(torch.cat([first, second], 1), o, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(last, state, atol=1e-10, rtol=1e-10)
