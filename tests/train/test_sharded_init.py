"""A model whose weights are made later: the same weights, each alone, and only the own part where it is sharded."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from qies import presets
from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM
from qies.train.distributed import Group
from qies.train.sharded_init import weights_on_meta, whole_weights

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
    with weights_on_meta():
        blank = builder(arm, **overrides)()
    assert torch.equal(torch.rand(3), after)
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    assert len(list(blank.parameters())) == len(list(plain.parameters()))  # tied weights stay one
    state = torch.get_rng_state()
    for name, p in plain.named_parameters():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(p, whole_weights(blank, module)[leaf]), name
    assert torch.equal(torch.get_rng_state(), state)  # making weights has not moved the generator
    assert {p.device.type for p in blank.parameters()} == {"meta"}


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


def test_weights_that_only_a_constructor_knows_are_refused():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.rand(4))

    with weights_on_meta():
        model = builder("transformer")()
        model.model.layers[0].mixer.bare = Bare()
    with pytest.raises(UserError, match=r"Bare owns parameters \(gain\) but has no reset_parameters"):
        whole_weights(model, "model.layers.0.mixer.bare")
