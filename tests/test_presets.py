"""Sizes and arms: the closed-form counts are the built model's, and every arm of a size has the same N."""

from itertools import pairwise

import pytest
import torch

from qies import presets
from qies.errors import UserError
from qies.mixers.entanglement import head_groups
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
        {"gate": "channel"}, {"gate": "none"}, {"decay": "channel"}, {"conv_size": 0}, {"attention_conv_size": 0},
        {"attention_conv": "input"}, {"register_mode": "real"},
        {"unitary_heads": 3, "decay": "channel"},
        {"phase": "selective", "phase_fraction": 0.5}, {"tie_word_embeddings": True},
        {"mode": "complex", "eigenvalues": "disc"},
        {"mode": "complex"}, {"phase": "selective", "phase_rank": 3}, {"num_hidden_layers": 6},
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


# What an arm may change of the shared backbone: which layers mix how, positions, and the entangled mixer's own fields.
THE_ARMS_OWN = {
    "layer_types", "position", "rope_theta", "rope_fraction", "nope_interval", "intermediate_size",
    "mode", "phase", "phase_rank", "phase_max", "phase_slope", "phase_fraction", "eigenvalues", "decay",
    "register_heads", "register_channels", "register_mode", "unitary_heads",
}  # fmt: skip


@pytest.mark.parametrize("size", ["50k", "400k", "1b"])
def test_arms_differ_in_the_mixer_and_positions_alone(size):
    """A comparison is of the entangled state, not of a convolution or a gate that one arm lacks."""
    arms = {arm: presets.settings(arm, size, VOCAB) for arm in presets.ARMS if arm != "gpt2"}
    shared = [{k: v for k, v in values.items() if k not in THE_ARMS_OWN} for values in arms.values()]
    assert shared == [shared[0]] * len(arms)
    assert shared[0]["conv_size"] == shared[0]["attention_conv_size"] == 4 and shared[0]["attention_conv"] == "keys"


def test_twins_hold_as_many_numbers():
    arms = ("qies", "real_registers", "unitary")
    complex_, real, unitary = (head_groups(presets.settings(arm, "400k", VOCAB)) for arm in arms)
    assert complex_[0] == real[0] == unitary[0]
    assert (unitary[1].mode, unitary[1].eigenvalues) == ("complex", "circle")
    assert (complex_[1].mode, complex_[1].eigenvalues) == ("complex", "disc")
    assert (real[1].mode, real[1].eigenvalues) == ("real", "unit")
    for name in ("heads", "channels", "values", "state_shape", "spans"):
        assert getattr(complex_[1], name) == getattr(real[1], name) == getattr(unitary[1], name)


def test_the_fields_open_to_overrides_are_those_of_the_configuration():
    config = QiesConfig()
    fixed = {"num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "intermediate_size"}
    for name, default in presets.MODEL_FIELDS.items():
        assert name in fixed or getattr(config, name) == default


@pytest.mark.parametrize("size", ["", "k", "50", "50g", "-50k", "1k", "90b", "1e3k"])
def test_bad_size(size):
    with pytest.raises(UserError):
        presets.parse_size(size)


@pytest.mark.parametrize(("size", "words"), [("5k", "size is 5k; it must lie between 20k and 20b"),
                                             ("21b", "between 20k and 20b"), ("50g", "Did you mean '50k'"),
                                             ("50", "Did you mean '50k'"), ("many", "from 20k to 20b")])  # fmt: skip
def test_a_size_out_of_range_names_the_range(size, words):
    with pytest.raises(UserError, match=words):
        presets.parse_size(size)


@pytest.mark.parametrize("size", [*presets.SIZES, "1.25m", "20.001k", "12345678.9k"])
def test_the_name_of_a_size_is_its_shortest_spelling(size):
    n = presets.parse_size(size)
    assert presets.parse_size(presets.size_name(n)) == n and len(presets.size_name(n)) <= len(size)
    assert size not in presets.SIZES or presets.size_name(n) == size


def test_bad_override_is_named():
    with pytest.raises(UserError, match="Did you mean 'head_dim'"):
        presets.settings("qies", "100k", VOCAB, headdim=3)
    with pytest.raises(UserError, match="of type int"):
        presets.settings("qies", "100k", VOCAB, conv_size="four")
    with pytest.raises(UserError, match="mixers alone"):
        presets.settings("qies", "50k", VOCAB, hidden_size=256, num_attention_heads=8, head_dim=32)


def test_an_arm_too_large_for_a_size_names_the_next_size_that_builds():
    with pytest.raises(UserError, match=r"25,112\); take the size 26k, or lower model.hidden_size"):
        presets.settings("complex", "20k", VOCAB)
    for arm in presets.ARMS:
        try:
            presets.settings(arm, "20k", VOCAB)
        except UserError as refusal:
            size = str(refusal).split("take the size ")[1].split(",")[0]
            found = presets.count_parameters(presets.settings(arm, size, VOCAB))["non_embedding"]
            assert found == pytest.approx(presets.parse_size(size), rel=presets.TOLERANCE)


def test_the_shape_grows_with_n():
    shapes = [presets.shape(presets.parse_size(s)) for s in presets.SIZES]
    depths = [s["num_hidden_layers"] for s in shapes]
    assert depths == sorted(depths) and all(d % 4 == 0 for d in depths)
    assert all(s["hidden_size"] == s["num_attention_heads"] * s["head_dim"] for s in shapes)


@pytest.mark.parametrize("size", ["50k", "100k", "400k", "1.6m", "6m"])
@pytest.mark.parametrize("ratio", [1, 2, 6, 20, 50])
def test_up_to_6m_the_rule_is_that_of_the_sweep(size, ratio):
    n = presets.parse_size(size)
    rule, width = presets.hyperparameters(n, ratio * n), presets.shape(n)["hidden_size"]
    assert (rule.matrix_lr, rule.vector_lr) == (0.04, 0.02)
    assert rule.embedding_lr == 0.2 * (width / 64) ** -0.5
    assert rule.head_lr == 0.02 * (width / 64) ** -0.5
    assert (rule.warmup, rule.decay, rule.weight_decay) == (0.02, 0.4, 0.01)
    assert (rule.momentum, rule.betas) == (0.95, (0.9, 0.95))
    assert rule.batch_tokens == 2048 or ratio * n > 1_600_000  # where 0.58 D^0.571 passes the sweep's batch


def test_the_sweep_itself_had_the_rules_batch():
    assert presets.hyperparameters(100_000, 307_200).batch_tokens == 4 * 512


def test_large_budgets_follow_the_cited_laws():
    n, d = 10**10, 2 * 10**11
    rule = presets.hyperparameters(n, d)
    assert rule.batch_tokens == pytest.approx(0.58 * d**0.571, abs=1)  # Li et al., arXiv:2503.04715
    timescale = rule.batch_tokens / (rule.matrix_lr * rule.weight_decay * d)
    assert timescale == pytest.approx(1.084 * (d / n) ** -0.527)  # Bergsma et al., arXiv:2505.13738
    assert rule.warmup * d == pytest.approx(0.02 * d)
    assert presets.hyperparameters(n, 1000 * n).warmup * 1000 * n == pytest.approx(n)  # Porian et al., 2406.19146


def test_the_batch_grows_and_the_weight_decay_falls_with_the_budget():
    rules = [presets.hyperparameters(n, 20 * n) for n in map(presets.parse_size, presets.SIZES)]
    for before, after in pairwise(rules):
        assert after.batch_tokens >= before.batch_tokens
        assert after.weight_decay <= before.weight_decay
        assert after.embedding_lr <= before.embedding_lr and after.head_lr <= before.head_lr


@pytest.mark.parametrize(("n", "d"), [(0, 10), (10, 0)])
def test_a_rule_needs_parameters_and_tokens(n, d):
    with pytest.raises(ValueError, match="at least one"):
        presets.hyperparameters(n, d)
