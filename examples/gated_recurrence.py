"""A mixer from outside the package: the gated linear recurrence h_t = a_t h_{t-1} + (1 - a_t) v_t in every channel."""

import torch
import torch.nn.functional as F
from transformers import initialization as init

import qies
from qies.model.cache import read_states, write_states
from qies.model.layers import linear
from qies.ops.entangle import first_tokens


class GatedRecurrence(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, width = layer_idx, config.hidden_size
        self.in_proj = linear(width, 3 * width)  # values, decays, output gates
        self.decay_bias = torch.nn.Parameter(torch.empty(width))
        self.out_proj = linear(width, width, std=0.0)

    def reset_parameters(self):  # what linear() does not initialise
        init.constant_(self.decay_bias, 3.0)  # a memory of about 20 tokens

    def forward(self, x, *, mask=None, texts=None, past_key_values=None, **others):
        value, decay, gate = self.in_proj(x).float().chunk(3, -1)
        a = torch.sigmoid(decay + self.decay_bias.float())
        b = (1 - a) * value
        if mask is not None:  # a pad leaves the state as it is
            a, b = a.where(mask[..., None], 1), b.where(mask[..., None], 0)
        if texts is not None:  # each packed text starts from an empty state
            a = a.where(~first_tokens(texts)[..., None], 0)
        memory = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        [state] = read_states(memory, 1)
        if state is not None:
            b = torch.cat([b[:, :1] + a[:, :1] * state[:, None], b[:, 1:]], 1)
        step, length = 1, x.shape[1]
        while step < length:  # h by doubling (Hillis and Steele, 1986)
            b = b + a * F.pad(b, (0, 0, step, 0))[:, :length]
            a = a * F.pad(a, (0, 0, step, 0), value=1.0)[:, :length]
            step *= 2
        if memory is not None:
            write_states(memory, [b[:, -1]])
        return self.out_proj((b * torch.sigmoid(gate)).to(x.dtype)), None  # no attention weights


qies.register_mixer(
    qies.MixerSpec(
        name="gated_recurrence",
        module=f"{__name__}:GatedRecurrence",
        weights=lambda values: {
            "in_proj.weight": qies.Weight((3 * values["hidden_size"], values["hidden_size"])),
            "decay_bias": qies.Weight((values["hidden_size"],), "vector", fp32=True),
            "out_proj.weight": qies.Weight((values["hidden_size"], values["hidden_size"])),
        },
        states=lambda values: ((values["hidden_size"],),),
    )
)
qies.register_arm("gated", ["gated_recurrence"] * 3 + ["full_attention"], last="full_attention")
