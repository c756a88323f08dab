"""Tiny models of every arm, and of options that no arm uses."""

import torch

from qies import presets
from qies.model import QiesConfig, QiesForCausalLM

SHAPE = {"vocab_size": 97, "hidden_size": 32, "head_dim": 16, "intermediate_size": 40}
ATTENTION, ENTANGLED = ["full_attention"] * 4, ["linear_attention"] * 4


def _arm(name: str) -> dict:
    arm = presets.ARMS[name]
    values = {**arm.settings}
    if arm.layer_types(4) == ATTENTION:
        values["layer_types"] = ATTENTION
    if "max_position_embeddings" in values:
        values["max_position_embeddings"] = 64
    return values


REGISTERS = {"phase": "selective", "register_heads": 3, "register_channels": 2}
ARMS = {name: _arm(name) for name in presets.ARMS} | {"registers": REGISTERS}
VARIANTS = ARMS | {
    "no_conv": {"conv_size": 0, "attention_conv_size": 0, "register_heads": 0},
    "channel": {
        "phase": "selective", "decay": "channel", "gate": "channel", "phase_fraction": 0.5, "eigenvalues": "unit",
        "register_heads": 0,
    },
    "transformer_no_conv": {"layer_types": ATTENTION, "position": "rope", "attention_conv_size": 0},
    "transformer_input_conv": {
        "layer_types": ATTENTION, "position": "rope", "attention_conv": "input", "rope_fraction": 0.5,
        "nope_interval": 2,
    },
    "recurrent": {"layer_types": ENTANGLED, "gate": "none"},
    "complex_heads": {
        "layer_types": ENTANGLED, "conv_size": 0, "mode": "complex", "decay": "channel", "gate": "channel",
        "phase": "selective", "phase_fraction": 0.5, "register_heads": 1, "register_channels": 5,
        "unitary_heads": 1,
    },
    "tied": {"tie_word_embeddings": True, "logit_softcap": 0.0},
}  # fmt: skip


def config(name: str, **more) -> QiesConfig:
    return QiesConfig(**{**SHAPE, **VARIANTS[name], **more})


def build(name: str, seed: int = 0, **more) -> QiesForCausalLM:
    """A model as training would start with it."""
    torch.manual_seed(seed)
    return QiesForCausalLM(config(name, **more))


def stirred(name: str, seed: int = 0, **more) -> QiesForCausalLM:
    """A model away from the zero-initialised outputs, so that every path matters; ready for inference."""
    model = build(name, seed, **more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()
