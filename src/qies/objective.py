"""The training objective: cross-entropy and the auxiliary terms as functions of tensors, and bits per byte.

Legend: B batch, T position, D model width, V vocabulary, H heads, m complex key channels, P positions that predict.
`qies.model.terms` holds their heads and sums them up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.loss import linear_cross_entropy
from qies.ops.measures import entropy_ceiling, renyi2_entropy

IGNORED = -100  # a target that is not predicted


def language_modelling(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, count: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy in nats per token: hidden [..,D], head weight [V,D], targets [..] (-100: ignored).

    With `count` the sum is divided by it instead, so that accumulated micro-batches add up to one mean.
    """
    flat, goal = hidden.flatten(0, -2), targets.flatten()
    mean = linear_cross_entropy(flat, weight, goal, softcap=softcap or None)
    return mean if count is None else mean * (goal != IGNORED).sum() / count


def language_modelling_of_logits(logits: Tensor, targets: Tensor, count: Tensor | int | None = None) -> Tensor:
    """The same from logits [..,V], for a head that is more than one matrix."""
    goal = targets.flatten()
    total = F.cross_entropy(logits.flatten(0, -2), goal, ignore_index=IGNORED, reduction="sum")
    return total / ((goal != IGNORED).sum().clamp(min=1) if count is None else count)


# --- far future


class Bags(NamedTuple):
    """The bags of tokens that P positions of each row predict."""

    rows: Tensor  # [N] int64, the row of each bag
    positions: Tensor  # [N] int64, the position that predicts it
    tokens: Tensor  # [N,window] int64
    distinct: Tensor  # [N,window] bool, False where the bag holds the token already


def bags(targets: Tensor, breaks: Tensor, *, gap: int, window: int, stride: int = 1) -> Bags:
    """The bags of every `stride`-th position: after position t the targets t + gap to t + gap + window - 1.

    targets [B,T]: the token after each position. breaks [B,T] bool: the target belongs to another document than the
    token before it, or is ignored. A position has no bag where one of its targets t to t + gap + window - 1 is a break,
    or lies beyond the row.
    """
    length = targets.shape[1]
    at = torch.arange(0, max(0, length - gap - window + 1), stride, device=targets.device)
    before = _breaks_before(breaks)
    rows, which = (before[:, at + gap + window] == before[:, at]).nonzero(as_tuple=True)
    positions = at[which]
    ahead = positions[:, None] + gap + torch.arange(window, device=targets.device)
    distinct = _previous(targets)[rows[:, None], ahead] < positions[:, None] + gap
    return Bags(rows, positions, targets[rows[:, None], ahead], distinct)


def _breaks_before(breaks: Tensor) -> Tensor:
    """The number of breaks before each position and before the end, [B,T] bool -> [B,T+1] int64."""
    return F.pad(breaks.long().cumsum(1), (1, 0))


def _previous(tokens: Tensor) -> Tensor:
    """The last position before each at which its row holds the same token, or -1, [B,T]."""
    order = tokens.argsort(dim=1, stable=True)
    ordered = tokens.gather(1, order)
    same = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    last = F.pad(order[:, :-1], (1, 0), value=-1)
    return torch.empty_like(order).scatter(1, order, torch.where(same, last, -1))


def far_future(logits: Tensor, found: Bags) -> Tensor:
    """Mean cross-entropy in nats between the logits [N,V] and the uniform distribution over the distinct tokens of each
    bag; 0 without bags. After future summary prediction, arXiv:2510.14751."""
    logits = logits.float()
    of_bag = (logits.gather(1, found.tokens) * found.distinct).sum(1) / found.distinct.sum(1)
    return (logits.logsumexp(1) - of_bag).sum() / max(1, len(logits))


# --- entropy floor


def entropy_floor(states: Sequence[Tensor], level: float) -> Tensor:
    """Mean of relu(S_min - S2)^2 over all states, in nats squared: states [..,H,2m,V] of several shapes, S2 the Renyi-2
    entropy across key | value, S_min = `level` log min(m, V)."""
    lacking = [level * entropy_ceiling(s.shape[-2] // 2, s.shape[-1]) - renyi2_entropy(s) for s in states]
    return F.relu(torch.cat([x.flatten() for x in lacking])).square().mean()


def states_of_hidden(hidden: Tensor, heads: int, chunk: int) -> Tensor:
    """The control where a model has no states: for each chunk and each of `heads` slices of D the matrix
    sum_t e_t (x) h_t of its hidden vectors, position | channel, as [B,T/chunk,H,2*chunk,D/H] with imaginary part 0.

    Tokens beyond the last whole chunk are left out; a shorter sequence is one chunk.
    """
    chunk = min(chunk, hidden.shape[1])
    whole = hidden[:, : hidden.shape[1] // chunk * chunk]
    real = whole.unflatten(1, (-1, chunk)).unflatten(-1, (heads, -1)).transpose(2, 3)
    return torch.cat([real, torch.zeros_like(real)], -2)


# --- LongCE


def segments(x: Tensor, window: int) -> Tensor:
    """Overlapping segments of 2 * window positions, from `window` on, one every `window`: [B,T,..] ->
    [B*n,2*window,..], filled up with zeros; n = 0 where T <= 2 * window.

    The second halves hold every position from 2 * window on once, each after window to 2 * window - 1 others.
    """
    count = max(0, -(-x.shape[1] // window) - 2)
    missing = (count + 2) * window - x.shape[1]
    padded = torch.cat([x, x.new_zeros(x.shape[0], max(0, missing), *x.shape[2:])], 1)
    parts = [padded[:, i * window : (i + 2) * window] for i in range(1, count + 1)]
    return torch.stack(parts, 1).flatten(0, 1) if parts else x.new_empty(0, 2 * window, *x.shape[2:])


def second_halves(x: Tensor, rows: int, length: int) -> Tensor:
    """The inverse of `segments` for what was computed on them: [rows*n,2*window,..] -> [rows,length-2*window,..]."""
    return x[:, x.shape[1] // 2 :].unflatten(0, (rows, -1)).flatten(1, 2)[:, : length - x.shape[1]]


def long_context(long: Tensor, short: Tensor, clip: float, count: Tensor | int) -> Tensor:
    """What LongCE adds to the cross-entropy (Fang et al., arXiv:2410.23771): sum of (w - 1) nll / count.

    long [N]: the losses of tokens in nats after their whole context, short [N] after a short one; w = exp(short - long)
    clipped at `clip`, a constant to the gradient.
    """
    weight = (short - long.detach()).exp().clamp(max=clip)
    return ((weight - 1) * long).sum() / count


# --- multi-token prediction


def ahead(targets: Tensor, breaks: Tensor, steps: int) -> Tensor:
    """The targets `steps` positions further on, [B,T]; -100 beyond the row, and where a break lies on the way there."""
    before = _breaks_before(breaks)
    crossed = before[:, steps + 1 :] != before[:, : max(0, targets.shape[1] - steps)]
    return F.pad(targets[:, steps:].masked_fill(crossed, IGNORED), (0, min(steps, targets.shape[1])), value=IGNORED)


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed cross-entropy in nats of a text of `n_bytes` UTF-8 bytes -> bits per byte, free of the tokenizer."""
    return nats / (math.log(2) * n_bytes)
