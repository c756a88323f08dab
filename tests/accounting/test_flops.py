"""FLOPs by the stated convention: closed forms, and torch's own counter on the built module."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qies import presets
from qies.accounting.flops import forward_flops_per_token, muon_flops, training_flops_per_token
from qies.accounting.plan import plan_model
from qies.mixers.entanglement import CHUNK
from qies.mixers.entanglement import chunk_flops as entanglement_flops
from qies.model import QiesConfig, QiesForCausalLM
from qies.train.optim import Optimizers


@pytest.mark.parametrize(("arm", "overrides"), [*((arm, {}) for arm in presets.ARMS), ("qies", {"register_heads": 4})])
def test_one_token_costs_what_torch_counts(arm, overrides):
    values = presets.settings(arm, "200k", 512, **overrides)
    model = QiesForCausalLM(QiesConfig(**values)).eval()
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    ours = sum(forward_flops_per_token(values, 1).values())
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.03)


def test_attention_counts_half_the_square():
    values = presets.settings("transformer", "100k", 512)
    inner = values["num_attention_heads"] * values["head_dim"]
    for length in (1, 7, 64):
        pairs = length * (length + 1) / 2  # a query meets itself and what came before
        whole = forward_flops_per_token(values, length)["attention"] * length
        assert whole == values["num_hidden_layers"] * pairs * 2 * 2 * inner


def test_entanglement_is_linear_in_length_and_complex_costs_more():
    values = presets.settings("no_phase", "100k", 512)
    assert training_flops_per_token(values, 4096) - training_flops_per_token(values, 2048) == (
        3 * 2.0 * values["num_attention_heads"] * values["head_dim"] * 2048
    )  # the one attention layer alone grows
    heads, k = values["num_attention_heads"], values["head_dim"]
    inside = 2 * CHUNK * k * 2 + CHUNK**2 / 3
    assert entanglement_flops(values, CHUNK) == heads * (inside + 6 * k * k)
    assert 2 < entanglement_flops({**values, "mode": "complex"}, CHUNK) / entanglement_flops(values, CHUNK) < 8
    inside = 8 * CHUNK * (2 * 4 + 4) + 8 * CHUNK**2 / 3  # a register head: two rows a token, K = 8, V = 4
    registers = entanglement_flops({**values, "register_heads": 3}, CHUNK) - entanglement_flops(values, CHUNK)
    assert registers == pytest.approx(3 * (inside + 12 * 8 * 4))


@pytest.mark.parametrize(("arm", "overrides"), [*((arm, {}) for arm in presets.ARMS), ("qies", {"register_heads": 4})])
def test_muon_costs_what_torch_counts(arm, overrides):
    values = presets.settings(arm, "200k", 512, **overrides)
    model = QiesForCausalLM(QiesConfig(**values))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers = Optimizers(model, presets.hyperparameters(200_000, 10**6), weight_decay=0.0)
    with FlopCounterMode(display=False) as counter:
        optimizers.step(1.0)
    assert counter.get_total_flops() == muon_flops(values)


def test_plan_adds_up():
    values = presets.settings("complex", "1b", 50304)
    plan = plan_model(values, "complex", "1b", None, 4096)
    assert plan["tokens"] == 20 * 10**9
    assert plan["flops"] == plan["flops_per_token"] * plan["tokens"]
    layers, states = len(values["layer_types"]), values["layer_types"].count("linear_attention")
    assert plan["decode"]["state_bytes"] == 4 * (
        states * values["num_attention_heads"] * values["head_dim"] ** 2 + layers * 3 * values["hidden_size"]
    )
