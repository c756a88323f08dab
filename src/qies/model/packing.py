"""Packed rows: find the texts of a row from any of the arguments with which collators mark them.

Legend: B batch, T position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.entangle.layout import first_tokens, readable


class Rows(NamedTuple):
    """The pads and texts of a batch of rows."""

    real: Tensor | None  # [B,T] bool, False at pads; None without pads
    texts: Tensor | None  # [B,T] int64, increasing from text to text, pads as the token before; None: one text per row
    mask: Tensor | None  # [B,1,T,S], an attention mask that is not block-causal


def read_rows(
    shape: torch.Size,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    cached: bool = False,
) -> Rows:
    """The pads and texts of B rows of T tokens.

    A text begins at a real token where any of the arguments marks a boundary.

    Args:
        shape: [B,T].
        attention_mask: [B,S], 1 at real tokens and 0 at pads, for these T tokens and those in the cache; or [B,1,T,T],
            True (or an additive 0) where a token attends to another, causal within one block per text.
        position_ids: [B,T] or [1,T]. A boundary is where they do not increase by one (as in transformers).
        seq_idx: [B,T] or [1,T]. A boundary is where it changes.
        cu_seq_lens: [N+1], the cumulative lengths of N texts in the B * T tokens, from 0.
        cached: Whether a cache holds earlier tokens. Each row is then one text.

    Raises ValueError for invalid shapes or values, and for packed texts combined with a cache. If values cannot be
    read, as in an export, every given argument is assumed to mark pads or texts, except position_ids with a cache.
    """
    real = mask = None
    marks = []
    if attention_mask is not None and attention_mask.ndim == 2:
        real = _real(attention_mask, shape[1])
    elif attention_mask is not None and attention_mask.ndim == 4:
        blocks = None if cached else of_block_mask(attention_mask, shape)
        if blocks is None:
            mask = attention_mask
        else:
            real = _real(blocks[0], shape[1])
            marks.append(_breaks(blocks[1], 0, real))
    elif attention_mask is not None:
        raise ValueError(f"attention_mask must be [B, T] or [B, 1, T, T]; got {list(attention_mask.shape)}.")
    if position_ids is not None and shape[1] > 1 and (readable(position_ids) or not cached):
        marks.append(_breaks(_rows("position_ids", position_ids, shape), 1, real))
    if seq_idx is not None:
        marks.append(_breaks(_rows("seq_idx", seq_idx, shape), 0, real))
    if cu_seq_lens is not None:
        marks.append(_breaks(_numbered(cu_seq_lens, shape), 0, real))
    if not marks:
        return Rows(real, None, mask)
    first = torch.stack(marks).any(0)
    if readable(first) and not first.any():
        return Rows(real, None, mask)
    if cached:
        raise ValueError(
            "Packed texts (seq_idx, cu_seq_lens, position_ids that restart) cannot be combined with a cache."
        )
    return Rows(real, first.long().cumsum(1), mask)


def positions_of(texts: Tensor, real: Tensor | None) -> Tensor:
    """The position of each real token within its text, [B,T] int64 from 0."""
    count = (torch.ones_like(texts) if real is None else real.long()).cumsum(1) - 1
    return (count - (count * first_tokens(texts)).cummax(1).values).clamp(min=0)


def ends_of(texts: Tensor) -> Tensor:
    """The cumulative lengths of all texts in the B * T tokens, [N+1] int32 from 0, as attention kernels expect them."""
    first = first_tokens(texts)
    first[:, 0] = True
    return F.pad(first.flatten().nonzero().squeeze(1), (0, 1), value=texts.numel()).int()


def _real(mask: Tensor, length: int) -> Tensor | None:
    """The bool mask [B,T] of the current tokens, or None without pads."""
    real = mask[:, -length:]
    if readable(mask) and mask.numel():
        low, high = real.aminmax()
        if low < 0 or high > 1:
            raise ValueError(
                f"attention_mask [B, T] has values from {low} to {high}, but must be 0 (pad) or 1; "
                "number packed texts in seq_idx."
            )
        if low == 1:
            return None
    return real.bool()


def of_block_mask(mask: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """(real, seq_idx), both [B,T], of a block-causal mask [B,1,T,T] with one block per text; None for another mask.

    The mask is True, or an additive 0, where a query (axis 2) attends to a key (axis 3). A token that does not attend
    to itself is a pad.
    """
    batch, length = shape
    if mask.shape[1:] != (1, length, length) or len(mask) not in (1, batch):
        return None
    allowed = mask[:, 0] == 0 if mask.is_floating_point() else mask[:, 0].bool()
    real = allowed.diagonal(dim1=1, dim2=2)
    begin = allowed.to(torch.uint8).argmax(-1)  # the first token that each attends to
    block = (begin[:, :, None] == begin[:, None]) & real[:, None]
    if ((allowed != block.tril()) & real[:, :, None]).any():
        return None
    return real.expand(batch, -1), begin.expand(batch, -1)


def _rows(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    if x.ndim != 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} is {list(x.shape)} but must be {list(shape)}, a number for each token.")
    return x.long().expand(shape)


def _numbered(ends: Tensor, shape: torch.Size) -> Tensor:
    """The index of each token's text, [B,T], from the cumulative lengths."""
    ends = ends.long()
    if readable(ends) and (ends.ndim != 1 or ends[0] != 0 or ends[-1] != shape.numel() or (ends.diff() < 0).any()):
        raise ValueError(f"cu_seq_lens must grow from 0 to the number of tokens, {shape.numel()}; got {ends.tolist()}.")
    begins = torch.zeros(shape.numel() + 1, dtype=torch.long, device=ends.device).index_fill(0, ends, 1)
    return begins[:-1].cumsum(0).view(shape)


def _breaks(x: Tensor, step: int, real: Tensor | None) -> Tensor:
    """Where x [B,T] is not `step` more than at the previous real token, [B,T] bool; False at pads and first tokens."""
    if real is None:
        return F.pad(x.diff() != step, (1, 0))
    last = torch.where(real, torch.arange(x.shape[1], device=x.device), -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    return real & (before >= 0) & (x != x.gather(1, before.clamp(min=0)) + step)
