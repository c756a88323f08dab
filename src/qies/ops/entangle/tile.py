"""The arithmetic of one chunk, forward and backward, on buffers that are used again for every chunk.

A tile is small enough for its buffers to stay near a core, where element-wise passes run several times faster, and
queries and keys are stacked so that the products are few and large. README.md derives the formulas.

Shapes: N = batch rows b times heads H, C tokens, r key rows a token (1 in real mode, 2 in complex mode), R = C r,
K = 2m, V values. Pairs `[.., C, K]` are what the user gave; rows `[.., R, K]` are x, or x and Jx by turns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qies.ops.entangle.products import Products
from qies.ops.pairs import EPS

TURN = 2 * torch.pi


class Shape(NamedTuple):
    """Of a tile: batch rows, heads, tokens, real key channels, value channels, key rows a token."""

    b: int
    H: int
    C: int
    K: int
    V: int
    r: int

    @property
    def N(self) -> int:
        return self.b * self.H

    @property
    def R(self) -> int:
        return self.C * self.r


class Pairs:
    """A buffer of pairs `[N, .., C, K]`, its halves, and the rows `[N, .. R, K]` made from it in complex mode."""

    def __init__(self, *shape: int, r: int, like: Tensor):
        self.r = r
        self.pairs = like.new_empty(shape)
        self.re, self.im = self.pairs.chunk(2, -1)
        both = self.pairs
        if r == 2:
            both = like.new_empty(*shape[:-1], 2, shape[-1])
            self.own, self.turned = both.unbind(-2)
            self.own_re, self.own_im = self.own.chunk(2, -1)
            self.turned_re, self.turned_im = self.turned.chunk(2, -1)
        self.rows = both.view(shape[0], -1, shape[-1])
        self.rows_t = self.rows.mT

    def spread(self) -> None:
        """Rows from pairs."""
        if self.r == 2:
            self.own.copy_(self.pairs)
            torch.neg(self.im, out=self.turned_re)
            self.turned_im.copy_(self.re)

    def fold(self) -> None:
        """Pairs from the gradient of rows: the adjoint of `spread`."""
        if self.r == 2:
            torch.add(self.own_re, self.turned_im, out=self.re)
            torch.sub(self.own_im, self.turned_re, out=self.im)


def turn(x: Pairs, cos: Tensor, sin: Tensor, sign: int, out: Pairs) -> None:
    """out = (cos + i sign sin) x on the pairs."""
    torch.mul(x.re, cos, out=out.re).addcmul_(x.im, sin, value=-sign)
    torch.mul(x.im, cos, out=out.im).addcmul_(x.re, sin, value=sign)


class Tile:
    """Buffers and arithmetic of one chunk; `like` gives the working dtype and the device."""

    def __init__(self, shape: Shape, phases: bool, product: Products, like: Tensor):
        b, H, C, K, V, r = shape
        N, R, new = shape.N, shape.R, like.new_empty
        self.shape, self.product, self.r = shape, product, r
        # unit queries and keys, as they come and turned back by the running phase
        self.x = Pairs(N, 2, C, K, r=r, like=like)
        self.raw = Pairs(N, 2, C, K, r=r, like=like) if phases else self.x
        self.raw_q, self.raw_k = self.raw.pairs.view(b, H, 2, C, K).unbind(2)
        self.k = self.x.pairs[:, 1]
        self.k_re, self.k_im = self.k.chunk(2, -1)
        self.k_turned = self.x.turned[:, 1] if r == 2 else None
        self.w = Pairs(N, C, K, r=r, like=like)  # beta times the keys: what is written along
        # M: what queries and keys see of the chunk's writes, then its gradient; P: a copy of the queries' part
        self.M = new(N, 2, R, R)
        self.M_q, self.M_k = self.M.unbind(1)
        self.M_rows = self.M.view(N, 2 * R, R)
        self.M_t = self.M_rows.mT
        self.P, self.Xt = new(N, R, R), new(N, R, R)  # Xt: the inverse, transposed
        self.P_t, self.X = self.P.mT, self.Xt.mT
        self.eye = torch.eye(R, dtype=like.dtype, device=like.device).expand(N, R, R)
        # F: what queries and keys see of the state, then the gradients of their readings
        self.F = new(N, 2, R, V)
        self.F_q, self.F_k = self.F.unbind(1)
        self.F_rows = self.F.view(N, 2 * R, V)
        self.F_user = self.F.view(b, H, 2, C, r * V)[:, :, 0]
        self.E, self.D, self.Y = (new(N, R, V) for _ in range(3))  # E: the values written along w; D, Y: scratch
        self.E_t = self.E.mT
        self.D_user, self.Y_user = (z.view(b, H, C, r * V) for z in (self.D, self.Y))
        self.S, self.after, self.scratch = (new(N, K, V) for _ in range(3))
        self.dx, self.dw = Pairs(N, 2, C, K, r=r, like=like), Pairs(N, C, K, r=r, like=like)
        self.dk = self.dx.pairs[:, 1]
        self.gradient = self.raw if phases else self.dx
        self.dq_user, self.dk_user = self.gradient.pairs.view(b, H, 2, C, K).unbind(2)
        if phases:
            self.turns = new(b, H, C, K // 2, dtype=torch.float64)
            self.circle = new(2, N, 1, C, K // 2)
            self.cos, self.sin = self.circle
            self.angle = self.sin.view(self.turns.shape)
            self.dtheta, self.sums = new(N, C, K // 2), new(N, C, K // 2)
            self.dtheta_user = self.dtheta.view(self.turns.shape)

    def kept(self, S: Tensor) -> list[Tensor]:
        """What the backward needs of a chunk besides the norms; S is the state it started from."""
        return [self.x.pairs, self.P, self.Xt, self.E, S, *([self.circle] if self.raw is not self.x else [])]

    def load(self, q: Tensor, k: Tensor, norm: Tensor) -> None:
        """Unit queries and keys into `raw` from views `[b, H, C, K]`, their factors into norm `[N, 2, C, 1]`."""
        self.raw_q.copy_(q)
        self.raw_k.copy_(k)
        torch.linalg.vector_norm(self.raw.pairs, dim=-1, keepdim=True, out=norm).square_().add_(EPS).rsqrt_()
        self.raw.pairs.mul_(norm)

    def rotate(self, theta: Tensor, phase: Tensor) -> None:
        """`raw` into `x`, turned back by the running phase, which is advanced: `[b, H, 1, m]` turns modulo one."""
        turns = self.turns.copy_(theta).cumsum(2)
        torch.add(phase, turns, alpha=1 / TURN, out=self.turns)
        phase.copy_(self.turns.frac_()[:, :, -1:])
        torch.mul(self.turns, TURN, out=self.angle)
        torch.cos(self.sin, out=self.cos)
        self.sin.sin_()
        turn(self.raw, self.cos, self.sin, -1, self.x)

    def write_along(self, beta: Tensor) -> None:
        """w = beta k for beta `[N, C, 1 or 2]`, and the rows of both."""
        self.times_beta(beta, self.k, self.k_re, self.k_im, 1)
        self.x.spread()
        self.w.spread()

    def times_beta(self, beta: Tensor, x: Tensor, re: Tensor, im: Tensor, sign: int) -> None:
        """w = beta x, or conj(beta) x for sign -1."""
        if beta.shape[-1] == 1:
            torch.mul(x, beta, out=self.w.pairs)
        else:
            c, s = beta.chunk(2, -1)
            torch.mul(re, c, out=self.w.re).addcmul_(im, s, value=-sign)
            torch.mul(im, c, out=self.w.im).addcmul_(re, s, value=sign)

    def read(self, v: Tensor, o: Tensor) -> None:
        """From M and F the inverse Xt, what is written E, and the outputs."""
        self.P.copy_(self.M_q)
        # float32 or wider, whatever the products are: the inverse of parallel keys does not forgive rounding
        self.Xt.copy_(torch.linalg.solve_triangular(self.M_k, self.eye, upper=False, unitriangular=True).mT)
        self.D_user.copy_(v)
        self.D.sub_(self.F_k)
        self.product(self.X, self.D, self.E)
        self.product(self.P, self.E, self.D).add_(self.F_q)
        o.copy_(self.D_user)

    def read_back(self, do: Tensor, dv: Tensor) -> None:
        """From D, the gradient of E through the state, F = [do, -dv], and dv."""
        self.F_user.copy_(do)
        self.product(self.P_t, self.F_q, self.D, add=True)
        self.product(self.Xt, self.D, self.Y)
        dv.copy_(self.Y_user)
        torch.neg(self.Y, out=self.F_k)

    def write_back(self, beta: Tensor, along: Tensor, dbeta: Tensor) -> None:
        """dx completed, dbeta `[N, C, 1 or 2]`, and `along` `[N, 2, C, 1]`: x . dx for all that x does.

        Keys also write, w = beta k, and what is along a unit vector is no gradient of its direction.
        """
        x, dx, dw = self.x.pairs, self.dx.pairs, self.dw.pairs
        torch.linalg.vecdot(self.k, dw, out=dbeta[..., 0])
        if beta.shape[-1] == 1:
            self.dk.addcmul_(dw, beta)
        else:
            torch.linalg.vecdot(self.k_turned, dw, out=dbeta[..., 1])
            self.times_beta(beta, dw, self.dw.re, self.dw.im, -1)
            self.dk.add_(self.w.pairs)
        torch.linalg.vecdot(x, dx, out=along[..., 0])
        dx.addcmul_(x, along, value=-1)

    def rotate_back(self, dtheta: Tensor, later: Tensor) -> None:
        """dx into `raw`, turned forth; dtheta, the sum of what follows, whose total so far is `later` `[N, 1, m]`."""
        x, dx = self.x, self.dx
        torch.sum((x.im * dx.re).addcmul_(x.re, dx.im, value=-1), 1, out=self.dtheta)
        torch.cumsum(self.dtheta, 1, out=self.sums)
        later.add_(self.sums[:, -1:])
        self.dtheta.sub_(self.sums).add_(later)
        dtheta.copy_(self.dtheta_user)
        turn(dx, self.cos, self.sin, 1, self.raw)

    def store(self, norm: Tensor, dq: Tensor, dk: Tensor) -> None:
        """The gradients of the queries and keys that came."""
        self.gradient.pairs.mul_(norm)
        dq.copy_(self.dq_user)
        dk.copy_(self.dk_user)
