"""Causal softmax attention over unpadded sequences, or over several texts packed into one.

Legend: B batch, H heads, T position, K width per head.

The backward pass of torch's flash kernel is slow on CPU. Up to LONGEST positions, the scores are instead computed in
blocks of some heads, ROWS queries and all keys up to the last query. This skips nearly half of the scores and leaves
each row's softmax in one block. The probabilities are saved for the backward pass: T / 2 numbers per head and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.autograd import first_order, transformed

ROWS = 128  # queries per block
SCORES = 1 << 20  # maximum number of scores per block: fewer calls matter more than cache locality here
LONGEST = 4096  # beyond, the memory of the probabilities outweighs twice the speed of the flash kernel


def causal_attention(q: Tensor, k: Tensor, v: Tensor, texts: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + causal mask) v. q, k, v and the result are `[B, H, T, K]`.

    texts `[B, T]`: a number for each token; a token attends only to tokens with the same number. None: one text per
    row.

    Exact, in autocast's dtype if enabled. The hand-written gradient (on CPU, outside torch.func) has no second
    derivative.
    """
    if transformed() and not torch.compiler.is_exporting():
        return _written_out(q, k, v, texts)
    if transformed() or not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return _definition(q, k, v, texts)
    same = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    if q.device.type != "cpu" or not same or q.dim() != 4 or q.shape[2] > LONGEST or q.numel() == 0:
        return _definition(q, k, v, texts)
    if torch.is_autocast_enabled("cpu") and q.dtype != torch.float64:
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    return _CausalAttention.apply(q, k, v, texts)


def _definition(q: Tensor, k: Tensor, v: Tensor, texts: Tensor | None) -> Tensor:
    if texts is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_allowed(q, texts))


def _written_out(q: Tensor, k: Tensor, v: Tensor, texts: Tensor | None) -> Tensor:
    """Attention in operations that have derivatives of any order, unlike torch's fused kernels."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~_allowed(q, texts), -torch.inf).softmax(-1).to(v.dtype) @ v


def _allowed(q: Tensor, texts: Tensor | None) -> Tensor:
    """The keys that each query attends to, bool `[T, T]` or `[B, 1, T, T]`."""
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return causal if texts is None else causal & (texts[:, None, :, None] == texts[:, None, None, :])


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, texts: Tensor | None) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        qs, ks, vs, outs = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v, out))
        owner = None if texts is None else texts.repeat_interleave(q.shape[1], 0)
        later = torch.full((ROWS, ROWS), -torch.inf, dtype=q.dtype).triu_(1)
        kept = []
        for heads, rows, keys in _blocks(qs):
            probs = _product(qs[heads, rows], ks[heads, keys].mT, q.shape[-1] ** -0.5)
            probs[..., rows] += later[: probs.shape[1], : probs.shape[1]]
            if owner is not None:
                probs.masked_fill_(owner[heads, rows, None] != owner[heads, None, keys], -torch.inf)
            torch.softmax(probs, -1, out=probs)
            outs[heads, rows] = _product(probs, vs[heads, keys])
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        qs, ks, vs, gs = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v, grad))
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q, d_k, d_v = (torch.empty(qs.shape, dtype=dtype) for dtype in (q.dtype, wide, wide))
        for probs, (heads, rows, keys) in zip(kept, _blocks(qs), strict=True):
            scores = _product(gs[heads, rows], vs[heads, keys].mT)
            torch.ops.aten._softmax_backward_data.out(scores, probs, -1, q.dtype, grad_input=scores)
            d_q[heads, rows] = _product(scores, ks[heads, keys], q.shape[-1] ** -0.5)
            d_key = _product(scores.mT, qs[heads, rows], q.shape[-1] ** -0.5)
            d_value = _product(probs.mT, gs[heads, rows])
            if keys.stop == q.shape[2]:  # the first block of these heads covers all keys
                d_k[heads], d_v[heads] = d_key, d_value
            else:
                d_k[heads, keys] += d_key.to(wide)
                d_v[heads, keys] += d_value.to(wide)
        return *(t.to(q.dtype).view(q.shape) for t in (d_q, d_k, d_v)), None


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Heads, queries and keys of each block of x `[heads, T, K]`, the last queries first."""
    count, length, _ = x.shape
    group = max(1, SCORES // (min(ROWS, length) * length))
    for head in range(0, count, group):
        for row in reversed(range(0, length, ROWS)):
            end = min(row + ROWS, length)
            yield slice(head, head + group), slice(row, end), slice(0, end)


def _product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale a b for batches of matrices. Operands that are neither contiguous nor transposed are copied first."""
    a, b = (t.mT.contiguous().mT if t.stride(-1) != 1 else t.contiguous() for t in (a, b))
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
