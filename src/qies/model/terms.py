"""The auxiliary terms of the objective: their heads, what they see of a model, and their weighted sum.

Legend: B batch, T position, D model width, V vocabulary, H heads, m complex key channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qies import objective
from qies.accounting.objective import readout_width
from qies.config import ObjectiveConfig
from qies.model.layers import linear
from qies.ops.norm import rms_norm

if TYPE_CHECKING:
    from qies.model.configuration import QiesConfig


@dataclass(frozen=True)
class Seen:
    """What the terms see of one forward pass."""

    hidden: Tensor  # [B,T,D], after the last norm
    targets: Tensor  # [B,T] int64, the token after each position, -100 where it is not predicted
    breaks: Tensor  # [B,T] bool, where the target begins another document, or is ignored
    count: Tensor | int  # the targets that the loss is a mean over
    readouts: tuple[Tensor, ...]  # [B,T,H,V] of each group of heads of each entanglement layer
    states: tuple[Tensor, ...]  # [B,C,H,2m,V] of the same, at the ends of C chunks
    logits: Callable[[Tensor], Tensor]  # [..,D] -> [..,V], through the unembedding
    cross_entropy: Callable[[Tensor, Tensor], Tensor]  # hidden [B,T,D], targets [B,T] -> their mean
    short: Callable[[int], Tensor]  # window -> losses [B,T-2*window] after short contexts, without gradient


class FarFuture(nn.Module):
    """A low-rank map of normalised read-outs into the width of the unembedding."""

    def __init__(self, config: QiesConfig, settings: ObjectiveConfig) -> None:
        super().__init__()
        self.down = linear(readout_width(vars(config)), settings.far_future_rank)
        self.up = linear(settings.far_future_rank, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..,R] -> [..,D], of unit mean square."""
        return rms_norm(self.up(self.down(x)))


class MultiToken(nn.Module):
    """For each further token a map of the last hidden state, added to it (after Gloeckle et al., arXiv:2404.19737, who
    take a block in place of a map)."""

    def __init__(self, config: QiesConfig, settings: ObjectiveConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.maps = nn.ModuleList(linear(width, width, std=0.0) for _ in range(settings.multi_token_ahead))


def far_future(terms: Objective, seen: Seen) -> Tensor:
    """From the read-outs alone: no residual stream, and no gate, which depends on the token at hand."""
    settings = terms.settings
    found = objective.bags(
        seen.targets, seen.breaks, gap=settings.far_future_gap, window=settings.far_future_window,
        stride=settings.far_future_stride,
    )  # fmt: skip
    sources = [rms_norm(o[found.rows, found.positions]).flatten(1) for o in seen.readouts]
    x = torch.cat(sources, -1) if sources else seen.hidden[found.rows, found.positions]
    return objective.far_future(seen.logits(terms.heads["far_future"](x)), found)


def entropy_floor(terms: Objective, seen: Seen) -> Tensor:
    settings = terms.settings
    control = (objective.states_of_hidden(seen.hidden, terms.slices, settings.entropy_floor_chunk),)
    return objective.entropy_floor(seen.states or control, settings.entropy_floor_level)


def long_context(terms: Objective, seen: Seen) -> Tensor:
    window, clip = terms.settings.long_context_window, terms.settings.long_context_clip
    goals = seen.targets[:, 2 * window :]
    kept = goals != objective.IGNORED
    if not kept.any():
        return seen.hidden.new_zeros(())
    logits = seen.logits(seen.hidden[:, 2 * window :][kept])
    losses = torch.nn.functional.cross_entropy(logits, goals[kept], reduction="none")
    return objective.long_context(losses, seen.short(window)[kept], clip, seen.count)


def multi_token(terms: Objective, seen: Seen) -> Tensor:
    losses = []
    for steps, map_ in enumerate(terms.heads["multi_token"].maps, 1):  # type: ignore[arg-type]
        hidden = rms_norm(seen.hidden + map_(seen.hidden))
        losses.append(seen.cross_entropy(hidden, objective.ahead(seen.targets, seen.breaks, steps)))
    return torch.stack(losses).mean()


# What computes a term, and the module of its parameters if it has any.
TERMS: dict[str, tuple[Callable[[Objective, Seen], Tensor], type[nn.Module] | None]] = {
    "far_future": (far_future, FarFuture),
    "entropy_floor": (entropy_floor, None),
    "long_context": (long_context, None),
    "multi_token": (multi_token, MultiToken),
}
PER_TOKEN = ("long_context",)  # already a sum over the tokens of this batch, divided by the count of all


class Objective(nn.Module):
    """The terms with a weight in `config.objective`. `progress` is the fraction of training done; `values` holds the
    cross-entropy and the terms of the last forward pass, unweighted, as detached scalars."""

    def __init__(self, config: QiesConfig) -> None:
        super().__init__()
        self.settings = ObjectiveConfig(**(config.objective or {}))
        self.slices = math.gcd(config.hidden_size, config.num_attention_heads)
        self.progress = 0.0
        self.values: dict[str, Tensor] = {}
        for name in self.settings.terms:
            if (head := TERMS[name][1]) is not None:
                self.add_module(name, head(config, self.settings))

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The modules of the terms, by name."""
        return dict(self.named_children())

    @property
    def factor(self) -> float:
        """What the weights are multiplied by now; at 0 no term is computed."""
        return self.settings.factor(self.progress)

    @property
    def observe(self) -> int:
        """Tokens of the chunks at whose ends the terms see the states; more than any sequence has: only at its end;
        0: no term sees states or read-outs."""
        if "entropy_floor" in self.settings.terms:
            return self.settings.entropy_floor_chunk
        return 2**62 if "far_future" in self.settings.terms else 0

    def forward(self, cross_entropy: Tensor, seen: Seen, share: Tensor | float) -> Tensor:
        """cross_entropy plus every term times its weight. `share`: the fraction of the tokens of an accumulated batch
        that this one holds, so that the terms add up to a mean too."""
        self.values, total = {"cross_entropy": cross_entropy.detach()}, cross_entropy
        for name in self.settings.terms:
            value = TERMS[name][0](self, seen)
            value = value if name in PER_TOKEN else value * share
            self.values[name] = value.detach()
            total = total + self.factor * getattr(self.settings, name) * value
        return total
