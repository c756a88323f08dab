"""The attention mixer: QK-norm, rotary or no positions, causal SDPA. Legend: B T D H K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qies.model.configuration import QiesConfig
from qies.model.layers import OutputGate, ShortConv, linear
from qies.ops.attention import causal_attention
from qies.ops.norm import rms_norm
from qies.ops.pairs import rotate


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, for `attn_implementation="eager"`; also returns the weights [B,H,T,S]."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles [B,T,1,K/2] in fp32 radians (Su et al., arXiv:2104.09864)."""
    half = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    return (position_ids[..., None].float() * theta**-half)[:, :, None]


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, causal_mask: Tensor | None, **kwargs):
    """Attention by the implementation the configuration names: q [B,H,T,K], k, v [B,H,S,K] -> o [B,T,H,K] and the
    weights [B,H,T,S] where it gives them. `causal_mask` None means plain causal order."""
    name = module.config._attn_implementation
    if name == "sdpa" and causal_mask is None and q.shape[2] == k.shape[2]:
        return causal_attention(q, k, v).transpose(1, 2), None
    run = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name, sdpa_attention_forward)
    return run(module, q, k, v, causal_mask, scaling=q.shape[-1] ** -0.5, dropout=0.0, **kwargs)


class Attention(nn.Module):
    """Causal self-attention with normalised queries and keys (Henry et al., arXiv:2010.04245)."""

    is_causal = True

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, self.head_dim = config.hidden_size, config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.conv = ShortConv(width, config.attention_conv_size) if config.attention_conv_size else None
        self.q_proj = linear(width, inner)
        self.k_proj = linear(width, inner)
        self.v_proj = linear(width, inner)
        self.q_scale = nn.Parameter(torch.ones(config.head_dim))
        self.gate = OutputGate(width, config.num_attention_heads, inner, config.gate)
        self.o_proj = linear(inner, width, std=0.0)

    def forward(self, x: Tensor, *, angles, causal_mask, mask, past_key_values, **kwargs):
        """x [B,T,D] -> [B,T,D] and the weights or None. `causal_mask` is None when plain causal order holds;
        mask [B,T] bool, False at pads."""
        batch, length, _ = x.shape
        if self.conv is not None:
            x = self.conv(x, mask, past_key_values.layers[self.layer_idx] if past_key_values is not None else None)
        shape = (batch, length, -1, self.head_dim)
        q = rms_norm(self.q_proj(x).view(shape)) * self.q_scale.to(x.dtype)
        k = rms_norm(self.k_proj(x).view(shape))
        v = self.v_proj(x).view(shape)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        o, weights = attend(self, q, k, v, causal_mask, **kwargs)
        return self.o_proj(self.gate(x, o)), weights
