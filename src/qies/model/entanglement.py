"""The entanglement mixer: a sequence written into, and read out of, one entangled state per head.

Legend: B batch, T position, D model width, H heads, m complex key channels, K = 2m, V value width per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from qies.model.cache import read_states, write_states
from qies.model.configuration import QiesConfig
from qies.model.layers import OutputGate, ShortConv, linear, split
from qies.ops.entangle import evolve
from qies.presets import HeadGroup


class Entanglement(nn.Module):
    """Projections around `qies.ops.entangle`: what is addressed, written, turned, forgotten and read.

    Heads of several shapes share the projections, whose outputs stand group after group (`config.head_groups`).
    The states are carried in fp32, and beta, decay and phase are computed in fp32, whatever the weights' dtype.
    `reads` is switched off by `model.read_state(False)`: the states still evolve but the layer adds nothing.
    """

    controls = frozenset({"beta_bias", "decay_bias", "decay_rate", "phase_bias"})  # fp32 in every model's weights

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.reads = config, layer_idx, True
        self.groups, width = config.head_groups, config.hidden_size
        keys, values = sum(g.key_width for g in self.groups), sum(g.value_width for g in self.groups)
        self.beta_size, self.decay_size = sum(g.betas for g in self.groups), sum(g.decays for g in self.groups)
        phases = sum(g.phases for g in self.groups)
        self.conv = ShortConv(width, config.conv_size) if config.conv_size else None
        self.q_proj = linear(width, keys)
        self.k_proj = linear(width, keys)
        self.v_proj = linear(width, values)
        self.control_proj = linear(width, self.beta_size + self.decay_size)
        self.beta_bias = nn.Parameter(torch.zeros(self.beta_size))
        self.decay_bias = nn.Parameter(torch.zeros(self.decay_size))
        self.decay_rate = nn.Parameter(torch.zeros(self.decay_size))  # log of the largest decay's scale
        if config.phase == "selective":
            self.phase_down = linear(width, config.phase_rank)
            self.phase_up = linear(config.phase_rank, phases, std=0.0)
        if config.phase != "none":
            self.phase_bias = nn.Parameter(torch.zeros(phases))
        self.gate = OutputGate(width, sum(g.heads for g in self.groups), values, config.gate)
        self.o_proj = linear(values, width, std=0.0)

    def forward(self, x: Tensor, *, angles, causal_mask, mask, past_key_values, texts=None, **kwargs):
        """x [B,T,D] -> [B,T,D] and None; mask [B,T] bool, False at pads, which leave the states untouched; texts [B,T],
        the number of each token's text in a packed row: each starts from an empty state."""
        memory = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if self.conv is not None:
            x = self.conv(x, mask, memory, texts)
        runs = zip(self.groups, self.events(x, mask), read_states(memory, len(self.groups)), strict=True)
        outputs, states = zip(*(evolve(*e, state=s, mode=group.mode, texts=texts) for group, e, s in runs), strict=True)
        if memory is not None:
            write_states(memory, states)
        if not self.reads:
            return torch.zeros_like(x), None
        return self.o_proj(self.gate(x, *outputs)), None

    def events(self, x: Tensor, mask: Tensor | None = None) -> list[tuple]:
        """The op's inputs (q, k, v, beta, log_alpha, theta) of each group, for x [B,T,D] after the convolution."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        beta, log_alpha = self.control_proj(x).float().split([self.beta_size, self.decay_size], -1)
        rate = -self.decay_rate.float().exp() * F.softplus(log_alpha + self.decay_bias.float())
        keep = None if mask is None else mask[..., None].float()
        parts = zip(
            self.groups,
            split(q, [g.key_width for g in self.groups]),
            split(k, [g.key_width for g in self.groups]),
            split(v, [g.value_width for g in self.groups]),
            split(beta + self.beta_bias.float(), [g.betas for g in self.groups]),
            split(rate, [g.decays for g in self.groups]),
            self._theta(x),
            strict=True,
        )
        return [
            (
                *(y.unflatten(-1, (group.heads, -1)) for y in (q, k, v)),
                _kept(self._beta(group, logits), keep),
                _kept(decay if self.config.decay == "head" else decay.unflatten(-1, (group.heads, -1)), keep),
                _kept(theta, keep),
            )
            for group, q, k, v, logits, decay, theta in parts
        ]

    def _beta(self, group: HeadGroup, logits: Tensor) -> Tensor:
        """beta = 1 - lambda of a group's heads, [B,T,H] or the pair [B,T,H,2]."""
        if group.eigenvalues == "unit":
            return torch.sigmoid(logits)
        if group.eigenvalues == "signed":
            return 2 * torch.sigmoid(logits)
        z = logits.unflatten(-1, (group.heads, 2))
        radius = z.square().sum(-1, keepdim=True).add(1e-12).sqrt()
        eigenvalue = z * (torch.tanh(radius) / radius)  # any point of the open complex unit disc
        return torch.cat([1 - eigenvalue[..., :1], -eigenvalue[..., 1:]], -1)

    def _theta(self, x: Tensor) -> list[Tensor | None]:
        """Radians a token of each group, [B,T,H,m], or None; channels that do not rotate stay at 0."""
        config = self.config
        if config.phase == "none":
            return [None] * len(self.groups)
        angle = self.phase_bias.float()
        if config.phase == "selective":
            angle = angle + self.phase_up(self.phase_down(x)).float()
        theta = config.phase_max * torch.tanh(angle * (config.phase_slope / config.phase_max))
        parts = split(theta.expand(*x.shape[:2], -1), [g.phases for g in self.groups])
        padded: list[Tensor | None] = []
        for group, part in zip(self.groups, parts, strict=True):
            rotating = group.phases // group.heads
            part = F.pad(part.unflatten(-1, (group.heads, rotating)), (0, group.channels - rotating))
            padded.append(part if rotating else None)
        return padded

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with lambda near 0 (a projective write), no phase, and memories of `spans` tokens over a group."""
        init.zeros_(self.beta_bias)
        init.zeros_(self.decay_rate)
        spans = torch.cat([_spread(*g.spans, g.heads).repeat_interleave(g.decays // g.heads) for g in self.groups])
        init.copy_(self.decay_bias, (1 / spans).expm1().log().to(self.decay_bias))  # softplus(bias) = 1 / span
        if self.config.phase != "none":
            init.zeros_(self.phase_bias)


def _spread(first: float, last: float, heads: int) -> Tensor:
    """Evenly spaced on the log scale, [H]."""
    return torch.logspace(math.log10(first), math.log10(last), heads, dtype=torch.float32)


def _kept(x: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """x [B,T,...] times keep [B,T,1], 0 at pads; x itself when nothing is padded."""
    if x is None or keep is None:
        return x
    return x * keep.view(*keep.shape, *[1] * (x.ndim - 3))
