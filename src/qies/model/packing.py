"""Packed rows, several texts one after the other: where each begins, from any of the forms that collators give.

Legend: B batch, T position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qies.ops.entangle.layout import first_tokens, readable


class Rows(NamedTuple):
    """What a batch of rows holds."""

    real: Tensor | None  # [B,T] bool, False at pads; None when nothing is padded
    texts: Tensor | None  # [B,T] int64, growing from text to text, at pads as before them; None: a row is one text
    mask: Tensor | None  # [B,1,T,S], an attention mask that says something else


def read_rows(
    shape: torch.Size,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    cached: bool = False,
) -> Rows:
    """The pads and texts of B rows of T tokens, `shape` [B,T].

    A text begins where any of these says so, from one real token to the next:

    attention_mask: [B,S], 1 at real tokens and 0 at pads, for these T tokens and those before; or [B,1,T,T], True (or
        an additive 0) where a token attends to another: causal, inside blocks for the texts.
    position_ids: [B,T] or [1,T]; do not go on by one (the rule of transformers).
    seq_idx: [B,T] or [1,T]; changes.
    cu_seq_lens: [N+1], the ends of N texts in the B * T tokens, from 0 on.
    cached: whether a cache holds tokens before these. Then a row is one text.

    Raises ValueError for shapes or values that do not fit, and for packed texts beside a cache. Where the numbers
    cannot be read, as in an export, whatever is given is taken to mark pads or texts, but beside a cache position_ids
    are not.
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
        raise ValueError("Packed texts (seq_idx, cu_seq_lens, position_ids that start again) go without a cache.")
    return Rows(real, first.long().cumsum(1), mask)


def positions_of(texts: Tensor, real: Tensor | None) -> Tensor:
    """Each real token's position among those of its text, [B,T] int64 from 0."""
    count = (torch.ones_like(texts) if real is None else real.long()).cumsum(1) - 1
    return (count - (count * first_tokens(texts)).cummax(1).values).clamp(min=0)


def ends_of(texts: Tensor) -> Tensor:
    """[N+1] int32: the ends of all rows' texts in the B * T tokens, from 0 on, as attention kernels take them."""
    first = first_tokens(texts)
    first[:, 0] = True
    return F.pad(first.flatten().nonzero().squeeze(1), (0, 1), value=texts.numel()).int()


def _real(mask: Tensor, length: int) -> Tensor | None:
    """The present tokens' [B,T] bool mask, or None when nothing is padded."""
    real = mask[:, -length:]
    if readable(mask) and mask.numel():
        low, high = real.aminmax()
        if low < 0 or high > 1:
            raise ValueError(
                f"attention_mask [B, T] holds values from {low} to {high} but only 0 (pad) and 1 mean something; "
                "number packed texts in seq_idx."
            )
        if low == 1:
            return None
    return real.bool()


def of_block_mask(mask: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    """(real, seq_idx), both [B,T], of a mask [B,1,T,T] that is causal inside blocks, one for each text; else None.

    The mask is True, or an additive 0, where a query (axis 2) may attend to a key (axis 3). A token that may not
    attend to itself is a pad.
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
    """The number of each token's text, [B,T], from the texts' ends."""
    ends = ends.long()
    if readable(ends) and (ends.ndim != 1 or ends[0] != 0 or ends[-1] != shape.numel() or (ends.diff() < 0).any()):
        raise ValueError(f"cu_seq_lens must grow from 0 to the number of tokens, {shape.numel()}; got {ends.tolist()}.")
    begins = torch.zeros(shape.numel() + 1, dtype=torch.long, device=ends.device).index_fill(0, ends, 1)
    return begins[:-1].cumsum(0).view(shape)


def _breaks(x: Tensor, step: int, real: Tensor | None) -> Tensor:
    """Where x [B,T] is not `step` more than at the real token before, [B,T] bool; never at a row's first, nor a pad."""
    if real is None:
        return F.pad(x.diff() != step, (1, 0))
    last = torch.where(real, torch.arange(x.shape[1], device=x.device), -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    return real & (before >= 0) & (x != x.gather(1, before.clamp(min=0)) + step)
