"""Each initial weight is a function of (seed, its qualified name) alone."""

import pytest
import torch
from tiny_models import VARIANTS, build, config

from qies import presets
from qies.model import QiesConfig, QiesForCausalLM, QiesModel
from qies.model.initialization import derived_seed, init_module
from qies.model.modeling import QiesBlock


def arm(name, seed=0, **overrides):
    torch.manual_seed(seed)
    return QiesForCausalLM(QiesConfig(**presets.settings(name, "50k", 300, **overrides)))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_seed_gives_one_model_and_moves_the_generator_by_one_draw(name):
    first, after = build(name, seed=5), torch.rand(2)
    again, other = build(name, seed=5), build(name, seed=6)
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.rand(2), after)
    drawn = 0
    for (n, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), n
        if a.ndim == 2 and a.std() > 0:
            drawn += 1
            assert not torch.equal(a, c), n
    assert drawn > 3


def test_two_models_in_a_row_differ():
    torch.manual_seed(0)
    a, b = (QiesForCausalLM(config("selective_phase")) for _ in range(2))
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)


def test_arms_share_the_weights_whose_names_and_shapes_they_share():
    """The head groups, phases and number of parameters of these arms differ; the values that are common do not."""
    a, b = (
        dict(arm(name, register_heads=0, intermediate_size=96).named_parameters())
        for name in ("no_phase", "selective_phase")
    )
    assert len(b) > len(a)
    for name, p in a.items():
        assert torch.equal(p, b[name]), name


def test_an_added_parameter_does_not_move_the_others(monkeypatch):
    plain = dict(build("selective_phase").named_parameters())
    original = QiesBlock.__init__

    def with_more(self, config, layer_idx):
        original(self, config, layer_idx)
        self.extra = torch.nn.Linear(8, 8)  # all later layers come after it

    monkeypatch.setattr(QiesBlock, "__init__", with_more)
    more = dict(build("selective_phase").named_parameters())
    assert {n.rpartition("layers.")[2][2:] for n in set(more) - set(plain)} == {"extra.weight", "extra.bias"}
    for name, p in plain.items():
        assert torch.equal(p, more[name]), name


def test_the_model_without_a_head_has_the_same_weights():
    torch.manual_seed(0)
    base = QiesModel(config("selective_phase"))
    whole = build("selective_phase", seed=0).model
    for (name, a), b in zip(base.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_values_of_a_stream_are_pinned():
    """A change of these numbers changes every initial weight, and so every run that is repeated."""
    assert derived_seed(0, "layers.0.mixer.q_proj.weight") == 5237836382324017476
    layer = torch.nn.Linear(4, 2)
    init_module(layer, 0, "layers.0.mixer.q_proj")
    assert torch.allclose(layer.weight[0], torch.tensor([-0.0585840, -0.0521038, 0.3387197, -0.1213427]), atol=1e-6)
    assert not layer.bias.any()


def test_a_module_from_elsewhere_initialises_itself_from_its_own_stream():
    class Foreign(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.empty(16))

        def reset_parameters(self):
            torch.nn.init.normal_(self.gain)

    made = []
    for name in ("layers.0.mixer", "layers.0.mixer", "layers.1.mixer"):
        torch.rand(len(made))  # wherever the default generator stands
        before = torch.get_rng_state()
        module = Foreign()
        init_module(module, 3, name)
        assert torch.equal(torch.get_rng_state(), before)
        made.append(module.gain.detach())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
