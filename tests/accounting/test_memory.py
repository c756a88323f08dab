"""Training memory: optimizer state and shards as built, activations as autograd keeps them."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qies import presets
from qies.accounting import memory
from qies.accounting.parameters import control_parameters
from qies.accounting.plan import plan_model
from qies.model import QiesConfig, QiesForCausalLM
from qies.ops import attention, conv, entangle, loss, norm
from qies.ops.entangle import fla
from qies.train.optim import Optimizers, parameter_groups

WORLD = 64


class KernelOfFla(torch.autograd.Function):
    """Keeps what ChunkGatedDeltaRuleFunction of flash-linear-attention keeps (fla/ops/gated_delta_rule/chunk.py): its
    inputs, the running decay, and the inverse of every chunk of 64 tokens; and what ChunkKDAFunction keeps beside."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta):
        kept = [g, q.new_zeros(*q.shape[:3], 64)] if g.ndim == 4 else []  # kda/chunk.py: the decays, queries x keys
        ctx.save_for_backward(q, k, v, *kept, g.cumsum(1), beta, q.new_zeros(*q.shape[:3], 64))
        return torch.zeros_like(v), q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad, _):
        q, k, *_, decays, beta, _ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), grad, torch.zeros_like(decays), torch.zeros_like(beta)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The code paths of a CUDA device, on the processor: plain definitions, a flash kernel, and fla's stand-in."""
    monkeypatch.setattr(norm, "_RmsNorm", SimpleNamespace(apply=norm._definition))
    monkeypatch.setattr(
        conv,
        "_CausalConv",
        SimpleNamespace(
            apply=lambda x, w, *_: conv._definition(x, w, x.new_zeros(len(x), w.shape[1] - 1, x.shape[2]))[0]
        ),
    )
    monkeypatch.setattr(loss, "_product_dtype", lambda *_: None)
    monkeypatch.setattr(attention, "LONGEST", 0)
    monkeypatch.setattr(fla, "missing", lambda device: None)
    monkeypatch.setattr(entangle, "_fits_kernel", lambda *_: False)
    monkeypatch.setattr(fla, "kernel", lambda name: lambda q, k, v, beta, g, **_: KernelOfFla.apply(q, k, v, g, beta))


class Live(TorchDispatchMode):
    """The bytes of all tensors that are alive, and their peak: those of `held`, and whatever an operation makes."""

    def __init__(self, held) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()
        for x in held:
            self.note(x)

    def note(self, x) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out


@pytest.mark.parametrize("arm", ["transformer", "qies", "no_phase", "gpt2"])
def test_the_peak_of_a_training_step_is_the_plans(arm, as_on_cuda):
    """Weights, gradients, optimizer, copies and activations: the second step, when everything is there."""
    vocab, batch, length = 512, 8, 128
    values = presets.settings(arm, "200k", vocab)
    model = QiesForCausalLM(QiesConfig(**values)).train()
    optimizers = Optimizers(model, presets.hyperparameters(200_000, 10**6), weight_decay=0.01)
    ids = torch.randint(0, vocab, (batch, length + 1))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        loss.backward()
        optimizers.step(1.0)

    step()
    with Live([*model.parameters(), *optimizers.state().values()]) as live:
        step()
    planned = memory.training_memory(values, gpus=1, micro_batch=batch, seq_len=length, checkpointing=False)
    assert 0.9 < live.peak / sum(planned.values()) < 1.15


def kept_bytes(model, ids) -> int:
    """Bytes of the storages that autograd keeps in a forward pass, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(ids[:, :-1], shift_labels=ids[:, 1:])
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize("arm", ["transformer", "qies", "no_phase", "fixed_phase", "gpt2", "complex"])
@pytest.mark.parametrize("size", ["200k", "3m"])
def test_activations_are_those_that_autograd_keeps(arm, size, as_on_cuda):
    vocab, batch, length = 512, 2, 128
    values = presets.settings(arm, size, vocab)
    model = QiesForCausalLM(QiesConfig(**values)).bfloat16().train()  # as FSDP2's mixed precision has it
    measured = kept_bytes(model, torch.randint(0, vocab, (batch, length + 1))) / (batch * length)
    gradients_of_logits = 4 * vocab * (2 if values["logit_softcap"] else 1)
    counted = memory.activation_bytes(values, checkpointing=False) - gradients_of_logits
    assert counted == pytest.approx(measured, rel=0.05)


REGISTERS = {"register_heads": 3, "register_channels": 4}
CHANNELS = {"decay": "channel"}


@pytest.mark.parametrize(
    ("arm", "override"),
    [
        *(("qies", o) for o in ({"gate": "none"}, {"gate": "channel"}, {"conv_size": 0}, {"position": "rope"})),
        *(("qies", o) for o in (REGISTERS, CHANNELS, REGISTERS | CHANNELS, {"unitary_heads": 2})),
        ("complex", CHANNELS), ("complex", {"phase": "none"}), ("no_phase", CHANNELS),
    ],
)  # fmt: skip
def test_activations_follow_the_overrides(arm, override, as_on_cuda):
    values = presets.settings(arm, "200k", 512, **override)
    model = QiesForCausalLM(QiesConfig(**values)).bfloat16().train()
    measured = kept_bytes(model, torch.randint(0, 512, (2, 129))) / 256
    assert memory.activation_bytes(values, checkpointing=False) - 8 * 512 == pytest.approx(measured, rel=0.05)


def test_checkpointing_keeps_block_inputs_and_one_block():
    values = presets.settings("transformer", "1b", 50304)
    blocks, d = values["num_hidden_layers"], values["hidden_size"]
    one = memory.block_bytes(values, "full_attention")
    ends = memory.ends_bytes(values)
    assert memory.activation_bytes(values, checkpointing=False) == blocks * one + ends
    assert memory.activation_bytes(values, checkpointing=True) == blocks * 2 * d + one + ends


@pytest.mark.parametrize("arm", presets.ARMS)
@pytest.mark.parametrize("overrides", [{}, {"gate": "channel"}, {"tie_word_embeddings": True}])
def test_each_optimizer_has_the_parameters_that_are_counted(arm, overrides):
    values = presets.settings(arm, "100k", 512, **overrides)
    groups = parameter_groups(QiesForCausalLM(QiesConfig(**values)))
    size = {kind: sum(p.numel() for _, p in pairs) for kind, pairs in groups.items()}
    counts, controls = presets.count_parameters(values), control_parameters(values)
    # GPT-2's learned positions count as embedding and are trained as such
    assert size["vector"] == controls
    assert size["matrix"] == counts["non_embedding"] - controls
    assert size["embedding"] + size["head"] == counts["embedding"] + counts["head"]


def test_optimizer_state_is_what_a_step_leaves():
    values = presets.settings("qies", "50k", 512)
    model = QiesForCausalLM(QiesConfig(**values)).train()
    optimizers = Optimizers(model, presets.hyperparameters(50_000, 10**6), weight_decay=0.01)
    ids = torch.randint(0, 512, (1, 33))
    model(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
    optimizers.step(1.0)
    held = sum(x.numel() * x.element_size() for name, x in optimizers.state().items() if not name.endswith(".step"))
    planned = memory.training_memory(values, gpus=1, micro_batch=1, seq_len=32, checkpointing=False)
    assert planned["optimizer"] == held
    assert planned["weights"] == planned["gradients"] == sum(p.numel() * 4 for p in model.parameters())
    assert planned["gathered"] == planned["weights"] / 2  # bfloat16 copies, nothing to gather


@pytest.fixture
def mesh():
    """A world of 64 of which this process is rank 0; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        yield init_device_mesh("cpu", (WORLD,))
    finally:
        dist.destroy_process_group()


def shard(model, mesh):
    """As in training: a block at a time, bfloat16 weights, float32 reductions, activation checkpointing."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model.train().gradient_checkpointing_enable()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


@pytest.mark.parametrize(
    ("arm", "size"),
    [*((arm, "1b") for arm in presets.ARMS), *(("qies", s) for s in ("100m", "350m", "3b", "10b"))],
)
def test_shards_on_the_meta_device_are_as_large_as_planned(arm, size, mesh):
    values = presets.settings(arm, size, 50304)
    with torch.device("meta"):
        model = QiesForCausalLM(QiesConfig(**values))
    shard(model, mesh)
    assert all(p.dtype == torch.float32 and p.is_meta for p in model.parameters())
    held = sum(p.to_local().numel() * 4 for p in model.parameters())
    planned = memory.training_memory(values, gpus=WORLD, micro_batch=1, seq_len=512, checkpointing=True)
    assert held == pytest.approx(planned["weights"], rel=0.01)


@pytest.mark.parametrize("size", presets.SIZES)
@pytest.mark.parametrize("arm", ["transformer", "qies"])
def test_every_size_shards_by_rows(arm, size, mesh):
    with torch.device("meta"):
        model = QiesForCausalLM(QiesConfig(**presets.settings(arm, size, 4096)))
    rows = {name: p.shape for name, p in model.named_parameters()}
    shard(model, mesh)
    for name, p in model.named_parameters():
        assert p.to_local().shape == (-(-rows[name][0] // WORLD), *rows[name][1:])


@pytest.mark.parametrize("arm", presets.ARMS)
def test_a_sharded_step_runs_in_bfloat16_and_leaves_float32_shards(arm, mesh):
    model = shard(QiesForCausalLM(QiesConfig(**presets.settings(arm, "50k", 512))), mesh)
    seen = []
    for block in model.model.layers:
        block.mixer.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    ids = torch.randint(0, 512, (1, 17))
    for _ in range(2):  # gradients accumulate in the shards
        model(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 2 * 2 * len(model.model.layers)  # each block ran again for its backward pass
    for p in model.parameters():
        assert p.grad.dtype == torch.float32 and p.grad.to_local().shape == p.to_local().shape


def test_gathered_weights_are_those_of_the_largest_groups():
    values = presets.settings("transformer", "1b", 50304)
    with torch.device("meta"):
        model = QiesForCausalLM(QiesConfig(**values))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = 2 * 50304 * values["hidden_size"]
    assert memory.gathered_bytes(values) == 2 * root + 2 * 2 * block + 6 * max(root, block)


def test_complex_heads_with_real_eigenvalues_have_no_count():
    values = presets.settings("complex", "100m", 512, eigenvalues="signed")
    with pytest.raises(ValueError, match="no count"):
        memory.activation_bytes(values, checkpointing=True)
    plan = plan_model(values, "complex", "100m", None, 512)
    assert plan["fits"] is plan["memory_total"] is None and "no count" in plan["memory_unknown"]
    assert "activations" not in plan["memory"] and plan["memory"]["weights"] == 4 * plan["params"]["total"]
