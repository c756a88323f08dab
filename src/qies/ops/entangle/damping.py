"""Damping inside a chunk, by rescaling.

With g the running sum of log_alpha in a chunk and c half its last value, reads are held as x e^{g - c}, writes as
w e^{c - g} and the state before the chunk as S e^{c}. A read at i then sees a write at j <= i through e^{g_i - g_j} and
the state through e^{g_i} by itself, with no weights between them. That divides by a decay, so the decay of a chunk is
bounded: where damping is strong, chunks are shorter (`calm`), down to one token, in which nothing is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qies.ops.entangle.spans import Span, spans, tiled
from qies.ops.entangle.tile import Tile

FAINT = 40.0  # a token that damps beyond e^-40 damps to nothing: below the rounding of float64
CALM = 60.0  # a chunk damps to e^-60 at most: its rescaled halves are far from over- or underflow in float32
ANCHOR = 4  # chunks after which sums of gradients start anew from the state, so that rounding does not add up


def calm(log_alpha: Tensor, C: int) -> int:
    """The longest chunk, C halved as often as it takes, in which damping stays above e^-CALM everywhere."""
    damping = log_alpha.detach().clamp(-FAINT, 0).neg()
    while C > 1 and any(
        damping[:, s.start : s.stop].unflatten(1, (-1, s.C)).sum(2, dtype=torch.float32).amax() > CALM
        for s in spans(log_alpha.shape[1], C)
    ):
        C = (C + 1) // 2
    return C


def through(Z: Tensor, dZ: Tensor) -> tuple[Tensor, Tensor]:
    """What passes through a state `[.., V, K]`: the gradient of its log-scale `[.., K]`, of its phase `[.., 1, m]`."""
    (re, im), (dre, dim) = Z.chunk(2, -1), dZ.chunk(2, -1)
    return (Z * dZ).sum(-2), (re * dim - im * dre).sum(-2, keepdim=True)


class Damping:
    """The decays of a span, by column and chunk; `leave` `[columns, N, 1, 1 or K]` rescales the last state."""

    def __init__(self, log_alpha: Tensor, span: Span, b: int, dtype: torch.dtype):
        self.source, self.dtype, self.per_head = tiled(log_alpha, span, b), dtype, log_alpha.ndim == 3
        if self.per_head:
            g = self._running(self.source).unsqueeze(-1)
            half = g[..., -1:, :] / 2
            self.reads, self.undos = (g - half).exp().unsqueeze(3), (2 * (half - g)).exp()
        else:
            half = self.source.to(dtype).clamp(min=-FAINT).sum(4, keepdim=True).flatten(2, 3) / 2
            half = torch.cat([half, half], -1)
            columns, chunks, _, H, C, m = self.source.shape
            self.dg = half.new_empty(columns, chunks, b * H, C, 2 * m)
        self.leave = half[:, -1].exp()
        self.enters = (half + torch.cat([torch.zeros_like(half[:, :1]), half[:, :-1]], 1)).exp()

    def _running(self, log_alpha: Tensor) -> Tensor:
        """g `[.., N, C(, m)]` of `[.., b, H, C(, m)]`."""
        time = -1 if self.per_head else -2
        g = log_alpha.to(self.dtype).clamp(min=-FAINT).cumsum(time)
        return g.flatten(time - 2, time - 1)

    def at(self, i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """For chunk j of column i: e^{g - c} `[N, 1, C, 1 or K]`, its inverse squared `[N, C, 1 or K]`, which makes a
        write of a read, and what takes the state to this chunk's scale `[N, 1, 1 or K]`."""
        if self.per_head:
            return self.reads[i, j], self.undos[i, j], self.enters[i, j]
        g = self._running(self.source[i, j])
        read = (g - g[:, -1:] / 2).exp_()
        read = torch.cat([read, read], -1)
        return read.unsqueeze(1), read.square().reciprocal_(), self.enters[i, j]

    def balance(self, i: int, j: int, t: Tile) -> None:
        """Note for every channel what a chunk's reads gain from a louder past less what its writes lose."""
        if not self.per_head:
            torch.sum(torch.mul(t.x.pairs, t.dx.pairs, out=t.both), 1, out=self.dg[i, j])
            self.dg[i, j].addcmul_(t.w.pairs, t.dw.pairs, value=-1)

    def gradient(self, dg: Tensor, passed: Tensor, out: Tensor) -> None:
        """The gradient of log_alpha, the sum of these gains over the tokens that follow and of what passes them.

        dg `[columns, chunks, N, C]` are the gains summed over channels, for a decay per head; passed
        `[columns, anchors, N, K]` is what passes the end of every ANCHOR chunks; out is a view like `source`.
        """
        if self.per_head:
            dg, passed = dg.unsqueeze(-1), passed.sum(-1, keepdim=True)
        else:
            dg, passed = (torch.add(*x.chunk(2, -1)) for x in (self.dg, passed))
        for n in range(passed.shape[1]):
            part = slice(n * ANCHOR, (n + 1) * ANCHOR)
            gains = dg[:, part].transpose(1, 2).flatten(2, 3)
            rest = gains + (gains.sum(2, keepdim=True) - gains.cumsum(2)) + passed[:, n].unsqueeze(2)
            rest = rest.unflatten(2, (-1, dg.shape[3])).transpose(1, 2)
            out[:, part].copy_(rest.reshape(out[:, part].shape))
        out.masked_fill_(self.source < -FAINT, 0)
