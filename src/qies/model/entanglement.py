"""The entanglement mixer: a sequence written into, and read out of, one entangled state per head.

Legend: B batch, T position, D model width, H heads, m complex key channels, K = 2m, V value width per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from qies.model.cache import read_state, write_state
from qies.model.configuration import QiesConfig
from qies.model.layers import OutputGate, ShortConv, linear
from qies.ops.entangle import entangle


class Entanglement(nn.Module):
    """Projections around `qies.ops.entangle`: what is addressed, written, turned, forgotten and read.

    The state is carried in fp32, and beta, decay and phase are computed in fp32, whatever the weights' dtype.
    `reads` is switched off by `model.read_state(False)`: the state still evolves but the layer adds nothing.
    """

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.reads = config, layer_idx, True
        width, heads = config.hidden_size, config.num_attention_heads
        self.heads, self.head_dim, self.channels = heads, config.head_dim, config.channels
        inner = heads * config.head_dim
        value = inner * (2 if config.mode == "complex" else 1)
        self.conv = ShortConv(width, config.conv_size) if config.conv_size else None
        self.q_proj = linear(width, inner)
        self.k_proj = linear(width, inner)
        self.v_proj = linear(width, value)
        self.beta_size = heads * (2 if config.eigenvalues == "disc" else 1)
        self.decay_size = heads * (config.channels if config.decay == "channel" else 1)
        self.control_proj = linear(width, self.beta_size + self.decay_size)
        self.beta_bias = nn.Parameter(torch.zeros(self.beta_size))
        self.decay_bias = nn.Parameter(torch.zeros(self.decay_size))
        self.decay_rate = nn.Parameter(torch.zeros(self.decay_size))  # log of the largest decay's scale
        turning = heads * config.rotating
        if config.phase == "selective":
            self.phase_down = linear(width, config.phase_rank)
            self.phase_up = linear(config.phase_rank, turning, std=0.0)
        if config.phase != "none":
            self.phase_bias = nn.Parameter(torch.zeros(turning))
        self.gate = OutputGate(width, heads, value // heads, config.gate)
        self.o_proj = linear(value, width, std=0.0)

    def forward(self, x: Tensor, *, angles, causal_mask, mask, past_key_values, **kwargs):
        """x [B,T,D] -> [B,T,D] and None; mask [B,T] bool, False at pads, which leave the state untouched."""
        memory = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if self.conv is not None:
            x = self.conv(x, mask, memory)
        o, state = entangle(*self.events(x, mask), state=read_state(memory), mode=self.config.mode)
        if memory is not None:
            write_state(memory, state)
        if not self.reads:
            return torch.zeros_like(x), None
        return self.o_proj(self.gate(x, o)), None

    def events(self, x: Tensor, mask: Tensor | None = None):
        """The op's inputs (q, k, v, beta, log_alpha, theta) for x [B,T,D] after the convolution."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, -1)
        k = self.k_proj(x).view(batch, length, self.heads, -1)
        v = self.v_proj(x).view(batch, length, self.heads, -1)
        beta, log_alpha = self.control_proj(x).float().split([self.beta_size, self.decay_size], -1)
        beta = self._beta(beta + self.beta_bias.float())
        rate = -self.decay_rate.float().exp() * F.softplus(log_alpha + self.decay_bias.float())
        log_alpha = rate if self.config.decay == "head" else rate.unflatten(-1, (self.heads, -1))
        theta = self._theta(x)
        if mask is not None:
            keep = mask[..., None].float()
            beta = beta * keep.view(*keep.shape, *[1] * (beta.ndim - 3))
            log_alpha = log_alpha * keep.view(*keep.shape, *[1] * (log_alpha.ndim - 3))
            theta = theta if theta is None else theta * keep[..., None]
        return q, k, v, beta, log_alpha, theta

    def _beta(self, logits: Tensor) -> Tensor:
        """beta = 1 - lambda, [B,T,H] or the pair [B,T,H,2]."""
        if self.config.eigenvalues == "unit":
            return torch.sigmoid(logits)
        if self.config.eigenvalues == "signed":
            return 2 * torch.sigmoid(logits)
        z = logits.unflatten(-1, (self.heads, 2))
        radius = z.square().sum(-1, keepdim=True).add(1e-12).sqrt()
        eigenvalue = z * (torch.tanh(radius) / radius)  # any point of the open complex unit disc
        return torch.cat([1 - eigenvalue[..., :1], -eigenvalue[..., 1:]], -1)

    def _theta(self, x: Tensor) -> Tensor | None:
        """Radians a token, [B,T,H,m], or None; channels that do not rotate stay at 0."""
        config = self.config
        if config.phase == "none" or config.rotating == 0:
            return None
        angle = self.phase_bias.float()
        if config.phase == "selective":
            angle = angle + self.phase_up(self.phase_down(x)).float()
        theta = config.phase_max * torch.tanh(angle * (config.phase_slope / config.phase_max))
        theta = theta.expand(*x.shape[:2], -1).unflatten(-1, (self.heads, config.rotating))
        return F.pad(theta, (0, self.channels - config.rotating))

    @torch.no_grad()
    def reset_controls(self) -> None:
        """Start: lambda near 0 (a projective write), no phase, and memories of 16 to 4096 tokens over the heads."""
        init.zeros_(self.beta_bias)
        init.zeros_(self.decay_rate)
        spans = torch.logspace(math.log10(16), math.log10(4096), self.heads)
        if self.config.decay == "channel":
            spans = spans.repeat_interleave(self.channels)
        init.copy_(self.decay_bias, (1 / spans).expm1().log().to(self.decay_bias))  # softplus(bias) = 1 / span
        if self.config.phase != "none":
            init.zeros_(self.phase_bias)
