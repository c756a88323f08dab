"""Random inputs of the op and a common way to run and compare it, for the tests in this folder."""

from functools import wraps

import torch

from qies.ops.entangle import chunk, cpu, naive, step
from qies.ops.entangle.layout import Inputs

NAMES = ("q", "k", "v", "beta", "log_alpha", "theta", "state")


def flat(form):
    """A form of the op with the seven tensors as arguments, as the public `entangle` takes them."""

    @wraps(form, assigned=("__name__", "__qualname__"))  # not __module__: pickled by its name here
    def called(q, k, v, beta, log_alpha, theta, state=None, mode="real"):
        return form(Inputs(q, k, v, beta, log_alpha, theta, state), mode)

    return called


entangle_naive, entangle_chunk = flat(naive.entangle_naive), flat(chunk.entangle_chunk)
entangle_fused, entangle_step = flat(cpu.entangle_fused), flat(step.entangle_step)


def inputs(B=1, T=8, H=1, m=3, V=4, *, mode="real", disc=False, channels=False, phase=True, state=True, seed=0):
    """The seven inputs in order (None for no phase or state), float64 with values that float32 holds exactly."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    def uniform(*shape):
        return torch.rand(*shape, generator=gen)

    q, k, v = normal(B, T, H, 2 * m), normal(B, T, H, 2 * m), normal(B, T, H, V * (2 if mode == "complex" else 1))
    beta = 2 * uniform(B, T, H)
    if disc:
        radius, angle = uniform(B, T, H).sqrt(), 2 * torch.pi * uniform(B, T, H)
        beta = torch.stack([1 - radius * angle.cos(), -radius * angle.sin()], -1)
    log_alpha = -0.3 * uniform(B, T, H, m) if channels else -0.3 * uniform(B, T, H)
    theta = normal(B, T, H, m) if phase else None
    S = normal(B, H, 2 * m, V) if state else None
    return [None if x is None else x.double() for x in (q, k, v, beta, log_alpha, theta, S)]


def evaluate(f, args, mode, dtype=None):
    """{"o", "state", and the gradient of a fixed random functional by every input} in float64."""
    args = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in args]
    *six, state = args
    o, final = f(*six, state=state, mode=mode)
    gen = torch.Generator().manual_seed(1)
    wo, ws = (torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.dtype) for x in (o, final))
    ((o * wo).sum() + (final * ws).sum()).backward()
    results = {"o": o, "state": final} | {f"d{n}": x.grad for n, x in zip(NAMES, args, strict=True) if x is not None}
    return {name: x.detach().double() for name, x in results.items()}


def assert_close(actual, expected, tolerance, floor=0.1):
    """Relative distance in the Frobenius norm, result by result; never a NaN. Norms below the floor count as it."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name} is {list(got.shape)}, not {list(want.shape)}"
        assert torch.isfinite(got).all(), f"{name} is not finite"
        error = (got - want).norm() / want.norm().clamp_min(floor)
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"
