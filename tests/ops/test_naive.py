"""The definition against arithmetic that is not ours: native complex numbers, Householder steps, U(2)."""

import pytest
import torch
from entangle_cases import assert_close, entangle_naive, entangle_step, evaluate, inputs

from qies.ops.entangle import entangle
from qies.ops.pairs import to_complex, to_pair


def native(q, k, v, beta, log_alpha, theta, *, state, mode):
    """Psi in C^{m x V} with torch's complex128; for mode="complex" every formula as it stands on paper."""
    assert mode == "complex"
    q, k, v, Psi = (to_complex(x, -2 if x is state else -1) for x in (q, k, v, state))
    q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q, k))
    # the state's rows are Re | Im and so are v's columns: the matrix of Psi is complex in its values too
    beta = torch.view_as_complex(beta.contiguous()) if beta.ndim == 4 else beta.to(Psi.dtype)
    outputs = []
    for t in range(q.shape[1]):
        alpha = log_alpha[:, t].exp()
        Psi = torch.exp(1j * theta[:, t])[..., None] * Psi
        Psi = (alpha[..., None, None] if alpha.ndim == 2 else alpha[..., None]) * Psi
        kk = k[:, t, :, :, None] @ k[:, t, :, None].conj()
        Psi = (
            Psi
            - beta[:, t, :, None, None] * (kk @ Psi)
            + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        )
        outputs.append(to_pair((q[:, t, :, None].conj() @ Psi).squeeze(-2)))
    return torch.stack(outputs, 1), to_pair(Psi, -2)


@pytest.mark.parametrize("disc", [False, True])
@pytest.mark.parametrize("channels", [False, True])
def test_complex_mode_is_native_complex_arithmetic(disc, channels):
    args = inputs(2, 12, 3, 3, 2, mode="complex", disc=disc, channels=channels)
    assert_close(evaluate(entangle_naive, args, "complex"), evaluate(native, args, "complex"), 1e-10)


@pytest.mark.parametrize("mode,disc", [("real", False), ("complex", False), ("complex", True)])
@pytest.mark.parametrize("channels", [False, True])
def test_step_is_one_token_of_the_recurrence(mode, disc, channels):
    for phase in (False, True):
        for state in (False, True):
            args = inputs(2, 1, 3, 2, 3, mode=mode, disc=disc, channels=channels, phase=phase, state=state)
            expected = evaluate(entangle_naive, args, mode)
            assert_close(evaluate(entangle_step, args, mode), expected, 1e-12)
            assert_close(evaluate(entangle, args, mode), expected, 1e-12)
