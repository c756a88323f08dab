"""Heads of several shapes in one entanglement layer: memory heads, and register heads beside them."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARMS, VARIANTS, build, stirred
from transformers import AutoModelForCausalLM

from qies import presets
from qies.entanglement import capture, entropies
from qies.errors import UserError
from qies.model import QiesCache, QiesConfig, QiesForCausalLM
from qies.model import entanglement as mixer_module
from qies.ops.entangle import Inputs, evolve
from qies.ops.entangle.naive import entangle_naive

WITH_REGISTERS = ["registers", "complex_heads"]

# Initial weights of models without register heads and without a convolution in attention layers: names, shapes and
# values, by `fingerprint`, since every weight is drawn from its own stream.
UNCHANGED = {
    "transformer": "d2fc685c2e967aa2",
    "selective_phase": "70f0a055e714780d",
    "no_phase": "f0db71477a8e8709",
    "fixed_phase": "670dabbc89363d7e",
    "gpt2": "0489f6f5d3c4bf36",
    "complex": "e5343c399b4ef891",
}


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="other processors draw normals that differ in the last bit",
)
@pytest.mark.parametrize("arm", UNCHANGED)
def test_without_register_heads_a_model_starts_as_it_always_did(arm):
    """If this moves, published checkpoints and results no longer belong to the code."""
    torch.manual_seed(0)
    values = presets.settings(arm, "50k", 97, attention_conv_size=0)
    assert fingerprint(QiesForCausalLM(QiesConfig(**values))) == UNCHANGED[arm]


@torch.no_grad()
def test_a_layer_is_the_sum_of_its_heads():
    """Each head by the definition, from its own rows of every projection and its own columns of the last."""
    mixer = stirred("registers", conv_size=0).model.layers[0].mixer
    x = torch.randn(2, 9, 32)
    w = dict(mixer.named_parameters())
    turn = mixer.phase_up(mixer.phase_down(x)) + w["phase_bias"]
    turn = mixer.config.phase_max * torch.tanh(turn * mixer.config.phase_slope / mixer.config.phase_max)
    control = mixer.control_proj(x)
    gate = torch.sigmoid(mixer.gate.proj(x))
    shapes = [(8, 16, "real")] * 2 + [(2, 2, "complex")] * 3  # m, V, mode
    y, key, value, phase, beta = 0, 0, 0, 0, 0
    for head, (m, V, mode) in enumerate(shapes):
        width, out = 2 * m, V * (2 if mode == "complex" else 1)
        rows = slice(key, key + width)
        q, k = (F.linear(x, w[n][rows])[:, :, None] for n in ("q_proj.weight", "k_proj.weight"))
        v = F.linear(x, w["v_proj.weight"][value : value + out])[:, :, None]
        theta = turn[..., phase : phase + m][:, :, None]
        if mode == "real":
            b = 2 * torch.sigmoid(control[..., beta : beta + 1] + w["beta_bias"][beta])
        else:
            z = torch.view_as_complex((control[..., beta : beta + 2] + w["beta_bias"][beta : beta + 2]).contiguous())
            b = torch.view_as_real(1 - z / z.abs() * torch.tanh(z.abs()))[:, :, None]
        rate = F.softplus(control[..., 8 + head] + w["decay_bias"][head])  # after the 2 + 3 * 2 numbers of beta
        log_alpha = -w["decay_rate"][head].exp() * rate[..., None]
        o, _ = entangle_naive(Inputs(q, k, v, b, log_alpha, theta), mode)
        o = F.rms_norm(o[:, :, 0], (out,), eps=1e-6) * gate[..., head : head + 1]
        y = y + F.linear(o, w["o_proj.weight"][:, value : value + out])
        key, value, phase, beta = key + width, value + out, phase + m, beta + (1 if mode == "real" else 2)
    whole, _ = mixer(x, angles=None, causal_mask=None, mask=None, past_key_values=None)
    assert (key, value, phase, beta) == (2 * 16 + 3 * 4, 2 * 16 + 3 * 4, 2 * 8 + 3 * 2, 8)
    assert torch.allclose(whole, y, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 37, 700])
def test_a_unitary_register_holds_the_product_of_its_gates(length):
    """Gates I - (1 - lambda) k k^H, multiplied as dense complex matrices; each token reads its own product."""
    mixer = stirred("unitary", conv_size=0).model.layers[0].mixer
    x = torch.randn(2, length, 32)
    given = mixer.inputs(x)[-1]
    o, state = evolve(given, "complex")
    k, q = (torch.complex(*F.normalize(y.double(), dim=-1).chunk(2, -1)) for y in (given.k, given.q))
    eigenvalue = 1 - torch.view_as_complex(given.beta.double())
    assert torch.allclose(eigenvalue.abs(), torch.ones(()).double(), atol=1e-6)
    product = torch.eye(4, dtype=torch.complex128).expand(2, 4, 4, 4)
    for t in range(length):
        gate = torch.eye(4) - (1 - eigenvalue[:, t, :, None, None]) * k[:, t, :, :, None] * k[:, t, :, None].conj()
        product = gate @ product
        read = (q[:, t, :, None].conj() @ product)[:, :, 0]
        assert torch.allclose(o[:, t].double(), torch.cat([read.real, read.imag], -1), atol=2e-5)
    assert torch.allclose(state.double(), torch.cat([product.real, product.imag], -2), atol=2e-5)
    assert torch.allclose(product @ product.mH, torch.eye(4, dtype=torch.complex128), atol=1e-5)


def test_a_unitary_register_starts_without_gates_and_has_neither_values_nor_decays():
    model = build("unitary", conv_size=0)
    mixer = model.model.layers[0].mixer
    *others, register = mixer.groups
    assert mixer.v_proj.weight.shape[0] == sum(group.value_width for group in others)
    assert mixer.decay_size == sum(group.decays for group in others)
    assert mixer.o_proj.weight.shape[1] == sum(group.read_width for group in others) + 4 * 2 * 4
    given = mixer.inputs(torch.zeros(1, 3, 32))[-1]
    assert not given.v.any() and not given.log_alpha.any() and not given.beta.any()  # lambda = 1
    assert torch.equal(given.state[0, 0], torch.cat([torch.eye(4), torch.zeros(4, 4)]))
    assert register.state_shape == (4, 8, 4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARMS, "complex_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_reaches_the_op(name, dtype, monkeypatch):
    """One call for each kind of head in a layer; beta, decay, phase and state in fp32 whatever the weights' dtype."""
    seen = []

    def watched(x, mode, *, texts):
        assert {y.dtype for y in x[:3]} == {dtype}
        assert {y.dtype for y in x[3:] if y is not None} == {torch.float32}
        o, new = evolve(x, mode, texts=texts)
        seen.append((x.q.shape[2], x.q.shape[3] // 2, new.shape[3], mode, x.beta.ndim, x.state is not None, new.dtype))
        return o, new

    monkeypatch.setattr(mixer_module, "evolve", watched)
    model = stirred(name).to(dtype)
    cache, layers = QiesCache(model.config), model.config.layer_types.count("linear_attention")
    model(torch.randint(0, 97, (2, 7)), past_key_values=cache)
    model(torch.randint(0, 97, (2, 1)), past_key_values=cache)
    complex_mode = "mode" in VARIANTS[name]
    groups = [(2, 8, 16, *(("complex", 4) if name == "complex" else ("complex" if complex_mode else "real", 3)))]
    groups += {
        "qies": [(4, 4, 4, "complex", 4)],
        "unitary": [(4, 4, 4, "complex", 4)],
        "real_registers": [(4, 4, 4, "real", 3)],
        "registers": [(3, 2, 2, "complex", 4)],
        "complex_heads": [(1, 5, 5, "complex", 4), (1, 5, 5, "complex", 4)],
    }.get(name, [])
    # unitary heads start at the identity
    unitary = [(name, i) in (("unitary", 1), ("complex_heads", 2)) for i in range(len(groups))]
    calls = [
        (*g, filled or own, torch.float32)
        for filled in (False, True) for _ in range(layers) for g, own in zip(groups, unitary, strict=True)
    ]  # fmt: skip
    assert seen == calls


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_REGISTERS)
def test_every_state_follows_its_row(name):
    """Beam search repeats, reorders and selects rows: each group's state and the convolution must go along."""
    model, ids = stirred(name), torch.randint(0, 97, (3, 9))
    cache = QiesCache(model.config)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 2, 2, 1, 4]))
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    rows, fresh = torch.tensor([2, 1, 2]), QiesCache(model.config)
    model(ids[rows], past_key_values=fresh)
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        assert layer.recurrent_states.keys() == expected.recurrent_states.keys()
        for kind in ("recurrent_states", "conv_states"):
            for i, state in getattr(expected, kind).items():
                kept = getattr(layer, kind)[i]
                assert state is kept is None or torch.allclose(kept, state, atol=1e-5, rtol=1e-4)
    after = ids[:, :1]
    logits = model(after, past_key_values=cache).logits
    assert torch.allclose(logits, model(after, past_key_values=fresh).logits, atol=1e-5)


def test_captured_states_come_group_by_group():
    model, ids = stirred("registers"), torch.randint(0, 97, (4, 12))
    states = capture(model, ids, (5, 12))
    assert {layer: [list(s.shape) for s in groups] for layer, groups in states.items()} == {
        layer: [[2, 4, 2, 16, 16], [2, 4, 3, 4, 2]] for layer in (0, 1, 2)
    }
    cache = QiesCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer, groups in states.items():
        for group, held in zip(groups, cache.layers[layer].recurrent_states.values(), strict=True):
            assert torch.allclose(group[-1], held, atol=1e-5)
    result = entropies(states, (5, 12))
    for layer in result["layers"]:
        assert [(h["head"], h["m"], h["v"]) for h in layer["heads"]] == [
            (0, 8, 16), (1, 8, 16), (2, 2, 2), (3, 2, 2), (4, 2, 2)
        ]  # fmt: skip
        assert all(0 < h["von_neumann"][0] < h["ceiling"] for h in layer["heads"])
    everything = [h["von_neumann"][0] for layer in result["layers"] for h in layer["heads"]]
    assert result["entropy_by_position"][-1] == pytest.approx(sum(everything) / len(everything), abs=1e-6)


@pytest.mark.parametrize("name", WITH_REGISTERS)
def test_registers_start_with_the_longest_memory_and_come_back_from_a_file(name, tmp_path):
    model = build(name)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "decay_bias"):
            spans = 1 / F.softplus(layer.mixer.decay_bias.detach())
            registers = model.config.register_heads * (5 if name == "complex_heads" else 1)
            assert spans.min() == pytest.approx(16, rel=1e-3)
            assert torch.allclose(spans[-registers:], torch.tensor(4096.0), rtol=1e-3)
    model = stirred(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 97, (1, 20))
    assert torch.equal(model(ids).logits, loaded.eval()(ids).logits)
    assert loaded.config.head_groups == model.config.head_groups


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"register_heads": -1}, "model.register_heads is -1; it must be at least 0"),
        ({"register_heads": 1, "register_channels": 1}, "model.register_channels is 1; it must be at least 2"),
    ],
)
def test_bad_values_give_one_clear_line(bad, words):
    with pytest.raises(ValueError, match=words) as from_config:
        QiesConfig(**bad)
    with pytest.raises(UserError, match=words) as from_presets:
        presets.settings("qies", "50k", 97, **bad)
    assert str(from_config.value) == str(from_presets.value) and "\n" not in str(from_config.value)


def test_wrong_types_and_names_are_refused():
    with pytest.raises(UserError, match="register_heads must be of type int"):
        presets.settings("qies", "50k", 97, register_heads="two")
    with pytest.raises(UserError, match="Did you mean 'register_heads'"):
        presets.settings("qies", "50k", 97, register_head=2)


@pytest.mark.parametrize("size", ["50k", "400k", "25m", "1b"])
def test_the_mlp_makes_room_for_registers(size):
    """Eight registers of four: N stays, and what they hold comes out of the MLP."""
    bare, values = (presets.settings("qies", size, 4096, register_heads=n, unitary_heads=0) for n in (0, 8))
    counts, before = presets.count_parameters(values), presets.count_parameters(bare)
    assert values["intermediate_size"] <= bare["intermediate_size"]
    assert counts["entanglement"] - before["entanglement"] > 3 * 8 * 32 * values["hidden_size"]
    assert abs(counts["non_embedding"] - presets.parse_size(size)) <= 0.01 * presets.parse_size(size)
