"""Two published recurrences, beside which `qies probe --plugin` puts the entanglement layer.

`delta_product` (Siems et al., arXiv:2502.10297): two Householder steps a token with eigenvalues in [-1, 1], one decay.
`diagonal_phase`: a diagonal complex transition, decay and data-dependent rotation, with additive writes and no removal
along the key, the state of Mamba-3 (arXiv:2603.15569) without its discretisation.
"""

import torch
import torch.nn.functional as F

import qies
from qies import entangle
from qies.model.layers import linear

STEPS = 2  # Householder steps of a token


class DeltaProduct(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = linear(width, inner)
        self.kv_proj = linear(width, STEPS * 2 * inner)
        self.control_proj = linear(width, (STEPS + 1) * self.heads)
        self.out_proj = linear(inner, width, std=0.0)

    def forward(self, x, *, mask=None, texts=None, past_key_values=None, **others):
        if mask is not None or texts is not None or past_key_values is not None:
            raise ValueError("This mixer takes neither pads, packed texts nor a cache.")
        batch, length, _ = x.shape
        q = F.pad(self.q_proj(x)[:, :, None], (0, 0, STEPS - 1, 0))  # read after the last step
        k, v = self.kv_proj(x).unflatten(-1, (2, STEPS, -1)).unbind(2)
        beta, decay = self.control_proj(x).float().split([STEPS * self.heads, self.heads], -1)
        beta = 2 * torch.sigmoid(beta).view(batch, STEPS * length, self.heads)
        decay = F.pad(F.logsigmoid(decay + 5)[:, :, None], (0, 0, 0, STEPS - 1)).flatten(1, 2)  # before the first step
        q, k, v = (y.reshape(batch, STEPS * length, self.heads, -1) for y in (q, k, v))
        o, _ = entangle(q, k, v, beta, decay, None)
        return self.out_proj(F.normalize(o[:, STEPS - 1 :: STEPS], dim=-1).flatten(2)), None


class DiagonalPhase(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        inner = config.num_attention_heads * config.head_dim
        self.qkv_proj = linear(width, 3 * inner)
        self.control_proj = linear(width, 2 * self.heads + inner // 2)
        self.out_proj = linear(inner, width, std=0.0)

    def forward(self, x, *, mask=None, texts=None, past_key_values=None, **others):
        if mask is not None or texts is not None or past_key_values is not None:
            raise ValueError("This mixer takes neither pads, packed texts nor a cache.")
        q, k, v = (y.unflatten(-1, (self.heads, -1)).float() for y in self.qkv_proj(x).chunk(3, -1))
        sizes = [self.heads, self.heads, q[0, 0].numel() // 2]
        write, decay, theta = self.control_proj(x).float().split(sizes, -1)
        kept = F.logsigmoid(decay + 5).cumsum(1).transpose(1, 2)  # [B,H,T]
        rotation = (torch.pi * torch.tanh(theta)).cumsum(1).unflatten(-1, (self.heads, -1))
        phase = torch.polar(torch.ones_like(rotation), -rotation)
        q, k = (torch.complex(*F.normalize(y, dim=-1).chunk(2, -1)) * phase for y in (q, k))
        scores = torch.einsum("bthm,bshm->bhts", q.conj(), k).real
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = scores * (kept[..., :, None] - kept[..., None, :]).masked_fill(~past, -torch.inf).exp()
        o = torch.einsum("bhts,bshv->bthv", scores, torch.sigmoid(write)[..., None] * v)
        return self.out_proj(F.normalize(o, dim=-1).flatten(2).to(x.dtype)), None


def _inner(values):
    return values["num_attention_heads"] * values["head_dim"]


qies.register_mixer(
    qies.MixerSpec(
        name="delta_product",
        module=f"{__name__}:DeltaProduct",
        weights=lambda values: {
            "q_proj.weight": qies.Weight((_inner(values), values["hidden_size"])),
            "kv_proj.weight": qies.Weight((STEPS * 2 * _inner(values), values["hidden_size"])),
            "control_proj.weight": qies.Weight(
                ((STEPS + 1) * values["num_attention_heads"], values["hidden_size"]), "vector"
            ),
            "out_proj.weight": qies.Weight((values["hidden_size"], _inner(values))),
        },
        # twice the tokens of a gated delta rule in chunks of C = 64 (`qies.mixers.entanglement.chunk_flops`)
        flops=lambda values, seq_len: STEPS * _inner(values) * (4.0 * 64 + 6.0 * values["head_dim"]),
        states=lambda values: ((values["num_attention_heads"], values["head_dim"], values["head_dim"]),),
    )
)
qies.register_mixer(
    qies.MixerSpec(
        name="diagonal_phase",
        module=f"{__name__}:DiagonalPhase",
        weights=lambda values: {
            "qkv_proj.weight": qies.Weight((3 * _inner(values), values["hidden_size"])),
            "control_proj.weight": qies.Weight(
                (2 * values["num_attention_heads"] + _inner(values) // 2, values["hidden_size"]), "vector"
            ),
            "out_proj.weight": qies.Weight((values["hidden_size"], _inner(values))),
        },
        # scores over all earlier positions, as attention: in chunks it would be linear in the length
        flops=lambda values, seq_len: 2.0 * _inner(values) * (seq_len + 1),
        states=lambda values: ((values["num_attention_heads"], values["head_dim"], values["head_dim"]),),
    )
)
qies.register_arm("delta_product", ["delta_product"] * 3 + ["full_attention"], last="full_attention")
qies.register_arm("diagonal_phase", ["diagonal_phase"] * 3 + ["full_attention"], last="full_attention")
