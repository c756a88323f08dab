"""FLOPs by the stated convention: closed forms, torch's own counter on the built modules, and a published table."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from flop_counter import ATTENTION, counter
from torch.utils.flop_counter import FlopCounterMode

from qies import presets
from qies.accounting.flops import (
    cheaper_from,
    decode_flops,
    decode_flops_per_token,
    forward_flops_per_token,
    muon_flops,
    prefill_flops,
    training_flops_per_token,
)
from qies.accounting.parameters import block_weights, layers
from qies.accounting.plan import plan_model
from qies.mixers import mixer
from qies.mixers.entanglement import CHUNK
from qies.mixers.entanglement import chunk_flops as entanglement_flops
from qies.model import QiesCache, QiesConfig, QiesForCausalLM
from qies.ops.entangle import Inputs, of_any_length
from qies.ops.entangle.chunk import entangle_chunk
from qies.train.optim import Optimizers

ARMS = [
    *((arm, {}) for arm in presets.ARMS),
    ("qies", {"register_heads": 3}),
    ("qies", {"unitary_heads": 2}),
    ("transformer", {"gate": "channel"}),
]
aten = torch.ops.aten


def built(arm, overrides=None, size="100k"):
    values = presets.settings(arm, size, 512, **(overrides or {}))
    torch.manual_seed(0)
    return values, QiesForCausalLM(QiesConfig(**values)).eval()


def by_module(counted, values) -> dict[str, float]:
    """What a counter saw, under the names of the accounting."""
    counts, out = counted.get_flop_counts(), Counter()
    for i, kind in enumerate(values["layer_types"]):
        mixing = counts[f"QiesForCausalLM.model.layers.{i}.mixer"]
        for op, flops in mixing.items():
            out["projections" if op in (aten.mm, aten.addmm) else mixer(kind).label] += flops
        out["mlp"] += sum(counts[f"QiesForCausalLM.model.layers.{i}"].values()) - sum(mixing.values())
    out["head"] = sum(counts["QiesForCausalLM.lm_head"].values())
    assert sum(counts["Global"].values()) == sum(out.values())  # nothing elsewhere
    return out


def products_of(predicted, values, tokens) -> dict[str, float]:
    """The accounting's counts without what is no matrix product: convolutions, scales and biases, which it counts as 2
    FLOPs per parameter."""
    out = {name: flops for name, flops in predicted.items() if flops and name != "convolution"}
    for kind, times in layers(values).items():
        for name, weight in block_weights(values, kind).items():
            module = "projections" if name.startswith("mixer.") else "mlp"
            if len(weight.shape) == 1 and weight.group != "norm":
                out[module] -= 2 * times * tokens * weight.size
    return out


@pytest.fixture
def op_as_one_node(monkeypatch):
    """The entanglement op as one operator of torch, which the counter has a formula for: a compiled kernel is none."""

    def evolve(x, mode="real", texts=None):
        return of_any_length(*x, mode)

    monkeypatch.setattr("qies.model.entanglement.evolve", evolve)


@pytest.fixture
def op_in_torch(monkeypatch):
    """One token of the op in operations of torch, which it counts itself."""
    monkeypatch.setattr("qies.ops.entangle._fits_kernel", lambda x: False)


@pytest.mark.parametrize("length", [2, 70])
@pytest.mark.parametrize(("arm", "overrides"), ARMS)
def test_every_module_of_a_prefill_costs_what_torch_counts(arm, overrides, length, op_as_one_node):
    values, model = built(arm, overrides)
    with torch.no_grad(), counter() as counted:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=True, logits_to_keep=1)
    assert by_module(counted, values) == pytest.approx(products_of(prefill_flops(values, length), values, length))


@pytest.mark.parametrize(("arm", "overrides"), ARMS)
def test_every_module_of_a_decoded_token_costs_what_torch_counts(arm, overrides, op_in_torch):
    values, model = built(arm, overrides)
    cache, ids = QiesCache(model.config), torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with counter() as counted:
            model(ids[:, :1], past_key_values=cache)
    assert by_module(counted, values) == pytest.approx(products_of(decode_flops(values, 9), values, 1))


@pytest.mark.parametrize("arm", presets.ARMS)
def test_a_training_step_costs_three_forward_passes(arm):
    values, model = built(arm)
    length = 40
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    with counter() as counted:
        model.train()(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
    seen = counted.get_flop_counts()["Global"]
    forward = products_of(forward_flops_per_token(values, length), values, 1)
    maps = sum(forward[name] for name in ("projections", "mlp", "head"))
    assert seen[aten.mm] + seen.get(aten.addmm, 0) == 3 * maps * length
    if set(values["layer_types"]) == {"full_attention"}:
        whole_square = forward["attention"] * length * 2 * length / (length + 1)
        assert seen[aten.baddbmm] == 3 * whole_square
        total = training_flops_per_token(values, length)
        assert total == 3 * sum(forward_flops_per_token(values, length).values())


@pytest.mark.parametrize("mode", ["real", "complex"])
def test_the_op_in_chunks_costs_what_torch_counts(mode):
    """The chunk form in torch makes whole squares, and solves for the keys instead of making the inverse; with halves
    and the inverse instead it costs what is declared. Its backward pass costs two forward passes."""
    B, T, H, K, r = 1, 128, 2, 8, 1 if mode == "real" else 2
    C = CHUNK // r  # tokens in a chunk of this form
    q, k, v = (torch.randn(B, T, H, n, requires_grad=True) for n in (K, K, r * K))
    x = Inputs(q, k, v, torch.rand(B, T, H, requires_grad=True), torch.zeros(B, T, H, requires_grad=True), None)
    with counter() as counted:
        o, _ = entangle_chunk(x, mode)
    per_token = counted.get_total_flops() / (B * T) - H * 2 * r * r * K  # beta on the rows
    halves, keys, inverse = 3 * r * r * C * K, r * r * C * K, r**3 * C**2 / 3
    values = presets.settings("no_phase", "100k", 512) | {"mode": mode, "num_attention_heads": H, "head_dim": K}
    assert per_token + H * (inverse - halves - keys) == pytest.approx(entanglement_flops(values, C))
    with counter() as whole:
        o, _ = entangle_chunk(x, mode)
        o.sum().backward()
    assert whole.get_total_flops() / counted.get_total_flops() == pytest.approx(3, rel=0.1)


def test_torchs_counter_alone_misses_attention_on_the_cpu_and_three_quarters_of_complex_products():
    q = torch.randn(2, 3, 10, 4)
    a, b = torch.randn(5, 6, dtype=torch.complex64), torch.randn(6, 7, dtype=torch.complex64)
    for mode, heads, complex_product in ((FlopCounterMode(display=False), 0, 1), (counter(), 1, 4)):
        with mode as counted:
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
            F.scaled_dot_product_attention(q[:, :, :1], q, q)
            a @ b
            a.real @ b.real
        seen = counted.get_flop_counts()["Global"]
        assert seen.get(ATTENTION, 0) == heads * 2 * 3 * 2 * 2 * 4 * (55 + 10)
        assert seen[aten.mm] == (complex_product + 1) * 2 * 5 * 6 * 7


# Hoffmann et al., arXiv:2203.15556, Table A4: layers, d_model, ffw_size, heads, k/q size, and the ratio of their count
# of training FLOPs to 6 N D.
TABLE_A4 = [
    (10, 640, 2560, 10, 64, 1.03),
    (20, 1024, 4096, 16, 64, 1.10),
    (24, 1280, 5120, 10, 128, 1.08),
    (26, 1792, 7168, 14, 128, 1.04),
    (28, 2048, 8192, 16, 128, 1.03),
    (40, 3584, 14336, 28, 128, 0.99),
]


@pytest.mark.parametrize(("depth", "d", "ffw", "heads", "key", "printed"), TABLE_A4)
def test_chinchillas_table_of_flops(depth, d, ffw, heads, key, printed):
    """The accounting against Appendix F, and its ratio to 6 N D against Table A4.

    Appendix F counts whole squares in attention, 3 FLOPs per score for the softmax, and the embedding as a product. The
    table has neither embedding nor logits (with them the first row would read 1.58), T = 2048 and the vocabulary 32,000
    (neither is printed in the paper), and N counts what Table A9 does: the blocks with biases, norms and relative
    positions, and the head.
    """
    length, vocab = 2048, 32_000
    values = presets.settings("transformer", "1b", vocab, gate="none", attention_conv_size=0) | {
        "num_hidden_layers": depth, "hidden_size": d, "num_attention_heads": heads, "head_dim": key,
        "intermediate_size": ffw, "layer_types": ["full_attention"] * depth,
    }  # fmt: skip
    inner = heads * key
    # Appendix F for one sequence
    attention = 2 * 3 * length * d * inner + 2 * 2 * length**2 * inner + 3 * heads * length**2 + 2 * length * inner * d
    dense = 2 * length * (d * ffw + d * ffw)
    logits = 2 * length * d * vocab
    ours = forward_flops_per_token(values, length)
    softmax = 3 * heads * length * depth
    blocks = ours["projections"] + ours["mlp"] + ours["attention"] * 2 * length / (length + 1) + softmax
    assert length * blocks == pytest.approx(depth * (attention + dense), rel=1e-3)
    assert length * ours["head"] == logits
    biases_norms_positions = depth * (d * inner + 4 * d + 2 * d + ffw + d + 4 * d) + 2 * d
    n = depth * (4 * d * inner + 2 * d * ffw) + biases_norms_positions + d * vocab
    assert round(3 * length * blocks / (6 * n * length), 2) == printed


def brute_force(values, rival, cost):
    dear = [t for t in range(1, 1000) if cost(values, t) > cost(rival, t)]
    return dear[-1] + 1 if dear else 1


@pytest.mark.parametrize("cost", [decode_flops_per_token, training_flops_per_token])
@pytest.mark.parametrize("arm", ["qies", "no_phase", "complex", "gpt2"])
def test_the_context_from_which_an_arm_is_cheaper(arm, cost):
    values, rival = presets.settings(arm, "200k", 4096), presets.settings("transformer", "200k", 4096)
    found = cheaper_from(values, rival, cost)
    assert found == brute_force(values, rival, cost)
    assert cheaper_from(rival, values, cost) is None or arm == "gpt2"
    assert cheaper_from(values, values, cost) == 1


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
    cost = plan["inference"][-1]
    assert cost["context"] == 131_072
    depth, states = len(values["layer_types"]), values["layer_types"].count("linear_attention")
    inner = values["num_attention_heads"] * values["head_dim"]
    assert cost["cache_bytes"] == {
        "states": 4 * states * inner * values["head_dim"],
        "convolution": 2 * depth * 3 * values["hidden_size"],
        "keys_values": 2 * (depth - states) * 2 * inner * 131_072,
    }
    assert cost["decode_flops"] == decode_flops(values, 131_072)
    assert cost["prefill_flops"] == prefill_flops(values, 131_072)


def test_a_plan_of_gpt2_ends_at_its_learned_positions():
    values = presets.settings("gpt2", "100k", 512, max_position_embeddings=5000)
    plan = plan_model(values, "gpt2", "100k", None, 512)
    assert [cost["context"] for cost in plan["inference"]] == [1024, 4096]
