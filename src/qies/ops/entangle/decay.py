"""Damping inside a chunk: how reads and writes are weighed by the decay between them, and the gradients of that.

g is the inclusive running sum of log_alpha from the start of the chunk. A read at token i sees the state before the
chunk through e^{g_i}, a write at token j <= i through e^{g_i - g_j}; the state after the chunk sees the write through
e^{g_C - g_j}. No exponent is ever positive: nothing overflows, and nothing is divided by a decay that underflowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from qies.ops.entangle.tile import Tile


def strict_(A: Tensor, r: int) -> Tensor:
    """Zero what a token would see of itself: the r x r blocks on the diagonal of A `[.., R, R]`, in place."""
    A.diagonal(0, -2, -1).zero_()
    if r == 2:
        A.diagonal(1, -2, -1)[..., ::2].zero_()
        A.diagonal(-1, -2, -1)[..., ::2].zero_()
    return A


class HeadDecay:
    """One decay a head and token: weights are a matrix Gamma_ij = e^{g_i - g_j} on plain products."""

    def __init__(self, t: Tile, log_alpha: Tensor):
        """log_alpha `[columns, chunks, b, H, C]`, a view of the user's."""
        self.t = t
        g = log_alpha.to(t.S.dtype).cumsum(-1).flatten(2, 3)
        self.log_alpha, self.passed = log_alpha, torch.empty_like(g[..., 0])
        g = g.repeat_interleave(t.r, -1).unsqueeze(-1)
        last = g[..., -1:, :]
        self.g, self.carries, self.reads, self.writes = g, last.exp(), g.exp().unsqueeze(3), (last - g).exp_()
        self.gamma = torch.empty_like(t.P)
        self.gamma_both = self.gamma.unsqueeze(1)

    def select(self, i: int, j: int) -> None:
        """Turn to chunk j of column i."""
        g = self.g[i, j]
        self.read_by, self.write_by, self.carry = self.reads[i, j], self.writes[i, j], self.carries[i, j]
        self.passing = self.passed[i, j]
        torch.sub(g, g.mT, out=self.gamma).exp_().tril_()
        if self.t.r == 2:
            self.gamma.diagonal(1, -2, -1)[..., ::2].fill_(1)

    def inside(self) -> None:
        """M = what queries and keys see of the chunk's writes: zero where a write is not past."""
        t = self.t
        t.product(t.x.rows, t.w.rows_t, t.M_rows)
        t.M.mul_(self.gamma_both)
        if t.r == 2:
            strict_(t.M_k, 2)

    def read(self, S: Tensor) -> None:
        """F = what queries and keys see of the state before the chunk."""
        t = self.t
        t.product(t.x.rows, S, t.F_rows)
        t.F.mul_(self.read_by)

    def write(self, S: Tensor) -> None:
        """S = the state after the chunk, E consumed."""
        t = self.t
        t.product(t.w.rows_t, t.E.mul_(self.write_by), S.mul_(self.carry), add=True)

    def write_back(self, dS: Tensor) -> None:
        """D = the gradient of E through the state after the chunk."""
        t = self.t
        t.product(t.w.rows, dS, t.D).mul_(self.write_by)

    def backward(self, dS: Tensor, S: Tensor, after: Tensor) -> None:
        """From F = [do, -dv] the gradients dx and dw; dS carried to the start of the chunk. F and E are consumed."""
        t = self.t
        torch.sum(torch.mul(dS, after, out=t.scratch), (1, 2), out=self.passing)
        t.product(t.F_rows, t.E_t, t.M_rows)
        t.M.mul_(self.gamma_both)
        strict_(t.M_k, t.r)
        t.F.mul_(self.read_by)
        t.E.mul_(self.write_by)
        t.product(t.F_rows, S.mT, t.dx.rows)
        t.product(t.M_rows, t.w.rows, t.dx.rows, add=True)
        t.product(t.E, dS.mT, t.dw.rows)
        t.product(t.M_t, t.x.rows, t.dw.rows, add=True)
        t.product(t.x.rows_t, t.F_rows, dS.mul_(self.carry), add=True)
        t.dx.fold()
        t.dw.fold()

    def finish(self, dlog_alpha: Tensor, along: Tensor, written: Tensor) -> None:
        """The gradient of log_alpha, all chunks at once: reads gain, writes lose what passes between them.

        along `[columns, chunks, N, 2, C]` is x . dx, writing included; written `[columns, chunks, N, C]` is w . dw.
        """
        dg = along.sum(3) - 2 * written
        dg[..., -1] += self.passed
        dg += dg.sum(-1, keepdim=True) - dg.cumsum(-1)
        dlog_alpha.copy_(dg.view(dlog_alpha.shape))


class ChannelDecay:
    """A decay for each channel, by a tree of halves.

    At every level the second half of a block reads the writes of its first half through the decay at the boundary
    between them: e^{g_i - ref} on the reader's side and e^{ref - g_j} on the writer's.
    """

    def __init__(self, t: Tile, log_alpha: Tensor):
        """log_alpha `[columns, chunks, b, H, C, m]`, a view of the user's."""
        self.t = t
        self.C = log_alpha.shape[-2]
        self.padded = 1 << (self.C - 1).bit_length()
        self.log_alpha = log_alpha
        self.dg = torch.empty(*log_alpha.shape[:2], *t.k.shape[:2], log_alpha.shape[-1], dtype=t.S.dtype, device=t.S.device)

    def select(self, i: int, j: int) -> None:
        """As in HeadDecay."""
        self.at = i, j
        g = self.log_alpha[i, j].to(self.t.S.dtype).cumsum(2).flatten(0, 1)
        g = torch.cat([g, g], -1)
        last = g[:, -1:]
        self.carry = last.mT.exp()
        self.read_by, self.write_by = (self._rows(y) for y in (g.exp(), (last - g).exp_()))
        g = torch.cat([g, last.expand(-1, self.padded - self.C, -1)], 1)
        self.levels = []
        h = 1
        while h < self.padded:
            early, late = self._halves(g, h)
            ref = early[:, :, -1:]
            self.levels.append((h * self.t.r, self._rows((ref - early).exp_()), self._rows((late - ref).exp_())))
            h *= 2

    def inside(self) -> None:
        """As in HeadDecay."""
        t = self.t
        x, w = self._pad(t.x.rows.view(t.M.shape[0], 2, -1, t.w.rows.shape[-1])), self._pad(t.w.rows)
        M = t.M if self.padded == self.C else x.new_empty(*x.shape[:2], x.shape[2], x.shape[2])
        M.zero_()
        self._own(M[:, 0]).copy_(self._tokens(x[:, 0]) @ self._tokens(w).mT)
        for h, early, late in self.levels:
            w_early = (self._halves(w, h)[0] * early).mT
            for i in (0, 1):
                self._corner(M[:, i], h).copy_((self._halves(x[:, i], h)[1] * late) @ w_early)
        if M is not t.M:
            R = t.M.shape[-1]
            t.M.copy_(M[:, :, :R, :R])

    def read(self, S: Tensor) -> None:
        """As in HeadDecay."""
        t = self.t
        t.product(self._read_rows(), S, t.F_rows)

    def write(self, S: Tensor) -> None:
        """As in HeadDecay."""
        t = self.t
        t.product((t.w.rows * self.write_by).mT, t.E, S.mul_(self.carry), add=True)

    def write_back(self, dS: Tensor) -> None:
        """As in HeadDecay."""
        t = self.t
        t.product(t.w.rows * self.write_by, dS, t.D)

    def backward(self, dS: Tensor, S: Tensor, after: Tensor) -> None:
        """As in HeadDecay."""
        t = self.t
        N, _, R, _ = t.M.shape
        passing = torch.mul(dS, after, out=t.scratch).sum(-1)
        t.product(t.F_rows, t.E_t, t.M_rows)
        t.product(t.F_rows, S.mT, t.dx.rows).view(N, 2, R, -1).mul_(self.read_by.unsqueeze(1))
        t.product(t.E, dS.mT, t.dw.rows).mul_(self.write_by)
        t.product(self._read_rows().mT, t.F_rows, dS.mul_(self.carry), add=True)
        x, w = self._pad(t.x.rows.view(N, 2, R, -1)), self._pad(t.w.rows)
        M = F.pad(t.M, (0, x.shape[2] - R) * 2)
        dx, dw = torch.zeros_like(x), torch.zeros_like(w)
        own = self._own(M[:, 0])
        self._tokens(dx[:, 0]).copy_(own @ self._tokens(w))
        self._tokens(dw).copy_(own.mT @ self._tokens(x[:, 0]))
        for h, early, late in self.levels:
            w_early = self._halves(w, h)[0] * early
            for i in (0, 1):
                corner = self._corner(M[:, i], h)
                self._halves(dx[:, i], h)[1].addcmul_(corner @ w_early, late)
                self._halves(dw, h)[0].addcmul_(corner.mT @ (self._halves(x[:, i], h)[1] * late), early)
        t.dx.rows.view(N, 2, R, -1).add_(dx[:, :, :R])
        t.dw.rows.add_(dw[:, :R])
        t.dx.fold()
        t.dw.fold()
        dg = (t.x.pairs * t.dx.pairs).sum(1).addcmul_(t.w.pairs, t.dw.pairs, value=-1)
        dg[:, -1] += passing
        dg = sum(dg.chunk(2, -1))
        self.dg[self.at] = dg + dg.sum(1, keepdim=True) - dg.cumsum(1)

    def finish(self, dlog_alpha: Tensor, along: Tensor, written: Tensor) -> None:
        """The gradient of log_alpha, chunk by chunk already there."""
        dlog_alpha.copy_(self.dg.view(dlog_alpha.shape))

    def _rows(self, g: Tensor) -> Tensor:
        """Tokens to rows."""
        return g.repeat_interleave(2, -2) if self.t.r == 2 else g

    def _read_rows(self) -> Tensor:
        t = self.t
        return (t.x.rows.view(t.M.shape[0], 2, -1, t.x.rows.shape[-1]) * self.read_by.unsqueeze(1)).flatten(1, 2)

    def _pad(self, x: Tensor) -> Tensor:
        """Zero rows up to a power of two of tokens."""
        return F.pad(x, (0, 0, 0, (self.padded - self.C) * self.t.r)) if self.padded > self.C else x

    def _tokens(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.t.r))

    @staticmethod
    def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
        """The first and second halves `[N, n, h, K]` of the blocks of 2h rows; views."""
        first, second = x.unflatten(1, (-1, 2, h)).unbind(2)
        return first, second

    @staticmethod
    def _corner(A: Tensor, h: int) -> Tensor:
        """The lower left quarters `[N, n, h, h]` of the diagonal blocks of 2h rows; a view."""
        blocks = A.unflatten(2, (-1, 2, h)).unflatten(1, (-1, 2, h))
        return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def _own(self, A: Tensor) -> Tensor:
        """The diagonal blocks `[N, C, r, r]` of a token with itself; a view."""
        r = self.t.r
        return A.unflatten(2, (-1, r)).unflatten(1, (-1, r)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
