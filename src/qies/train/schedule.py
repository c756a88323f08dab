"""Warm-up, stable, decay: the learning rate as a pure function of the step."""

from __future__ import annotations


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: int) -> float:
    """The learning-rate factor at `step` in [0, steps): linear warm-up over the first `warmup` steps, constant, linear
    decay to 0 over the last `decay` steps (Hu et al., MiniCPM, arXiv:2404.06395; decay to zero: Bergsma et al.,
    arXiv:2502.15938).

    Before the decay the factor does not depend on `steps`, so runs with different budgets can share that part: a trunk,
    and a branch for each budget.
    """
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    if step >= steps - decay:
        factor = min(factor, (steps - step) / (decay + 1))
    return factor
