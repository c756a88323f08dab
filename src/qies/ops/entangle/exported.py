"""The op as one node of an exported program whose text may have any length: `torch.ops.qies.entangle`.

A loop over chunks would be unrolled for the length of the example. The node runs whatever form is fastest where the
program runs; `import qies.ops.entangle` has to come before a saved program is loaded. It has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor log_alpha, Tensor? theta, Tensor? state, str mode)"
    " -> (Tensor, Tensor)"
)


@torch.library.custom_op("qies::entangle", mutates_args=(), schema=SCHEMA)
def of_any_length(q, k, v, beta, log_alpha, theta, state, mode):
    """`entangle` of arguments that are known to fit; same shapes and returns."""
    from qies.ops.entangle import evolve

    return evolve(q, k, v, beta, log_alpha, theta, state=state, mode=mode)


@of_any_length.register_fake
def _shapes(q, k, v, beta, log_alpha, theta, state, mode) -> tuple[Tensor, Tensor]:
    from qies.ops.entangle.naive import working_dtype

    dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
    channels = v.shape[-1] // (2 if mode == "complex" else 1)
    return torch.empty_like(v), v.new_empty(len(q), *q.shape[2:], channels, dtype=dtype)
