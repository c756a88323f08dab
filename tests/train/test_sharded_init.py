"""A model whose weights are made later: the same weights, each alone, and only the own part where it is sharded."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from qies import presets
from qies.model import QiesConfig, QiesForCausalLM
from qies.train.distributed import Group
from qies.train.sharded_init import Deferred

TIED = {"tie_word_embeddings": True}
REGISTERS = {"register_heads": 2, "decay": "channel"}


def builder(arm, **overrides):
    def build():
        torch.manual_seed(3)
        return QiesForCausalLM(QiesConfig(**presets.settings(arm, "50k", 300, **overrides)))

    return build


@pytest.mark.parametrize(("arm", "overrides"), [*((a, {}) for a in presets.ARMS), ("qies", TIED), ("qies", REGISTERS)])
def test_weights_and_generator_are_those_of_a_plain_build(arm, overrides):
    plain = builder(arm, **overrides)()
    after = torch.rand(3)
    deferred = Deferred(builder(arm, **overrides))
    assert torch.equal(torch.rand(3), after)
    state, held = torch.get_rng_state(), dict(deferred.model.named_parameters())
    assert sum(p.numel() for p in held.values() if not p.is_meta) < 0.05 * sum(p.numel() for p in held.values())
    for name, p in plain.named_parameters():
        assert torch.equal(p, deferred.weight(name) if held[name].is_meta else held[name]), name
    assert torch.equal(torch.get_rng_state(), state)  # making weights has not moved the generator


@pytest.mark.parametrize(("arm", "overrides"), [("qies", {}), ("qies", TIED), ("gpt2", {}), ("complex", {})])
def test_a_process_holds_its_rows_of_the_same_weights(arm, overrides):
    rank = 2  # one alone: torch caches what it finds out about equal meshes, a process's rank included
    plain = dict(builder(arm, **overrides)().named_parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    try:
        model = Group(rank, 3).shard(builder(arm, **overrides))
        for name, p in model.named_parameters():
            assert p.device.type == "cpu" and p.requires_grad
            rows = plain[name].chunk(3)  # fewer than three where the rows do not suffice
            assert torch.equal(p.to_local(), rows[rank] if rank < len(rows) else plain[name][:0]), name
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
        ids = torch.randint(0, 300, (1, 9))
        model.train()(ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()
