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

from qies.ops.entangle.naive import working_dtype
from qies.ops.entangle.products import Products
from qies.ops.entangle.tile import TURN, Shape, Tile, workspace
from qies.ops.pairs import rotate

CHUNK_ROWS = 32
TILE = 1 << 16  # elements of the tensor [N, R, K] of a tile


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


FAINT = 32.0  # damping of a token beyond e^-32 is damping to nothing, also in float64
ANCHOR = 16  # chunks after which running sums of gradients start anew from the state, so that rounding does not add up
CALM = 80.0  # damping within a chunk is at most e^-80: rescaled by its root nothing over- or underflows in float32


class Span(NamedTuple):
    """Tokens start to stop in chunks of C."""

    start: int
    stop: int
    C: int


def spans(T: int, C: int) -> list[Span]:
    """Whole chunks, then one that is as short as what is left."""
    whole = T - T % C
    return [s for s in (Span(0, whole, C), Span(whole, T, T - whole)) if s.stop > s.start]


def calm(log_alpha: Tensor, C: int) -> int:
    """The longest chunk, C halved as often as it takes, in which damping stays above e^-CALM everywhere."""
    damping = log_alpha.detach().clamp(-FAINT, 0).neg()
    while C > 1 and any(
        damping[:, s.start : s.stop].unflatten(1, (-1, s.C)).sum(2, dtype=torch.float32).amax() > CALM
        for s in spans(log_alpha.shape[1], C)
    ):
        C = (C + 1) // 2
    return C


def tame(theta: Tensor) -> Tensor:
    """theta, or if it has turns to lose theta without them: sums of small angles stay exact enough in float32."""
    low, high = theta.aminmax()
    if max(-low, high) <= TURN:
        return theta
    turns = theta.double() / TURN
    return ((turns - turns.round()) * TURN).to(theta.dtype if theta.dtype == torch.float64 else torch.float32)


def rows_a_tile(B: int, elements: int) -> int:
    """The largest divisor of the batch whose rows fit in a tile."""
    return max((b for b in range(1, B + 1) if B % b == 0 and b * elements <= TILE), default=1)


def tiled(x: Tensor, span: Span, b: int) -> Tensor:
    """An input `[B, T, H, ..]` over a span as a view `[columns, chunks, b, H, C, ..]`."""
    x = x[:, span.start : span.stop].unflatten(1, (-1, span.C)).unflatten(0, (-1, b))
    return x.permute(0, 2, 1, 4, 3, *range(5, x.ndim))


def grid(x: Tensor | None) -> list[tuple[Any, ...]]:
    """Views of everything by column and chunk."""
    return [] if x is None else [column.unbind(0) for column in x.unbind(0)]


class Damping:
    """The decays of a span, by column and chunk.

    With g the running sum of log_alpha in a chunk and c half its last value: `read` e^{g - c}, `undo` e^{2(c - g)} and
    `enter`, which takes the state from the scale it left the chunk before in to this chunk's.
    """

    def __init__(self, log_alpha: Tensor, span: Span, b: int, dtype: torch.dtype):
        self.source = tiled(log_alpha, span, b)
        self.per_head = log_alpha.ndim == 3
        self.dtype = dtype
        total = self.source.to(dtype).clamp(min=-FAINT).sum(4).flatten(2, 3)
        if self.per_head:
            total = total.unsqueeze(-1)
            g = self.source.to(dtype).clamp(min=-FAINT).cumsum(-1).flatten(2, 3).unsqueeze(-1)
            c = g[..., -1:, :] / 2
            self.reads, self.undos = (g - c).exp().unsqueeze(3), (2 * (c - g)).exp()
        else:
            total = torch.cat([total, total], -1)
        half = (total / 2).unsqueeze(-2)
        self.leave = half[:, -1].exp()  # [columns, N, 1, 1 or K]
        self.enters = (half + torch.cat([torch.zeros_like(half[:, :1]), half[:, :-1]], 1)).exp()

    def at(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """read `[N, 1, C, 1 or K]`, undo `[N, C, 1 or K]`, enter `[N, 1, 1 or K]`."""
        if self.per_head:
            return self.reads[i, j], self.undos[i, j], self.enters[i, j]
        g = self.source[i, j].to(self.dtype).clamp(min=-FAINT).cumsum(2).flatten(0, 1)
        read = (g - g[:, -1:] / 2).exp_()
        read = torch.cat([read, read], -1)
        return read.unsqueeze(1), read.square().reciprocal_(), self.enters[i, j]


    def gradient(self, dg: Tensor, passed: Tensor, out: Tensor) -> None:
        """The gradient of log_alpha: the sum of dg over the tokens that follow and of what passes on to later ones.

        dg `[columns, chunks, N, C, 1 or K]` is what a token's reads gain from a louder past less what its write loses;
        passed `[columns, anchors, N, 1 or K]` is what passes at the end of every ANCHOR chunks.
        """
        if not self.per_head:
            dg, passed = sum(dg.chunk(2, -1)), sum(passed.chunk(2, -1))
        for n in range(passed.shape[1]):
            part = slice(n * ANCHOR, (n + 1) * ANCHOR)
            rest = dg[:, part].transpose(1, 2).flatten(2, 3)
            rest = rest + (rest.sum(2, keepdim=True) - rest.cumsum(2)) + passed[:, n].unsqueeze(2)
            rest = rest.unflatten(2, (-1, dg.shape[3])).transpose(1, 2)
            out[:, part].copy_(rest.reshape(out[:, part].shape))
        out.masked_fill_(self.source < -FAINT, 0)


def through(Z: Tensor, dZ: Tensor) -> tuple[Tensor, Tensor]:
    """What passes through a state `[.., V, K]`: the gradient of its loudness `[.., K]` and of its phase `[.., 1, m]`."""
    (re, im), (dre, dim) = Z.chunk(2, -1), dZ.chunk(2, -1)
    return (Z * dZ).sum(-2), (re * dim - im * dre).sum(-2, keepdim=True)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, beta, log_alpha, theta, state, r: int, low: bool, keep: bool):
        dtype = working_dtype(q, k, v, beta, log_alpha, theta, state)
        B, T, H, K = q.shape
        V = v.shape[-1] // r
        C = calm(log_alpha, min(T, CHUNK_ROWS // r))
        b = rows_a_tile(B, H * C * r * max(K, V))
        layout = Layout(b, C, V, r, low, dtype)
        o = torch.empty_like(v)
        Z = q.new_zeros(B, H, V, K, dtype=dtype) if state is None else state.mT.to(dtype, copy=True).contiguous()
        phase = q.new_zeros(B * H, 1, K // 2, dtype=dtype)
        phases, states = phase.split(b * H), Z.view(-1, b * H, V, K).unbind(0)
        if theta is not None:
            theta = tame(theta)
        saved = []
        with Products(low, q.device) as product:
            for span in spans(T, C):
                tile, damping, betas = layout.prepare(span, q, beta, log_alpha, theta, product)
                qs, ks, thetas = (grid(x if x is None else tiled(x, span, b)) for x in (q, k, theta))
                vs, os = (grid(tiled(x.unflatten(-1, (r, V)), span, b)) for x in (v, o))
                kept = layout.room(tile, *betas.shape[:4]) if keep else []
                places = [grid(x) for x in kept]
                for i, (S, turned) in enumerate(zip(states, phases, strict=True)):
                    tile.Z.copy_(S)
                    for j in range(betas.shape[1]):
                        read, undo, enter = damping.at(i, j)
                        norm = places[0][i][j] if keep else tile.k.new_empty(betas.shape[2], 2, span.C, 1)
                        tile.load(qs[i][j], ks[i][j], read, norm)
                        if theta is not None:
                            tile.rotate(thetas[i][j], turned)
                        tile.write_along(betas[i, j], undo)
                        tile.Z.mul_(enter)
                        tile.forward(vs[i][j], os[i][j])
                        if keep:
                            places[1][i][j].copy_(tile.kept)
                            places[2][i][j].copy_(tile.Z)
                        tile.advance()
                    torch.mul(tile.Z, damping.leave[i], out=S)
                saved += kept
        if keep:
            ctx.save_for_backward(q, k, v, beta, log_alpha, theta, state, phase, Z, *saved)
            ctx.layout = layout
        final = Z.mT if theta is None else rotate(Z, phase.view(B, H, 1, -1) * TURN).mT
        return o, final.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor):
        q, k, v, beta, log_alpha, theta, state, phase, Z, *saved = ctx.saved_tensors
        layout: Layout = ctx.layout
        b, C, V, r, low, dtype = layout
        B, T, H, K = q.shape
        dq, dk, dv, dbeta, dlog_alpha = (torch.empty_like(x) for x in (q, k, v, beta, log_alpha))
        dtheta = None if theta is None else torch.empty_like(theta)
        dZ = dfinal.mT.to(dtype).contiguous()
        dZ = dZ.clone() if theta is None else rotate(dZ, phase.view(B, H, 1, -1) * -TURN)
        columns = (-1, b * H, V, K)
        passing, laters = through(Z.view(columns), dZ.view(columns))
        with Products(low, q.device) as product:
            for span in reversed(spans(T, C)):
                tile, damping, betas = layout.prepare(span, q, beta, log_alpha, theta, product)
                places, saved = [grid(x) for x in saved[-3:]], saved[:-3]
                dqs, dks, dthetas = (grid(x if x is None else tiled(x, span, b)) for x in (dq, dk, dtheta))
                dos, dvs = (grid(tiled(x.unflatten(-1, (r, V)), span, b)) for x in (do, dv))
                dbetas = torch.empty_like(betas)
                along = betas.new_empty(*betas.shape[:3], 2, span.C)
                passed = betas.new_empty(betas.shape[0], -(-betas.shape[1] // ANCHOR), b * H, K)
                dg = None if damping.per_head else betas.new_empty(*betas.shape[:4], K)
                for i, dS in enumerate(dZ.view(columns).unbind(0)):
                    torch.mul(dS, damping.leave[i], out=tile.dZ)
                    passed[i, -1] = passing[i]
                    for j in reversed(range(betas.shape[1])):
                        read, undo, enter = damping.at(i, j)
                        tile.kept.copy_(places[1][i][j])
                        tile.Z.copy_(places[2][i][j])
                        tile.write_along(betas[i, j], undo)
                        tile.backward(dos[i][j], dvs[i][j])
                        if dg is not None:
                            torch.sum(tile.x.pairs * tile.dx.pairs, 1, out=dg[i, j])
                            dg[i, j].addcmul_(tile.w.pairs, tile.dw.pairs, value=-1)
                        tile.write_back(betas[i, j], undo, along[i, j], dbetas[i, j])
                        if theta is not None:
                            tile.rotate_back(dthetas[i][j], laters[i])
                        tile.store(read, places[0][i][j], dqs[i][j], dks[i][j])
                        if j % ANCHOR == 0:
                            passing[i], laters[i] = through(tile.Z, tile.dZ)
                            if j:
                                passed[i, j // ANCHOR - 1] = passing[i]
                        tile.dZ.mul_(enter)
                    dS.copy_(tile.dZ)
                if dg is None:
                    dg = (along.sum(3) - 2 * (betas * dbetas).sum(-1)).unsqueeze(-1)
                    passed = passed.sum(-1, keepdim=True)
                damping.gradient(dg, passed, tiled(dlog_alpha, span, b))
                target = tiled(dbeta, span, b)
                target.copy_(dbetas.view(target.shape))
        return dq, dk, dv, dbeta, dlog_alpha, dtheta, None if state is None else dZ.mT, None, None, None


class Layout(NamedTuple):
    """How a call is cut: batch rows a tile, tokens a chunk, values, key rows a token; and its precision."""

    b: int
    C: int
    V: int
    r: int
    low: bool
    dtype: torch.dtype

    def prepare(self, span, q, beta, log_alpha, theta, product) -> tuple[Tile, Damping, Tensor]:
        """The tile, the damping and beta `[columns, chunks, N, C, 1 or 2]` of a span."""
        H, K = q.shape[2:]
        like = torch.empty(0, dtype=self.dtype, device=q.device)
        tile = workspace.tile(Shape(self.b, H, span.C, K, self.V, self.r), theta is not None, product, like)
        betas = tiled(beta, span, self.b).to(self.dtype).flatten(2, 3)
        betas = betas.unsqueeze(-1) if beta.ndim == 3 else betas
        return tile, Damping(log_alpha, span, self.b, self.dtype), betas.contiguous()

    def room(self, tile: Tile, columns: int, chunks: int, N: int, C: int) -> list[Tensor]:
        """For what the backward needs of every chunk: the norms, then the tile's `kept` in the products' precision."""
        store = torch.bfloat16 if self.low and self.dtype == torch.float32 else self.dtype
        norms = tile.k.new_empty(columns, chunks, N, 2, C, 1)
        return [norms] + [x.new_empty(columns, chunks, *x.shape, dtype=store) for x in (tile.kept, tile.Z)]
