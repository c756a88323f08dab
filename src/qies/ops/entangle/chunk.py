"""The chunkwise form: parallel inside chunks, a scan over them, and a backward written by hand. README.md derives it.

Nothing as large as the state is kept per token. Of each chunk the backward keeps the unit keys and queries, the
triangular inverse, the values written and the state the chunk started from, in bfloat16 where that is asked for.

The batch is cut into columns of a few rows and the time into chunks; a tile (tile.py) is one chunk of one column.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qies.ops.entangle.damping import ANCHOR, Damping, calm, through
from qies.ops.entangle.naive import working_dtype
from qies.ops.entangle.products import Products
from qies.ops.entangle.spans import Span, grid, spans, tiled
from qies.ops.entangle.tile import TURN, Shape, Tile, workspace
from qies.ops.pairs import rotate

TILE = 1 << 16  # elements of the keys of a tile: its dozen buffers of that size stay near the core


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
    """`entangle` in chunks; same shapes and returns. Once differentiable.

    Under CPU bfloat16 autocast, or when v is bfloat16, large products may round their operands to bfloat16 and what is
    kept for the backward is bfloat16; sums, decay, phase, the inverse and the carried state are float32 or wider.
    """
    device = q.device.type
    low = v.dtype == torch.bfloat16
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device) == torch.bfloat16
    inputs = (q, k, v, beta, log_alpha, theta, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return _Chunked.apply(*inputs, 1 if mode == "real" else 2, low, keep)


def tame(theta: Tensor) -> Tensor:
    """theta less its whole turns if it has any: sums of small angles stay exact in float32."""
    low, high = theta.aminmax()
    if max(-low, high) <= TURN:
        return theta
    turns = theta.double() / TURN
    return ((turns - turns.round()) * TURN).to(working_dtype(theta))


class Layout(NamedTuple):
    """How a call is cut: batch rows a column, tokens a chunk, values, key rows a token; and in what precision."""

    b: int
    C: int
    V: int
    r: int
    low: bool
    dtype: torch.dtype

    @staticmethod
    def of(q: Tensor, v: Tensor, log_alpha: Tensor, r: int, low: bool, dtype: torch.dtype) -> Layout:
        (B, T, H, K), V = q.shape, v.shape[-1] // r
        rows = 64 if 64 * B * H * max(K, V) <= TILE // 2 else 32  # few heads: fewer, longer steps
        C = calm(log_alpha, min(T, rows // r))
        fits = TILE // (H * C * r * max(K, V))
        b = max((n for n in range(1, B + 1) if B % n == 0 and n <= fits), default=1)
        return Layout(b, C, V, r, low, dtype)

    def views(self, x: Tensor | None, span: Span, values: bool = False) -> list[tuple[Any, ...]]:
        """Of an input `[B, T, H, ..]`, or of values `[B, T, H, rV]`, by column and chunk: `[b, H, C, .. or r, V]`."""
        if x is None:
            return []
        return grid(tiled(x.unflatten(-1, (self.r, self.V)) if values else x, span, self.b))

    def prepare(
        self, span: Span, q: Tensor, beta: Tensor, log_alpha: Tensor, phases: bool, product: Products
    ) -> tuple[Tile, Damping, Tensor]:
        """The tile, the damping and beta `[columns, chunks, N, C, 1 or 2]` of a span."""
        H, K = q.shape[2:]
        like = torch.empty(0, dtype=self.dtype, device=q.device)
        tile = workspace.tile(Shape(self.b, H, span.C, K, self.V, self.r), phases, product, like)
        betas = tiled(beta, span, self.b).to(self.dtype).flatten(2, 3)
        betas = betas.unsqueeze(-1) if beta.ndim == 3 else betas
        return tile, Damping(log_alpha, span, self.b, self.dtype), betas.contiguous()

    def room(self, tile: Tile, columns: int, chunks: int) -> list[Tensor]:
        """For what the backward needs of every chunk: the lengths, the tile's `kept` and the state before it."""
        store = torch.bfloat16 if self.low and self.dtype == torch.float32 else self.dtype
        lengths = tile.x.pairs.new_empty(columns, chunks, *tile.x.pairs.shape[:-1], 1)
        return [lengths] + [x.new_empty(columns, chunks, *x.shape, dtype=store) for x in (tile.kept, tile.Z)]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, beta, log_alpha, theta, state, r: int, low: bool, keep: bool):
        dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
        layout = Layout.of(q, v, log_alpha, r, low, dtype)
        (B, T, H, K), V, N = q.shape, layout.V, layout.b * q.shape[2]
        o = torch.empty_like(v)
        Z = q.new_zeros(B, H, V, K, dtype=dtype) if state is None else state.mT.to(dtype, copy=True).contiguous()
        phase = q.new_zeros(B, H, 1, K // 2, dtype=dtype)
        tamed = None if theta is None else tame(theta)
        saved: list[Tensor] = []
        with Products(low, q.device) as product:
            for span in spans(T, layout.C):
                tile, damping, betas = layout.prepare(span, q, beta, log_alpha, theta is not None, product)
                qs, ks, thetas = (layout.views(x, span) for x in (q, k, tamed))
                vs, os = (layout.views(x, span, values=True) for x in (v, o))
                columns, chunks = betas.shape[:2]
                kept = layout.room(tile, columns if keep else 1, chunks if keep else 1)
                lengths, tiles, states = (grid(x) for x in kept)
                for i, (S, turned) in enumerate(zip(Z.view(-1, N, V, K), phase.view(-1, N, 1, K // 2), strict=True)):
                    tile.Z.copy_(S)
                    for j in range(chunks):
                        at = (i, j) if keep else (0, 0)
                        read, undo, enter = damping.at(i, j)
                        tile.load(qs[i][j], ks[i][j], read, lengths[at[0]][at[1]])
                        if theta is not None:
                            tile.rotate(thetas[i][j], turned)
                        tile.write_along(betas[i, j], undo)
                        tile.Z.mul_(enter)
                        tile.forward(vs[i][j], os[i][j])
                        if keep:
                            tiles[i][j].copy_(tile.kept)
                            states[i][j].copy_(tile.Z)
                        tile.advance()
                    torch.mul(tile.Z, damping.leave[i], out=S)
                saved += kept
        if keep:
            ctx.save_for_backward(q, k, v, beta, log_alpha, theta, state, phase, Z, *saved)
            ctx.layout = layout
        final = Z if theta is None else rotate(Z, phase * TURN)
        return o, final.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor):
        q, k, v, beta, log_alpha, theta, state, phase, Z, *saved = ctx.saved_tensors
        layout: Layout = ctx.layout
        T, K, V, N = q.shape[1], q.shape[3], layout.V, layout.b * q.shape[2]
        dq, dk, dv, dbeta, dlog_alpha = (torch.empty_like(x) for x in (q, k, v, beta, log_alpha))
        dtheta = None if theta is None else torch.empty_like(theta)
        dZ = dfinal.mT.to(layout.dtype, copy=True).contiguous()
        if theta is not None:
            dZ = rotate(dZ, phase * -TURN)
        passing, later = through(Z.view(-1, N, V, K), dZ.view(-1, N, V, K))
        with Products(layout.low, q.device) as product:
            for span in reversed(spans(T, layout.C)):
                tile, damping, betas = layout.prepare(span, q, beta, log_alpha, theta is not None, product)
                lengths, tiles, states = (grid(x) for x in saved[-3:])
                del saved[-3:]
                dqs, dks, dthetas = (layout.views(x, span) for x in (dq, dk, dtheta))
                dos, dvs = (layout.views(x, span, values=True) for x in (do, dv))
                columns, chunks = betas.shape[:2]
                dbetas = torch.empty_like(betas)
                along = betas.new_empty(columns, chunks, N, 2, span.C)
                passed = betas.new_empty(columns, -(-chunks // ANCHOR), N, K)
                for i, dS in enumerate(dZ.view(-1, N, V, K)):
                    torch.mul(dS, damping.leave[i], out=tile.dZ)
                    passed[i, -1] = passing[i]
                    for j in reversed(range(chunks)):
                        read, undo, enter = damping.at(i, j)
                        tile.kept.copy_(tiles[i][j])
                        tile.Z.copy_(states[i][j])
                        tile.write_along(betas[i, j], undo)
                        tile.backward(dos[i][j], dvs[i][j])
                        damping.balance(i, j, tile)
                        tile.write_back(betas[i, j], undo, along[i, j], dbetas[i, j])
                        if theta is not None:
                            tile.rotate_back(dthetas[i][j], later[i])
                        tile.store(read, lengths[i][j], dqs[i][j], dks[i][j])
                        if j % ANCHOR == 0:
                            passing[i], later[i] = through(tile.Z, tile.dZ)
                            if j:
                                passed[i, j // ANCHOR - 1] = passing[i]
                        tile.dZ.mul_(enter)
                    dS.copy_(tile.dZ)
                written = (betas * dbetas).sum(-1)
                damping.gradient(along.sum(3) - 2 * written, passed, tiled(dlog_alpha, span, layout.b))
                target = tiled(dbeta, span, layout.b)
                target.copy_(dbetas.view(target.shape))
        return dq, dk, dv, dbeta, dlog_alpha, dtheta, None if state is None else dZ.mT, None, None, None
