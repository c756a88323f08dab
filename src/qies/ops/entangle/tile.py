"""The arithmetic of one chunk, forward and backward, on buffers that are used again for every chunk.

A tile is small enough for its buffers to stay near a core, where element-wise passes run several times faster, and
queries stand above keys so that the products are few and large. README.md derives the formulas.

Shapes: N = batch rows b times heads H, C tokens, r key rows a token (1 in real mode, 2 in complex mode), R = C r,
K = 2m, V values. Pairs `[.., C, K]` are what the user gave; rows `[.., R, K]` are x, or x and Jx by turns.
"""

from __future__ import annotations

import threading
from math import prod
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


class Pairs:
    """Pairs `[.., C, K]` with views of their halves, and the rows `[.., R, K]` made from them, in memory that is given.

    In real mode the pairs are the rows; in complex mode the rows are x and Jx by turns.
    """

    def __init__(self, rows: Tensor, r: int, pairs: Tensor | None = None):
        self.r = r
        self.pairs = rows
        if r == 2:
            self.own, self.turned = rows.unflatten(-2, (-1, 2)).unbind(-2)
            self.own_re, self.own_im = self.own.chunk(2, -1)
            self.turned_re, self.turned_im = self.turned.chunk(2, -1)
            self.pairs = self.own.new_empty(self.own.shape) if pairs is None else pairs
        self.re, self.im = self.pairs.chunk(2, -1)

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


def carve(like: Tensor, sizes: list[tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    """One piece of memory, and tensors of these sizes in it one behind the other."""
    counts = [prod(size) for size in sizes]
    memory = like.new_empty(sum(counts))
    return memory, [part.view(size) for part, size in zip(memory.split(counts), sizes, strict=True)]


def share(like: Tensor, tenants: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
    """Tensors of these sizes for each tenant, all tenants in the same memory."""
    memory = like.new_empty(max(sum(map(prod, sizes)) for sizes in tenants))
    layouts = []
    for sizes in tenants:
        counts = [prod(size) for size in sizes]
        parts = memory[: sum(counts)].split(counts)
        layouts.append([part.view(size) for part, size in zip(parts, sizes, strict=True)])
    return layouts


class Tile:
    """Buffers and arithmetic of one chunk; `like` gives the working dtype and the device.

    What it holds is rescaled as damping.py explains: reads x e^{g - c}, writes w e^{c - g}, the state S e^{c}.
    """

    product: Products

    def __init__(self, shape: Shape, phases: bool, like: Tensor):
        b, H, C, K, V, r = shape
        N, R, new = b * H, C * r, like.new_empty
        self.r = r

        def user(x: Tensor) -> Tensor:
            """Rows `[N, R, V]` as the user's values lie, `[b, H, C, r, V]`."""
            return x.unflatten(1, (C, r)).unflatten(0, (b, H))

        # what the backward needs of a chunk is one piece of memory, copied at once
        m = K // 2 if phases else 0
        sizes: list[tuple[int, ...]] = [(N, 2, C, K), (N, R, R), (N, R, R), (N, R, V), (2, N, 1, C, m)]
        self.kept, (x, self.P, self.Xt, self.E, self.circle) = carve(like, sizes)
        # what is never needed at the same time shares memory: the nearer cache is small
        (dx_rows,), (D, Y) = share(like, [[(N, 2 * R, K)], [(N, R, V), (N, R, V)]])
        alone: list[tuple[int, ...]] = [(N, 2 * R, V), (N, 2, C, K // 2), (N, 2, C, K), (N, C, K)]
        (F_rows,), (self.half,), (self.both,), (self.one,) = share(like, [[size] for size in alone])
        # queries and keys, unit vectors turned back by the running phase, and their gradients
        self.x_rows, self.dx_rows = x.view(N, 2 * C, K) if r == 1 else new(N, 2 * R, K), dx_rows
        self.x = Pairs(self.x_rows.view(N, 2, R, K), r, x)
        self.dx = Pairs(self.dx_rows.view(N, 2, R, K), r)
        self.q_in, self.k_in = self.x.pairs.unflatten(0, (b, H)).unbind(2)
        self.dq_out, self.dk_out = self.dx.pairs.unflatten(0, (b, H)).unbind(2)
        self.k, self.k_re, self.k_im = (z[:, 1] for z in (self.x.pairs, self.x.re, self.x.im))
        self.k_turned = self.x.turned[:, 1] if r == 2 else self.k  # Jk, where keys are complex
        self.dk = self.dx.pairs[:, 1]
        # the chunk's writes, w = beta k, and the state's, which is held transposed: Z [N, V, K]
        self.w_rows, self.dw_rows = new(N, R, K), new(N, R, K)
        self.w, self.dw = Pairs(self.w_rows, r), Pairs(self.dw_rows, r)
        self.Z, self.dZ = new(N, V, K), new(N, V, K)
        # what reads see of writes, M of the chunk's and F of the state's; then the gradients of both
        self.M_rows, self.F_rows = new(N, 2 * R, R), F_rows
        self.M, self.F = self.M_rows.view(N, 2, R, R), self.F_rows.view(N, 2, R, V)
        (self.M_q, self.M_k), (self.F_q, self.F_k) = self.M.unbind(1), self.F.unbind(1)
        self.F_user = user(self.F_q)
        self.w_t, self.Z_t, self.dZ_t, self.M_t, self.F_t = (
            x.mT for x in (self.w_rows, self.Z, self.dZ, self.M_rows, self.F_rows)
        )
        ones = torch.ones(C, C, dtype=like.dtype, device=like.device)
        self.present, self.past = (torch.kron(z, ones.new_ones(r, r)) for z in (ones.tril(), ones.tril(-1)))
        self.masks = torch.stack([self.present, self.past])
        # P: what queries see of the chunk's writes; Xt: the inverse of I + (what keys see of them), transposed
        self.P_t, self.X = self.P.mT, self.Xt.mT
        self.eye = torch.eye(R, dtype=like.dtype, device=like.device).expand(N, R, R)
        # E: the values written along w; D and Y are scratch
        self.D, self.Y, self.E_t = D, Y, self.E.mT
        self.D_user, self.Y_user = user(self.D), user(self.Y)
        if phases:
            self.angle, self.dtheta = new(N, C, m), new(N, C, m)
            self.angle_in, self.dtheta_out = (x.view(b, H, C, m) for x in (self.angle, self.dtheta))
            self.cos, self.sin = self.circle.squeeze(2)
            # products with these sum over the tokens up to and from each one
            self.before, self.behind = (z.expand(N, C, C) for z in (ones.tril(), ones.triu()))

    def load(self, q: Tensor, k: Tensor, read: Tensor, norm: Tensor) -> None:
        """Unit queries and keys times e^{g - c} into x from views `[b, H, C, K]`; 1 / length into norm."""
        self.q_in.copy_(q)
        self.k_in.copy_(k)
        torch.linalg.vector_norm(self.x.pairs, dim=-1, keepdim=True, out=norm).square_().add_(EPS).rsqrt_()
        self.x.pairs.mul_(norm * read)

    def rotate(self, theta: Tensor, phase: Tensor) -> None:
        """x turned back by the running phase, which is advanced: `[N, 1, m]` in turns, modulo one."""
        self.angle_in.copy_(theta)
        torch.baddbmm(phase, self.before, self.angle, alpha=1 / TURN, out=self.dtheta).frac_()
        phase.copy_(self.dtheta[:, -1:])
        torch.mul(self.dtheta, TURN, out=self.angle)
        torch.cos(self.angle, out=self.cos)
        torch.sin(self.angle, out=self.sin)
        self.turn(self.x, -1)

    def turn(self, x: Pairs, sign: int) -> None:
        """x times cos + i sign sin, in place."""
        cos, sin = self.circle
        torch.mul(x.re, sin, out=self.half)
        x.re.mul_(cos).addcmul_(x.im, sin, value=-sign)
        x.im.mul_(cos).add_(self.half, alpha=sign)

    def write_along(self, beta: Tensor, undo: Tensor) -> None:
        """w = beta k for beta `[N, C, 1 or 2]`, undo = e^{2(c - g)} making a write of a read; and the rows of both."""
        if beta.shape[-1] == 1:
            torch.mul(self.k, beta * undo, out=self.w.pairs)
        else:
            self.times_beta(beta, self.k, self.k_re, self.k_im, 1)
            self.w.pairs.mul_(undo)
        self.x.spread()
        self.w.spread()

    def times_beta(self, beta: Tensor, x: Tensor, re: Tensor, im: Tensor, sign: int) -> None:
        """w = beta x for a pair beta, or conj(beta) x for sign -1."""
        c, s = beta.chunk(2, -1)
        torch.mul(re, c, out=self.w.re).addcmul_(im, s, value=-sign)
        torch.mul(im, c, out=self.w.im).addcmul_(re, s, value=sign)

    def forward(self, v: Tensor, o: Tensor) -> None:
        """From x, w and Z: the outputs, and P, Xt and E."""
        self.product(self.x_rows, self.w_t, self.M_rows)
        self.product(self.x_rows, self.Z_t, self.F_rows)
        torch.mul(self.M_q, self.present, out=self.P)
        if self.r == 2:
            self.M_k.mul_(self.past)
        # never rounded, whatever the products are: the inverse of many parallel keys does not forgive it
        self.Xt.copy_(torch.linalg.solve_triangular(self.M_k, self.eye, upper=False, unitriangular=True).mT)
        self.D_user.copy_(v)
        self.D.sub_(self.F_k)
        self.product(self.X, self.D, self.E)
        self.product(self.P, self.E, self.D).add_(self.F_q)
        o.copy_(self.D_user)

    def advance(self) -> None:
        """Z after the chunk."""
        self.product(self.E_t, self.w_rows, self.Z, add=True)

    def backward(self, do: Tensor, dv: Tensor) -> None:
        """From what `kept` says, w, do and dZ after the chunk: dv, dx, dw and dZ before it."""
        self.F_user.copy_(do)
        self.product(self.w_rows, self.dZ_t, self.D)
        self.product(self.P_t, self.F_q, self.D, add=True)
        self.product(self.Xt, self.D, self.Y)
        dv.copy_(self.Y_user)
        torch.neg(self.Y, out=self.F_k)
        self.product(self.F_rows, self.E_t, self.M_rows)
        self.M.mul_(self.masks)
        self.product(self.F_rows, self.Z, self.dx_rows)
        self.product(self.M_rows, self.w_rows, self.dx_rows, add=True)
        self.product(self.E, self.dZ, self.dw_rows)
        self.product(self.M_t, self.x_rows, self.dw_rows, add=True)
        self.product(self.F_t, self.x_rows, self.dZ, add=True)
        self.dx.fold()
        self.dw.fold()

    def write_back(self, beta: Tensor, undo: Tensor, along: Tensor, dbeta: Tensor) -> None:
        """dx completed, dbeta `[N, C, 1 or 2]`, and `along` `[N, 2, C]`: x . dx for all that x does.

        Keys also write, w = beta k, and what is along a unit vector is no gradient of its direction.
        """
        x, dx, dw = self.x.pairs, self.dx.pairs, self.dw.pairs
        if undo.shape[-1] > 1 or beta.shape[-1] > 1:
            dw.mul_(undo)
            torch.sum(torch.mul(self.k, dw, out=self.one), -1, out=dbeta[..., 0])
        else:
            torch.sum(torch.mul(self.k, dw, out=self.one), -1, out=dbeta[..., 0]).mul_(undo[..., 0])
            beta = beta * undo
        if beta.shape[-1] == 2:
            torch.sum(torch.mul(self.k_turned, dw, out=self.one), -1, out=dbeta[..., 1])
            self.times_beta(beta, dw, self.dw.re, self.dw.im, -1)
            self.dk.add_(self.w.pairs)
        else:
            self.dk.addcmul_(dw, beta)
        torch.sum(torch.mul(x, dx, out=self.both), -1, out=along)
        dx.addcmul_(x, along.unsqueeze(-1) * undo.unsqueeze(1), value=-1)

    def rotate_back(self, dtheta: Tensor, later: Tensor) -> None:
        """dx turned forth; dtheta, the sum of what follows, of which what later chunks give is `later` `[N, 1, m]`."""
        x, dx = self.x, self.dx
        both = torch.mul(x.im, dx.re, out=self.half).addcmul_(x.re, dx.im, value=-1)
        torch.add(both[:, 0], both[:, 1], out=self.angle)
        torch.baddbmm(later, self.behind, self.angle, out=self.dtheta)
        later.copy_(self.dtheta[:, :1])
        dtheta.copy_(self.dtheta_out)
        self.turn(dx, 1)

    def store(self, read: Tensor, norm: Tensor, dq: Tensor, dk: Tensor) -> None:
        """The gradients of the queries and keys that came."""
        self.dx.pairs.mul_(norm * read)
        dq.copy_(self.dq_out)
        dk.copy_(self.dk_out)


class _Workspace(threading.local):
    """The tiles a thread used last, so that a layer finds the buffers of the layer before still in its cache."""

    def __init__(self) -> None:
        self.tiles: dict[tuple, Tile] = {}

    def tile(self, shape: Shape, phases: bool, product: Products, like: Tensor) -> Tile:
        key = (shape, phases, like.dtype, like.device, torch.is_inference_mode_enabled())
        tile = self.tiles.pop(key, None) or Tile(shape, phases, like)
        tile.product = product
        if type(tile.Z) is Tensor:  # not a stand-in of a tracer
            self.tiles[key] = tile
        while len(self.tiles) > 4:
            del self.tiles[next(iter(self.tiles))]
        return tile


workspace = _Workspace()
