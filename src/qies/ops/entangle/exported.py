"""The op as one node of an exported program whose text may have any length: `torch.ops.qies.entangle`.

A loop over chunks would be unrolled for the length of the example. The node runs the fastest form of the machine that
runs the program; import `qies.ops.entangle` before loading a saved program. It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qies.ops.entangle.layout import Inputs
from qies.ops.entangle.naive import empty_state

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor log_alpha, Tensor? theta, Tensor? state, str mode)"
    " -> (Tensor, Tensor)"
)


@torch.library.custom_op("qies::entangle", mutates_args=(), schema=SCHEMA)
def of_any_length(q, k, v, beta, log_alpha, theta, state, mode):
    """`entangle` of arguments that are known to fit; same shapes and returns."""
    from qies.ops.entangle import evolve

    return evolve(Inputs(q, k, v, beta, log_alpha, theta, state), mode)


@of_any_length.register_fake
def _shapes(q, k, v, beta, log_alpha, theta, state, mode) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), empty_state(Inputs(q, k, v, beta, log_alpha, theta, state), mode)
