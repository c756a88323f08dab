"""GPT-2's own block (Radford et al., 2019): LayerNorm, GELU, biases everywhere, learned positions in the model.

Legend: B batch, H heads, T position, D width, K head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qies.model.attention import attend
from qies.model.configuration import QiesConfig

GPT2_STD = 0.02  # of the initial weights and embeddings; biases start at zero


def residual_std(config: QiesConfig) -> float:
    """Standard deviation of the initial weights of a projection into the residual stream."""
    return GPT2_STD * (2 * config.num_hidden_layers) ** -0.5


class Gpt2Attention(nn.Module):
    """Multi-head self-attention with biases; positions come from the embedding."""

    is_causal = True

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * inner)
        self.o_proj = nn.Linear(inner, width)
        self.qkv_proj.init_std = GPT2_STD  # type: ignore[assignment]
        self.o_proj.init_std = residual_std(config)  # type: ignore[assignment]

    def forward(self, x: Tensor, *, angles, causal_mask, mask, past_key_values, blocks=None, texts=None, **kwargs):
        """x [B,T,D] -> [B,T,D] and the weights or None."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv_proj(x).chunk(3, -1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        o, weights = attend(self, q, k, v, causal_mask, blocks, **kwargs)
        return self.o_proj(o.flatten(2)), weights


class Gpt2Block(GradientCheckpointingLayer):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)) with the tanh form of GELU."""

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.mixer_norm = nn.LayerNorm(width)
        self.mixer = Gpt2Attention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)
        self.up_proj.init_std = GPT2_STD  # type: ignore[assignment]
        self.down_proj.init_std = residual_std(config)  # type: ignore[assignment]

    def forward(self, x: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.mixer(self.mixer_norm(x), **kwargs)
        x = x + mixed
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x)), approximate="tanh")), weights
