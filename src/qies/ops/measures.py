"""Entanglement of the state Psi in C^{m x V} across the cut key | value.

Psi comes as a real pair S [..., 2m, V] (rows Re|Im; any leading axes): Psi = S[:m] + i S[m:]. All measures
depend on its singular values s alone, through p_i = s_i^2 / sum s^2, so neither a unitary on one side, nor
the gauge rotation, nor the norm of the state changes them. Entropies are in nats. Half precision is raised to
float32.

The zero state (nothing stored yet) holds no entanglement and counts as a product state: p = (1, 0, ...),
entropies 0, participation ratio 1, gradients 0. A state that is not finite gives NaN, in `schmidt_spectrum` a
UserError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qies.errors import UserError


def schmidt_spectrum(state: Tensor) -> Tensor:
    """Schmidt probabilities p [..., min(m, V)], descending, summing to 1, of states [..., 2m, V]."""
    re, im = _scaled_pair(state)
    if not (re.isfinite().all() and im.isfinite().all()):
        raise UserError("a state that is not finite has no spectrum; use a checkpoint that did not diverge")
    weights = torch.linalg.svdvals(torch.complex(re, im)).square()
    total = weights.sum(-1, keepdim=True)
    product = torch.zeros_like(weights)
    product[..., 0] = 1
    return torch.where(total == 0, product, weights / torch.where(total == 0, 1, total))


def von_neumann_entropy(p: Tensor) -> Tensor:
    """S1 = -sum p log p [...] in nats of spectra p [..., d] (0 log 0 = 0)."""
    return (p * -p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


def renyi2_entropy(state: Tensor) -> Tensor:
    """S2 = -log(|Psi^H Psi|_F^2 / |Psi|_F^4) [...] in nats of states [..., 2m, V]; no SVD, differentiable.

    The Gram matrix is taken on the smaller side: Psi Psi^H and Psi^H Psi have the same Frobenius norm.
    """
    re, im = _scaled_pair(state)
    if re.shape[-2] > re.shape[-1]:
        re, im = re.mT, im.mT
    gram_re, gram_im = re @ re.mT + im @ im.mT, im @ re.mT - re @ im.mT
    fourth = (gram_re.square() + gram_im.square()).sum((-2, -1))
    norm = (re.square() + im.square()).sum((-2, -1))
    empty = norm == 0
    inverse_purity = torch.where(empty, 1, norm).square() / torch.where(empty, 1, fourth)
    return inverse_purity.clamp_min(1).log()


def participation_ratio(p: Tensor) -> Tensor:
    """Effective Schmidt rank 1 / sum p^2 [...] of spectra p [..., d]: 1 for a product state, d if flat."""
    return 1 / p.square().sum(-1)


def entropy_ceiling(m: int, V: int) -> float:
    """log min(m, V) in nats: the entropy of the maximally entangled state in C^m (x) C^V."""
    _check_dimensions(m, V)
    return math.log(min(m, V))


def page_entropy(m: int, V: int) -> float:
    """Mean von Neumann entropy, in nats, of a random pure state in C^m (x) C^V.

    sum_{k=n+1}^{mn} 1/k - (m-1)/(2n) for m <= n, symmetric (Page 1993, arXiv:gr-qc/9305007; proof Foong,
    Kanno 1994).
    """
    _check_dimensions(m, V)
    small, large = min(m, V), max(m, V)
    return math.fsum(1 / k for k in range(large + 1, small * large + 1)) - (small - 1) / (2 * large)


def _scaled_pair(state: Tensor) -> tuple[Tensor, Tensor]:
    """Re and Im [..., m, V], scaled to a largest entry of 1 so that no fourth power over- or underflows."""
    if state.ndim < 2 or state.shape[-2] % 2 or 0 in state.shape[-2:] or state.is_complex():
        raise UserError(
            f"a state must be real of shape [..., 2m, V], rows Re|Im, got {tuple(state.shape)} "
            f"{state.dtype}; pass the state an entanglement layer returns"
        )
    state = state if state.dtype == torch.float64 else state.float()
    # The measures do not depend on the norm, so the scale is a constant to the gradient.
    largest = state.detach().abs().amax((-2, -1), keepdim=True)
    re, im = (state / torch.where(largest == 0, 1, largest)).chunk(2, dim=-2)
    return re, im


def _check_dimensions(m: int, V: int) -> None:
    if m < 1 or V < 1:
        raise UserError(f"a state needs m >= 1 and V >= 1, got m={m}, V={V}")
