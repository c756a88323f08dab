"""The mixers of examples/published_mixers.py against their definitions, and in a probe."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qies import plugins, presets
from qies.model import QiesConfig, QiesForCausalLM
from qies.probes.protocol import ProbeConfig, train_probe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def loaded(monkeypatch, forget_plugins):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("published_mixers", None)
    plugins.load(("published_mixers",))


def mixer(arm):
    torch.manual_seed(0)
    model = QiesForCausalLM(QiesConfig(**presets.settings(arm, "50k", 97)))
    layer = model.model.layers[0].mixer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
    return layer, layer.heads


def heads(y, number):
    return y.unflatten(-1, (number, -1))


def test_delta_product_takes_two_householder_steps_a_token():
    layer, H = mixer("delta_product")
    x = torch.randn(2, 11, layer.q_proj.weight.shape[1], dtype=torch.float64)
    q = F.normalize(heads(layer.q_proj(x), H), dim=-1)
    keys, values = layer.kv_proj(x).chunk(2, -1)
    control = layer.control_proj(x)
    state = q.new_zeros(2, H, q.shape[-1], q.shape[-1])
    outputs = []
    for t in range(11):
        state = torch.sigmoid(control[:, t, 2 * H :] + 5)[..., None, None] * state
        for step in range(2):
            k = F.normalize(heads(keys[:, t].chunk(2, -1)[step], H), dim=-1)
            v = heads(values[:, t].chunk(2, -1)[step], H)
            beta = 2 * torch.sigmoid(control[:, t, step * H : (step + 1) * H])[..., None, None]
            state = state + beta * k[..., :, None] * (v - (k[..., None, :] @ state)[..., 0, :])[..., None, :]
        outputs.append(F.normalize((q[:, t, :, None] @ state)[:, :, 0], dim=-1))
    expected = layer.out_proj(torch.stack(outputs, 1).flatten(2))
    assert torch.allclose(layer(x)[0], expected, atol=1e-6)


def test_diagonal_phase_rotates_decays_and_adds():
    layer, H = mixer("diagonal_phase")
    x = torch.randn(2, 11, layer.qkv_proj.weight.shape[1], dtype=torch.float64)
    q, k, v = (heads(y.float(), H).double() for y in layer.qkv_proj(x).chunk(3, -1))
    q, k = (torch.complex(*F.normalize(y, dim=-1).chunk(2, -1)) for y in (q, k))
    control = layer.control_proj(x)
    theta = torch.pi * torch.tanh(heads(control[..., 2 * H :], H))
    state = torch.zeros(2, H, q.shape[-1], v.shape[-1], dtype=torch.complex128)
    outputs = []
    for t in range(11):
        turn = torch.polar(torch.sigmoid(control[:, t, H : 2 * H] + 5)[..., None].expand_as(theta[:, t]), theta[:, t])
        write = torch.sigmoid(control[:, t, :H])[..., None] * v[:, t]
        state = turn[..., None] * state + k[:, t, :, :, None] * write[..., None, :]
        outputs.append(F.normalize((q[:, t, :, None].conj() @ state)[:, :, 0].real, dim=-1))
    expected = layer.out_proj(torch.stack(outputs, 1).flatten(2))
    assert torch.allclose(layer(x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("arm", ["delta_product", "diagonal_phase"])
def test_in_a_probe_and_refused_with_pads(arm):
    probe = ProbeConfig(task="s3", arm=arm, hidden_size=16, heads=2, length=8, longer=(1,), steps=2, batch_size=4)
    assert 0 <= train_probe(probe)["accuracy"]["8"] <= 1
    layer, _ = mixer(arm)
    with pytest.raises(ValueError, match="neither pads, packed texts nor a cache"):
        layer(torch.zeros(1, 2, 16), mask=torch.ones(1, 2, dtype=torch.bool))
