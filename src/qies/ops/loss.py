"""Next-token cross-entropy from the hidden states, without materialising the `[N, V]` logits.

Legend: N tokens, D model width, V vocabulary.

The fast path processes the tokens in chunks and computes the gradients in the forward pass, so each logit is computed
once and stays in cache. The logits have the layout `[V, chunk]`, which gives the fastest matrix products. Soft-capped
logits are bounded, so the softmax needs no maximum. Its denominator is known only after the whole vocabulary, so it
scales the `[chunk, D]` operands of the gradients' products.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qies.errors import UserError
from qies.ops.autograd import first_order, transformed
from qies.ops.compiled import kernel
from qies.ops.simd import exp, flat, get, put, reread, write

TILE = 1 << 17  # half the numbers of the head that are cast or accumulated at once, for a cache of 2 MB
CHUNK = 512  # maximum number of tokens per chunk
HELD = 1 << 23  # maximum number of logits per chunk, unless a chunk then had fewer than CHUNK_MIN tokens
CHUNK_MIN = 256
LARGEST_CAP = 60.0  # beyond, exp(softcap) times a large vocabulary may overflow fp32


@torch.compiler.disable  # the kernel is already compiled
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = 15.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy in nats of `targets` under logits = softcap * tanh(hidden weight^T / softcap).

    Soft-capping of logits: Gemma 2, arXiv:2408.00118.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`.
        targets: int64 `[N]`, in [0, V) or `ignore_index`.
        softcap: The cap of the logits; None for no cap.
        ignore_index: The target of tokens that are ignored.
        reduction: "mean" averages over the targets that are not ignored (0 if all are); "none" returns `[N]`, 0 for
            ignored targets.

    The product runs in autocast's dtype; the rest and the result are float32 (float64 for float64). The fast path (on
    CPU, for "mean", outside torch.func) has no second derivative. Raises UserError for shapes that do not fit.
    """
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        raise UserError(
            "linear_cross_entropy takes hidden [N, D], weight [V, D] and targets [N]; got "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}."
        )
    if reduction not in ("mean", "none"):
        raise UserError(f"reduction must be 'mean' or 'none', not {reduction!r}.")
    if softcap is not None and not softcap > 0:
        raise UserError(f"softcap must be positive, or None for no cap; got {softcap}.")
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    dtype = _product_dtype(hidden, weight)
    if (
        dtype is None
        or transformed()
        or hidden.numel() == 0
        or (wants_grad and reduction == "none")
        or (softcap is not None and softcap > LARGEST_CAP)
    ):
        return _definition(hidden, weight, targets, softcap, ignore_index, reduction)
    if wants_grad:
        return _LinearCrossEntropy.apply(hidden, weight, targets, softcap, ignore_index, dtype)
    losses, _, _ = _chunked(hidden, weight, targets, softcap, ignore_index, dtype, False, False)
    return losses if reduction == "none" else losses.sum() / _count(targets, ignore_index)


def _definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int, reduction: str
) -> Tensor:
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    return losses if reduction == "none" else losses.sum() / _count(targets, ignore_index)


def _count(targets: Tensor, ignore_index: int) -> Tensor:
    return (targets != ignore_index).sum().clamp(min=1)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype of hidden @ weight^T if the fast path can run, else None."""
    if hidden.device.type != "cpu" or weight.device.type != "cpu":
        return None
    dtypes = {hidden.dtype, weight.dtype}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:
        dtypes = {torch.get_autocast_dtype("cpu")}
    dtype = dtypes.pop()
    return dtype if not dtypes and dtype in (torch.bfloat16, torch.float32) else None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        losses, *grads = _chunked(
            hidden, weight, targets, softcap, ignore_index, dtype, hidden.requires_grad, weight.requires_grad
        )
        ctx.save_for_backward(*grads)
        return losses.sum() / _count(targets, ignore_index)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad.item()
        grads = (g if g is None or scale == 1.0 else g * scale for g in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None,
    ignore_index: int,
    dtype: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses `[N]` and, if requested, the gradients of their mean with respect to hidden and weight."""
    tokens, width = hidden.shape
    vocab = weight.shape[0]
    kept = targets != ignore_index
    targets = targets.where(kept, 0)
    if targets.min() < 0 or targets.max() >= vocab:
        raise UserError(f"a target lies outside [0, {vocab}) and is not {ignore_index}; check the token ids.")

    # With a cap c the products are u = 2 logit / c, since c tanh(logit / c) = 2 c sigmoid(u) - c.
    wide = torch.float32
    gain = 1.0 if softcap is None else softcap / 2
    x = hidden.detach().to(dtype)
    w = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    rows = max(1, 2 * TILE // width)
    for part, source in zip(w.split(rows), weight.detach().split(rows), strict=True):
        part.copy_(source / gain)
    rate = kept.to(wide) / kept.sum().clamp(min=1)
    losses = x.new_empty(tokens, dtype=wide)
    d_hidden = x.new_empty(tokens, width, dtype=wide) if hidden_grad else None
    d_weight = x.new_empty(vocab, width, dtype=wide) if weight_grad else None

    chunk = min(CHUNK, max(CHUNK_MIN, HELD // vocab))
    chunk = -(-tokens // -(-tokens // chunk))  # the same number of chunks, of equal size
    w_t = w.T.contiguous() if hidden_grad and tokens > 4 * chunk else w.T  # the copy pays off slowly
    held = x.new_empty(vocab * chunk)
    for start in range(0, tokens, chunk):
        span = slice(start, start + chunk)
        count = len(x[span])
        logits = held[: vocab * count].view(vocab, count)
        torch.mm(w, x[span].T, out=logits)
        at_target = targets[span].unsqueeze(0)
        target = logits.gather(0, at_target).squeeze(0).to(wide)
        peak = torch.zeros_like(target) if softcap else logits.amax(0).to(wide)
        slope = torch.ones_like(target)
        if softcap:
            torch.mul(target.sigmoid_(), 1 - target, out=slope)
            target.mul_(2 * softcap).sub_(softcap)
        target.sub_(peak)
        total = torch.zeros_like(target)
        _exponentials(flat(logits), count, softcap or 0.0, flat(peak), flat(total), hidden_grad or weight_grad)
        losses[span] = total.log() - target

        # logits holds exp(logit - peak) d logit / d product; the targets, rate / total, and 4 with a cap complete the
        # gradient.
        if hidden_grad or weight_grad:
            logits.scatter_(0, at_target, ((target.exp() - total) * slope).to(dtype).unsqueeze(0))
        scale = (rate[span] / total).unsqueeze(1) * (4 if softcap else 1)
        if d_hidden is not None:
            torch.mul(torch.mm(w_t, logits).T, scale * gain, out=d_hidden[span])
        if d_weight is not None:
            scaled = (x[span] * scale).to(dtype)
            for part, tile in zip(d_weight.split(rows), logits.split(rows), strict=True):
                if start == 0:
                    part.copy_(torch.mm(tile, scaled))
                else:
                    part += torch.mm(tile, scaled).to(wide)
    return losses.where(kept, 0), d_hidden, d_weight


@kernel
def _exponentials(logits, columns, softcap, peak, total, keep):
    """Add exp(logit - peak), summed over the rows of the products `[v, columns]`, to total `[columns]`.

    A softcap of 0 is no cap. With `keep`, overwrite each product by exp(logit - peak) d logit / d product, or a quarter
    of it with a cap.
    """
    if softcap > 0:
        cap = np.float32(softcap)
        for row in range(0, len(logits), columns):
            for c in range(columns):
                u = reread(logits, row + c)
                tail = exp(-abs(u))
                gate = (np.float32(1) if u >= 0 else tail) / (np.float32(1) + tail)
                value = exp(cap * (np.float32(2) * gate - np.float32(1)))
                put(total, c, get(total, c) + value)
                if keep:
                    write(logits, row + c, value * (gate * (np.float32(1) - gate)))
    else:
        for row in range(0, len(logits), columns):
            for c in range(columns):
                value = exp(reread(logits, row + c) - get(peak, c))
                put(total, c, get(total, c) + value)
                if keep:
                    write(logits, row + c, value)
