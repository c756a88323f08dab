"""Sizes and arms: the closed-form counts are the built model's, and every arm of a size has the same N."""

import pytest
import torch

from qies import presets
from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM

VOCAB = 4096


def built(values) -> QiesForCausalLM:
    with torch.device("meta"):
        return QiesForCausalLM(QiesConfig(**values))


@pytest.mark.parametrize("size", presets.SIZES)
def test_every_arm_of_a_size_has_n_parameters_to_within_one_percent(size):
    target = presets.parse_size(size)
    counts = [presets.count_parameters(presets.settings(arm, size, VOCAB))["non_embedding"] for arm in presets.ARMS]
    assert all(abs(c - target) <= 0.01 * target for c in counts)
    assert max(counts) - min(counts) <= 0.01 * target


@pytest.mark.parametrize("size", presets.SIZES)
@pytest.mark.parametrize(("arm", "overrides"), [*((arm, {}) for arm in presets.ARMS), ("qies", {"register_heads": 3})])
def test_counts_by_group_are_those_of_the_built_model(arm, overrides, size):
    values = presets.settings(arm, size, VOCAB, **overrides)
    counts = presets.count_parameters(values)
    groups = dict.fromkeys(("embedding", "head", "attention", "entanglement", "convolution", "mlp", "norm"), 0)
    for name, p in built(values).named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if "embed_" in name:
            group = "embedding"
        elif "lm_head" in name:
            group = "head"
        elif ".conv." in name:
            group = "convolution"
        elif "norm" in name:
            group = "norm"
        elif any(part in name for part in (".mlp.", ".up_proj", ".down_proj")):
            group = "mlp"
        else:
            group = "attention" if values["layer_types"][layer] == "full_attention" else "entanglement"
        groups[group] += p.numel()
    assert groups == {g: counts[g] for g in groups}


@pytest.mark.parametrize(
    "overrides",
    [
        {"gate": "channel"}, {"gate": "none"}, {"decay": "channel"}, {"conv_size": 0}, {"attention_conv_size": 4},
        {"phase_fraction": 0.5}, {"tie_word_embeddings": True}, {"mode": "complex", "eigenvalues": "disc"},
        {"mode": "complex"}, {"phase_rank": 3}, {"num_hidden_layers": 6},
        {"register_heads": 3}, {"register_heads": 1, "register_channels": 8, "phase": "none", "gate": "none"},
        {"register_heads": 2, "decay": "channel", "gate": "channel", "phase": "fixed", "phase_fraction": 0.3},
    ],
)  # fmt: skip
def test_counts_follow_every_override(overrides):
    values = presets.settings("qies", "200k", VOCAB, **overrides)
    model = built(values)
    total = sum(p.numel() for p in model.parameters())
    assert presets.count_parameters(values)["total"] == total
    assert abs(presets.count_parameters(values)["non_embedding"] - 200_000) <= 2000


def test_the_fields_open_to_overrides_are_those_of_the_configuration():
    config = QiesConfig()
    fixed = {"num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "intermediate_size"}
    for name, default in presets.MODEL_FIELDS.items():
        assert name in fixed or getattr(config, name) == default


@pytest.mark.parametrize("size", ["", "k", "50", "50g", "-50k", "1k", "90b", "1e3k"])
def test_bad_size(size):
    with pytest.raises(UserError):
        presets.parse_size(size)


def test_bad_override_is_named():
    with pytest.raises(UserError, match="Did you mean 'head_dim'"):
        presets.settings("qies", "100k", VOCAB, headdim=3)
    with pytest.raises(UserError, match="of type int"):
        presets.settings("qies", "100k", VOCAB, conv_size="four")
    with pytest.raises(UserError, match="mixers alone"):
        presets.settings("qies", "50k", VOCAB, hidden_size=256, num_attention_heads=8, head_dim=32)


def test_the_shape_grows_with_n():
    shapes = [presets.shape(presets.parse_size(s)) for s in presets.SIZES]
    depths = [s["num_hidden_layers"] for s in shapes]
    assert depths == sorted(depths) and all(d % 4 == 0 for d in depths)
    assert all(s["hidden_size"] == s["num_attention_heads"] * s["head_dim"] for s in shapes)
