"""The attention mixer: QK-norm, rotary or no positions, causal SDPA. Legend: B T D H K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qies.mixers.attention import conv_width
from qies.model.configuration import QiesConfig
from qies.model.layers import OutputGate, ShortConv, linear
from qies.ops.attention import causal_attention
from qies.ops.norm import rms_norm
from qies.ops.pairs import rotate


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention for `attn_implementation="eager"`; also returns the weights [B,H,T,S]."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if attention_mask is not None:  # softmax would let a fully masked row attend to all tokens, future ones too
        weights = weights * (attention_mask > torch.finfo(attention_mask.dtype).min).any(-1, keepdim=True)
    return (weights @ value).transpose(1, 2), weights


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float, fraction: float = 1.0) -> Tensor:
    """Angles [B,T,1,K/2] in fp32 radians (Su et al., arXiv:2104.09864).

    The first `fraction` of the K/2 channel pairs rotate, with frequencies from 1 to 1/theta as in a head of that many
    pairs; the others have angle 0 (partial rotation: Black et al., GPT-NeoX-20B, arXiv:2204.06745).
    """
    rotating = round(fraction * head_dim / 2)
    half = torch.arange(rotating, device=position_ids.device, dtype=torch.float32) / max(rotating, 1)
    frequency = torch.nn.functional.pad(theta**-half, (0, head_dim // 2 - rotating))
    return (position_ids[..., None].float() * frequency)[:, :, None]


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, causal_mask: Tensor | None, blocks: Tensor | None, **kwargs):
    """Attention by the configured implementation: q [B,H,T,K], k, v [B,H,S,K] -> o [B,T,H,K] and the weights [B,H,T,S]
    or None. `causal_mask` None means causal attention, within equal `blocks` [B,T] if given."""
    name = module.config._attn_implementation
    if name == "sdpa" and causal_mask is None and q.shape[2] == k.shape[2]:
        return causal_attention(q, k, v, blocks).transpose(1, 2), None
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
        taps, self.conv_on = config.attention_conv_size, config.attention_conv
        self.conv = ShortConv(conv_width(vars(config)), taps) if taps else None
        # Layers without positions interleaved with layers with positions: Yang et al., arXiv:2501.18795.
        before = (config.layer_types or [])[:layer_idx]
        number = before.count("full_attention") + 1  # of this layer among those of attention
        self.rotates = not config.nope_interval or number % config.nope_interval != 0
        self.q_proj = linear(width, inner)
        self.k_proj = linear(width, inner)
        self.v_proj = linear(width, inner)
        self.q_scale = nn.Parameter(torch.ones(config.head_dim))
        self.gate = OutputGate(width, config.num_attention_heads, inner, config.gate)
        self.o_proj = linear(inner, width, std=0.0)

    def reset_parameters(self) -> None:
        init.ones_(self.q_scale)

    def forward(self, x: Tensor, *, angles, causal_mask, mask, past_key_values, blocks=None, texts=None, **kwargs):
        """x [B,T,D] -> [B,T,D] and the attention weights or None.

        causal_mask: None for causal attention. mask: [B,T] bool, False at pads. texts: [B,T], the index of each token's
        text in a packed row. blocks: the same with 0 at pads; tokens attend within their block.
        """
        batch, length, _ = x.shape
        memory = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if self.conv is not None and self.conv_on == "input":
            x = self.conv(x, mask, memory, texts)
        shape = (batch, length, -1, self.head_dim)
        q = rms_norm(self.q_proj(x).view(shape)) * self.q_scale.to(x.dtype)
        keys = self.k_proj(x)
        if self.conv is not None and self.conv_on == "keys":
            keys = self.conv(keys, mask, memory, texts)
        k = rms_norm(keys.view(shape))
        v = self.v_proj(x).view(shape)
        if angles is not None and self.rotates:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        o, weights = attend(self, q, k, v, causal_mask, blocks, **kwargs)
        return self.o_proj(self.gate(x, o)), weights
