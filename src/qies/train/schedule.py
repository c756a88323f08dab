"""Warm-up, stable, decay: the learning rate as a pure function of the step."""

from __future__ import annotations


def warmup_stable_decay(step: int, steps: int, warmup: float, decay: float) -> float:
    """The factor on the learning rate at `step` in [0, steps): linear up over the first `warmup` share of the steps,
    1, then linear to 0 over the last `decay` share (Hu et al., MiniCPM, arXiv:2404.06395; linear to zero: Bergsma et
    al., arXiv:2502.15938)."""
    up, down = round(warmup * steps), round(decay * steps)
    factor = 1.0
    if step < up:
        factor = (step + 1) / up
    if step >= steps - down:
        factor = min(factor, (steps - step) / (down + 1))
    return factor
