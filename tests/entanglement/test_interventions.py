"""Hook points and interventions: they see and change the values they name, and leave nothing behind."""

import copy
import pickle

import pytest
import torch

from qies import presets
from qies.entanglement import interventions as on
from qies.errors import UserError
from qies.model import QiesCache, QiesConfig, QiesForCausalLM
from qies.model.hooks import hook_points
from qies.ops.entangle import Inputs, entangle


def stirred(arm="selective_phase", **more):
    torch.manual_seed(0)
    model = QiesForCausalLM(QiesConfig(**(presets.settings(arm, "50k", 97) | more)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(params=["selective_phase", "qies", "complex"])
def model(request):
    return stirred(request.param)


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(1))


EVERY = (
    "hook_q", "hook_k", "hook_v", "hook_beta", "hook_log_decay", "hook_theta", "hook_initial_state", "hook_final_state",
    "hook_ssm_state", "hook_recurrence_out", "hook_out",
)  # fmt: skip


def test_the_documented_names_are_those_of_the_model(model):
    assert {path.rpartition(".")[2] for path in hook_points(model)} == set(EVERY)
    assert "model.layers.0.mixer.heads.0.hook_ssm_state" in hook_points(model)
    assert not any("hook" in name for name in model.state_dict())


@torch.no_grad()
def test_recorded_values_are_the_ops_and_reading_changes_nothing(model, ids):
    plain, cache = model(ids).logits, QiesCache(model.config)
    with on.record(model, *EVERY) as seen:
        logits = model(ids, past_key_values=cache).logits
    assert torch.allclose(logits, plain, atol=2e-5)
    assert torch.equal(model(ids).logits, plain)
    assert not any(p.attached for p in hook_points(model).values())
    for layer in (0, 1, 2):
        for g, group in enumerate(model.config.head_groups):
            at = f"model.layers.{layer}.mixer.heads.{g}."
            v = {name: seen.get(at + name) for name in EVERY[:-1]}
            six = [v[name] for name in EVERY[:6]]
            assert not v["hook_initial_state"].any()
            o, last = entangle(*six, mode=group.mode, backend="naive")
            assert torch.allclose(v["hook_recurrence_out"], o, atol=1e-5)
            assert torch.allclose(v["hook_final_state"], last, atol=1e-5)
            assert torch.equal(cache.layers[layer].recurrent_states[g], v["hook_final_state"])
            states = v["hook_ssm_state"]
            assert states.shape == (2, 13, group.heads, 2 * group.channels, group.values)
            assert torch.equal(states[:, -1], v["hook_final_state"])
            _, fifth = entangle(*(None if x is None else x[:, :5] for x in six), mode=group.mode, backend="naive")
            assert torch.allclose(states[:, 4], fifth, atol=1e-5)


@torch.no_grad()
def test_the_state_after_every_token_in_packed_rows(ids):
    model, texts = stirred(), torch.tensor([[0] * 5 + [1] * 8, [0] * 9 + [1] * 4])
    with on.record(model, "hook_ssm_state", "hook_recurrence_out", layers=[0]) as seen:
        model(ids, seq_idx=texts)
    path = "model.layers.0.mixer.heads.0."
    with on.record(model, "hook_ssm_state", "hook_recurrence_out", layers=[0]) as alone:
        model(ids[:1, 5:])
    for name in ("hook_ssm_state", "hook_recurrence_out"):
        assert torch.allclose(seen[path + name][:1, 5:], alone[path + name], atol=1e-5)


@torch.no_grad()
def test_no_read_out_in_four_ways(ids):
    model = stirred()
    with model.read_state(False):
        silent = model(ids).logits
    assert not torch.allclose(silent, model(ids).logits, atol=1e-3)
    for context in (
        on.read_state(model, False),
        on.zero(model, "hook_out"),
        on.scale(model, "hook_recurrence_out", 0.0),
        on.zero(model, "hook_ssm_state"),
        on.zero(model, "hook_beta"),  # nothing is ever written
    ):
        with context:
            assert torch.allclose(model(ids).logits, silent, atol=1e-5)


@torch.no_grad()
def test_a_scaled_state_is_a_scaled_read_out_and_is_not_carried_on(model, ids):
    cache, edited = QiesCache(model.config), QiesCache(model.config)
    model(ids, past_key_values=cache)
    with on.scale(model, "hook_recurrence_out", 0.5, layers=[1]):
        want = model(ids).logits
    with on.scale(model, "hook_ssm_state", 0.5, layers=[1]):
        assert torch.allclose(model(ids, past_key_values=edited).logits, want, atol=2e-5)
    for a, b in zip(cache.layers[1].recurrent_states.values(), edited.layers[1].recurrent_states.values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
def test_an_initial_state_is_where_the_recurrence_starts(model, ids):
    """The final states of one text, given to the next: in each layer, the op from those states."""
    with on.record(model, "hook_final_state") as past:
        model(ids[:, :6])
    given = {path.replace("final", "initial"): state for path, state in past.items()}
    with on.record(model, *EVERY[:6], "hook_recurrence_out") as seen, on.replace(model, given):
        model(ids[:, 6:])
    for layer in (0, 1, 2):
        for g, group in enumerate(model.config.head_groups):
            at = f"model.layers.{layer}.mixer.heads.{g}."
            six, state = [seen.get(at + name) for name in EVERY[:6]], given[at + "hook_initial_state"]
            assert state.any()
            o, _ = entangle(*six, state=state, mode=group.mode, backend="naive")
            assert torch.allclose(seen[at + "hook_recurrence_out"], o, atol=1e-5)


@torch.no_grad()
def test_forgetting_at_every_step_while_decoding(ids):
    """A final state of zero is kept in the cache: each token then starts from nothing."""
    model = stirred()
    cache = QiesCache(model.config)
    with on.zero(model, "hook_final_state", layers=[0]):
        for t in range(4):
            model(ids[:, t : t + 1], past_key_values=cache)
            assert not cache.layers[0].recurrent_states[0].any() and cache.layers[1].recurrent_states[0].any()


@torch.no_grad()
def test_dephasing_is_a_model_without_phases(ids):
    model, still = stirred(), stirred()
    for layer in still.model.layers[:3]:
        layer.mixer.phase_bias.zero_()
        layer.mixer.phase_up.weight.zero_()
    with on.dephase(model):
        assert torch.allclose(model(ids).logits, still(ids).logits, atol=1e-5)
    with on.dephase(model, 0.5):
        half = model(ids).logits
    assert not torch.allclose(half, still(ids).logits, atol=1e-4)
    assert not torch.allclose(half, model(ids).logits, atol=1e-4)


@torch.no_grad()
def test_patching_a_value_from_another_run(model, ids):
    other = ids.flip(1)
    with on.record(model, "hook_out", layers=[2]) as theirs:
        model(other)
    with on.replace(model, dict(theirs)), on.record(model, "hook_out", layers=[2]) as seen:
        patched = model(ids).logits
    assert torch.equal(seen["model.layers.2.mixer.hook_out"], theirs["model.layers.2.mixer.hook_out"])
    assert not torch.allclose(patched, model(ids).logits, atol=1e-3)


def test_a_loss_of_the_recorded_states_trains_the_layer(ids):
    model = stirred().train()
    with on.record(model, "hook_final_state") as seen:
        model(ids, labels=ids)
    sum(state.square().sum() for state in seen.values()).backward()
    assert model.model.layers[0].mixer.k_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_generation_under_an_intervention_does_not_depend_on_the_cache(ids):
    model = stirred()
    kw = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    kw["attention_mask"] = torch.ones_like(ids)
    with on.scale(model, "hook_ssm_state", 3.0, layers=[0]), on.dephase(model, layers=[1]):
        assert torch.equal(model.generate(ids, **kw), model.generate(ids, use_cache=False, **kw))


def test_the_context_ends_with_an_error_too(ids):
    model = stirred()
    wrong = on.edit(model, "hook_v", lambda v: v[..., 0, 0], layers=[0])
    with pytest.raises(UserError, match=r"heads.0.hook_v has shape \[2, 13, .* the edit returns \[2, 13\]"), wrong:
        model(ids)
    assert not any(p.attached for p in hook_points(model).values())


def test_mistakes_are_one_line(ids):
    model = stirred()
    with (
        pytest.raises(UserError, match=r"Unknown hook point 'hook_betta'\. Did you mean 'hook_beta'"),
        on.zero(model, "hook_betta"),
    ):
        pass
    words = r"Layers \[3\] have no hook point 'hook_beta'; choose among \[0, 1, 2\]"
    with pytest.raises(UserError, match=words), on.zero(model, "hook_beta", layers=[1, 3]):
        pass
    with pytest.raises(UserError, match="no entanglement layer"), on.zero(stirred("transformer"), "hook_beta"):
        pass
    with pytest.raises(UserError, match="compiled"), on.zero(torch.compile(model), "hook_beta"):
        pass


@torch.no_grad()
def test_copies_and_pickles_carry_no_foreign_hooks(ids):
    model = stirred()
    twin = copy.deepcopy(model)
    with on.zero(model, "hook_out"):
        assert not any(p.attached for p in hook_points(twin).values())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_point_with_nothing_attached_is_not_called(ids, monkeypatch):
    model = stirred()

    def called(self, x):
        raise AssertionError("called")

    monkeypatch.setattr("qies.model.hooks.HookPoint.forward", called)
    model(ids, labels=ids).loss.backward()


def test_inputs_know_their_dtype():
    x = [torch.zeros(1, 2, 1, 4)] * 3 + [torch.zeros(1, 2, 1)] * 2 + [None]
    assert Inputs(*x).dtype == torch.float32 and len(Inputs(*x).given) == 5
    assert Inputs(*x, state=torch.zeros(1, 1, 4, 4, dtype=torch.float64)).dtype == torch.float64
