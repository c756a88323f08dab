"""The chunkwise form: parallel inside chunks, a scan over them, and a backward written by hand. README.md derives it.

Nothing of the size of the state is kept per token. Of each chunk the backward keeps the rotated unit keys and queries,
the triangular inverse, the corrected values and the state it started from, and recomputes the rest.

Shapes inside: G chunks of C tokens at a time, N = batch rows times heads, r key rows a token (1 in real mode, 2 in
complex mode), R = C r, K = 2m, V values. Tiles are laid out chunk first, `[G, N, R, ..]`, so that every product is
one batched product of contiguous matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qies.ops.entangle.decay import ChannelDecay, HeadDecay
from qies.ops.entangle.naive import working_dtype
from qies.ops.entangle.products import Products
from qies.ops.entangle.tile import TURN, Shape, Tile
from qies.ops.pairs import rotate

CHUNK_ROWS = 64
TILE = 1 << 16  # elements of one [G, N, R, K] tensor: a handful of them fit in a core's second-level cache


def entangle_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor,
    theta: Tensor | None,
    state: Tensor | None = None,
    mode: str = "real",
) -> tuple[Tensor, Tensor]:
    """`entangle` in chunks; same shapes and returns.

    Large products run in bfloat16 under CPU bfloat16 autocast or when v is bfloat16; sums, decay, phase, the
    triangular inverse and the carried state never do.
    """
    r = 1 if mode == "real" else 2
    device = q.device.type
    low = v.dtype == torch.bfloat16
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device) == torch.bfloat16
    inputs = (q, k, v, beta, log_alpha, theta, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _Chunked.apply(*inputs, r, low, keep)


def tiled(x: Tensor, span: Span, b: int) -> Tensor:
    """An input `[B, T, H, ..]` over a span as a view `[columns, chunks, b, H, C, ..]`."""
    x = x[:, span.start : span.stop].unflatten(1, (-1, span.C)).unflatten(0, (-1, b))
    return x.permute(0, 2, 1, 4, 3, *range(5, x.ndim))


def grid(x: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of everything by column and chunk."""
    return [column.unbind(0) for column in x.unbind(0)]


class Span(NamedTuple):
    """Tokens start to stop in chunks of C."""

    start: int
    stop: int
    C: int


def spans(T: int, C: int) -> list[Span]:
    """Whole chunks, then one that is as short as what is left."""
    whole = T - T % C
    return [s for s in (Span(0, whole, C), Span(whole, T, T - whole)) if s.C and s.stop > s.start]


def rows_a_tile(B: int, elements: int) -> int:
    """The largest divisor of the batch whose rows fit in a tile."""
    return max((b for b in range(1, B + 1) if B % b == 0 and b * elements <= TILE), default=1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, beta, log_alpha, theta, state, r: int, low: bool, keep: bool):
        dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
        B, T, H, K = q.shape
        V = v.shape[-1] // r
        C = min(T, CHUNK_ROWS // r)
        b = rows_a_tile(B, H * C * r * max(K, V))
        o = torch.empty_like(v)
        final = q.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype, copy=True)
        phase = torch.zeros(B, H, 1, K // 2, dtype=torch.float64, device=q.device)
        phases, states = phase.split(b), final.view(-1, b * H, K, V).unbind(0)
        saved = []
        with Products(low, q.device) as product:
            for span in spans(T, C):
                tile, decay, betas = prepare(span, b, V, r, beta, log_alpha, theta, product, q, dtype)
                qs, ks, vs, os = (grid(tiled(x, span, b)) for x in (q, k, v, o))
                thetas = None if theta is None else grid(tiled(theta, span, b))
                kept = keeping(tile, betas.shape[:2], low, theta is not None)
                places = [grid(x) for x in kept]
                for i, (S, turned) in enumerate(zip(states, phases, strict=True)):
                    for j in range(betas.shape[1]):
                        norm, *rest = (x[i][j] for x in places)
                        tile.load(qs[i][j], ks[i][j], norm)
                        if thetas is not None:
                            tile.rotate(thetas[i][j], turned)
                        tile.write_along(betas[i, j])
                        decay.select(i, j)
                        decay.inside()
                        decay.read(S)
                        tile.read(vs[i][j], os[i][j])
                        if keep:
                            for place, x in zip(rest, tile.kept(S), strict=True):
                                place.copy_(x)
                        decay.write(S)
                saved += kept
        if keep:
            ctx.save_for_backward(q, k, v, beta, log_alpha, theta, state, phase, final.clone(), *saved)
            ctx.layout = (C, b, r, low, dtype)
        if theta is not None:
            final = rotate(final, (phase * TURN).to(dtype).mT, -2)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor):
        q, k, v, beta, log_alpha, theta, state, phase, final, *saved = ctx.saved_tensors
        final = final.clone()
        C, b, r, low, dtype = ctx.layout
        B, T, H, K = q.shape
        V = v.shape[-1] // r
        dq, dk, dv, dbeta, dlog_alpha = (torch.empty_like(x) for x in (q, k, v, beta, log_alpha))
        dtheta = None if theta is None else torch.empty_like(theta)
        dstate = dfinal.to(dtype)
        if theta is None:
            dstate = dstate.clone()
        else:
            dstate = rotate(dstate, -(phase * TURN).to(dtype).mT, -2)
            (re, im), (dre, dim) = final.chunk(2, 2), dstate.chunk(2, 2)
            laters = (re * dim - im * dre).sum(-1).view(-1, b * H, 1, K // 2).unbind(0)
        dstates, afters = (x.view(-1, b * H, K, V).unbind(0) for x in (dstate, final))
        with Products(low, q.device) as product:
            for span in reversed(spans(T, C)):
                tile, decay, betas = prepare(span, b, V, r, beta, log_alpha, theta, product, q, dtype)
                names = 7 if theta is not None else 6
                kept, saved = saved[-names:], saved[:-names]
                places = [grid(x) for x in kept]
                dos, dqs, dks, dvs = (grid(tiled(x, span, b)) for x in (do, dq, dk, dv))
                dthetas = None if dtheta is None else grid(tiled(dtheta, span, b))
                dbetas = torch.empty_like(betas)
                along = torch.empty(*betas.shape[:3], 2, span.C, 1, dtype=dtype, device=q.device)
                for i, dS in enumerate(dstates):
                    tile.after.copy_(afters[i])
                    for j in reversed(range(betas.shape[1])):
                        norm, *rest = (x[i][j] for x in places)
                        for place, x in zip(rest, tile.kept(tile.S), strict=True):
                            x.copy_(place)
                        tile.write_along(betas[i, j])
                        decay.select(i, j)
                        decay.write_back(dS)
                        tile.read_back(dos[i][j], dvs[i][j])
                        decay.backward(dS, tile.S, tile.after)
                        tile.S, tile.after = tile.after, tile.S
                        tile.write_back(betas[i, j], along[i, j], dbetas[i, j])
                        if dthetas is not None:
                            tile.rotate_back(dthetas[i][j], laters[i])
                        tile.store(norm, dqs[i][j], dks[i][j])
                    afters[i].copy_(tile.after)
                decay.finish(tiled(dlog_alpha, span, b), along.squeeze(-1), (betas * dbetas).sum(-1))
                view = tiled(dbeta, span, b)
                view.copy_(dbetas.view(view.shape))
        return dq, dk, dv, dbeta, dlog_alpha, dtheta, None if state is None else dstate, None, None, None


def prepare(span, b, V, r, beta, log_alpha, theta, product, q, dtype):
    """The tile, the decay and beta `[columns, chunks, N, C, 1 or 2]` of a span."""
    _, _, H, K = q.shape
    like = torch.empty(0, dtype=dtype, device=q.device)
    tile = Tile(Shape(b, H, span.C, K, V, r), theta is not None, product, like)
    decay = (HeadDecay if log_alpha.ndim == 3 else ChannelDecay)(tile, tiled(log_alpha, span, b))
    betas = tiled(beta, span, b).to(dtype).flatten(2, 3)
    return tile, decay, (betas.unsqueeze(-1) if beta.ndim == 3 else betas).contiguous()


def keeping(tile: Tile, grid_shape, low: bool, phases: bool) -> list[Tensor]:
    """Room for what the backward needs of every chunk: the norms, then the tile's `kept` in the products' precision."""
    kept = tile.kept(tile.S)
    dtype = torch.bfloat16 if low and tile.S.dtype == torch.float32 else tile.S.dtype
    N, C = tile.shape.N, tile.shape.C
    return [tile.S.new_empty(*grid_shape, N, 2, C, 1)] + [
        torch.empty(*grid_shape, *x.shape, dtype=dtype, device=x.device) for x in kept
    ]
