"""Warm-up, stable, decay: the learning rate as a pure function of the step."""

from __future__ import annotations


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: int) -> float:
    """The factor on the learning rate at `step` in [0, steps): linear up over the first `warmup` steps, 1, then linear
    to 0 over the last `decay` steps (Hu et al., MiniCPM, arXiv:2404.06395; linear to zero: Bergsma et al.,
    arXiv:2502.15938).

    Before the decay it does not depend on `steps`, so runs of several budgets share that part: one trunk, and a branch
    for each budget.
    """
    factor = 1.0
    if step < warmup:
        factor = (step + 1) / warmup
    if step >= steps - decay:
        factor = min(factor, (steps - step) / (decay + 1))
    return factor
