"""Gated linear attention (Yang et al., arXiv:2312.06635) with the kernel of flash-linear-attention, as a mixer."""

import torch
import torch.nn.functional as F

import qies
from qies.model.cache import read_states, write_states
from qies.model.layers import linear


class GatedLinearAttention(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads, width = layer_idx, config.num_attention_heads, config.hidden_size
        self.in_proj = linear(width, 4 * width)  # queries, keys, values, decays
        self.out_proj = linear(width, width, std=0.0)

    def forward(self, x, *, mask=None, texts=None, past_key_values=None, **others):
        from fla.ops.gla import chunk_gla  # needs CUDA and Triton

        if texts is not None:
            raise ValueError("This mixer takes no packed texts.")
        q, k, v, decay = (t.unflatten(-1, (self.heads, -1)) for t in self.in_proj(x).chunk(4, -1))
        decay = F.logsigmoid(decay.float()) / 16
        if mask is not None:  # a pad leaves the state as it is
            k, decay = k * mask[..., None, None], decay * mask[..., None, None]
        memory = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        [state] = read_states(memory, 1)
        o, state = chunk_gla(q, k, v, decay, initial_state=state, output_final_state=memory is not None)
        if memory is not None:
            write_states(memory, [state])
        return self.out_proj(o.flatten(2).to(x.dtype)), None


def flops(values, seq_len):
    """In chunks of C tokens, per head with K = V: 2 C K for scores and their use (lower halves), 4 K V for states."""
    k = values["hidden_size"] // values["num_attention_heads"]
    return values["num_attention_heads"] * (2.0 * min(64, seq_len) * k + 4.0 * k * k)


def states(values):
    k = values["hidden_size"] // values["num_attention_heads"]
    return ((values["num_attention_heads"], k, k),)


qies.register_mixer(
    qies.MixerSpec(
        name="gla",
        module=f"{__name__}:GatedLinearAttention",
        weights=lambda values: {
            "in_proj.weight": qies.Weight((4 * values["hidden_size"], values["hidden_size"])),
            "out_proj.weight": qies.Weight((values["hidden_size"], values["hidden_size"])),
        },
        flops=flops,
        states=states,
    )
)
qies.register_arm("gla", ["gla"] * 3 + ["full_attention"], last="full_attention")
