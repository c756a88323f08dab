"""The objective's terms: closed forms, slow definitions, what reaches what, and training with them."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ATTENTION, build, stirred

from qies import objective, presets
from qies.accounting.objective import objective_weights
from qies.accounting.parameters import count_parameters, model_weights
from qies.config import TERMS, ObjectiveConfig
from qies.entanglement import interventions as on
from qies.model import QiesConfig, QiesForCausalLM
from qies.model.terms import Objective, far_future
from qies.train.callback import ObjectiveCallback

SHORT = {
    "far_future_gap": 2, "far_future_window": 5, "far_future_rank": 4, "far_future_stride": 1,
    "entropy_floor_chunk": 8, "long_context_window": 4, "multi_token_ahead": 2,
}  # fmt: skip
KINDS = ["qies", "transformer", "gpt2", "complex", "unitary"]


def ids(batch=2, length=24, seed=0):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def with_terms(kind, make=stirred, **weights):
    return make(kind, objective={**SHORT, **weights}).train()


def ends(targets, eos=0):
    return (targets == eos) | (targets == -100)


# --- far future


def slow_bags(targets, breaks, gap, window, stride):
    """The definition, in Python."""
    found = []
    for row, (tokens, ended) in enumerate(zip(targets.tolist(), breaks.tolist(), strict=True)):
        for t in range(0, len(tokens), stride):
            span = range(t, t + gap + window)
            if span[-1] < len(tokens) and not any(ended[i] for i in span):
                found.append((row, t, sorted(set(tokens[t + gap : t + gap + window]))))
    return found


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize(("gap", "window"), [(0, 1), (2, 5), (8, 16), (8, 90)])
def test_bags_are_those_of_the_slow_definition(gap, window, stride):
    targets = torch.randint(0, 12, (3, 60), generator=torch.Generator().manual_seed(1))
    targets[1, :20], targets[2] = -100, targets[2].clamp(min=1)
    found = objective.bags(targets, ends(targets), gap=gap, window=window, stride=stride)
    ours = [
        (row, at, sorted(tokens[distinct].tolist()))
        for row, at, tokens, distinct in zip(
            found.rows.tolist(), found.positions.tolist(), found.tokens, found.distinct, strict=True
        )
    ]
    assert ours == slow_bags(targets, ends(targets), gap, window, stride)
    assert bool(ours) == (window < 60)
    for _, _, tokens in ours:
        assert len(tokens) == len(set(tokens))


def test_far_future_is_the_cross_entropy_to_the_uniform_bag():
    targets = torch.tensor([[5, 1, 2, 2, 3]])
    found = objective.bags(targets, ends(targets), gap=1, window=4)
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.05, 0.25]])
    expected = -(math.log(0.2) + math.log(0.3) + math.log(0.1)) / 3  # the bag is {1, 2, 3}
    assert objective.far_future(probabilities.log(), found).item() == pytest.approx(expected)
    none = objective.bags(targets, ends(targets), gap=1, window=5)
    assert objective.far_future(probabilities.log()[:0], none).item() == 0


@pytest.mark.parametrize("where", ["eos", "ignored", "packed"])
def test_no_window_crosses_the_end_of_a_document(where):
    """Logits do not matter where the only boundary leaves no whole window: the term is then exactly zero."""
    x, model = ids(1, 13), with_terms("qies", far_future=1.0)
    assert seen_bags(model, x) == 6
    if where == "eos":
        x[:, 7] = 0
        assert seen_bags(model, x) == 0
    elif where == "ignored":
        labels = x.clone()
        labels[:, 7] = -100
        assert seen_bags(model, x, labels=labels) == 0
    else:
        assert seen_bags(model, x, seq_idx=torch.tensor([[0] * 7 + [1] * 6])) == 0


def seen_bags(model, x, labels=None, **more):
    """How many bags the term is a mean over, read off its call."""
    counts, original = [], objective.bags

    def counting(*args, **kwargs):
        found = original(*args, **kwargs)
        counts.append(len(found.rows))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "bags", counting)
        model(x, labels=x if labels is None else labels, **more)
    return counts[0]


@pytest.mark.parametrize("kind", ["qies", "complex", "unitary"])
def test_far_future_sees_the_read_outs_and_no_local_path(kind, monkeypatch):
    """With the read-outs zeroed nothing below them gets a gradient; without, projections and embedding do."""
    model, x = with_terms(kind, far_future=1.0), ids()
    monkeypatch.setattr(Objective, "forward", lambda terms, loss, seen, share: far_future(terms, seen))

    def reached():
        model.zero_grad()
        model(x, labels=x).loss.backward()
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    names = reached()
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.2.mixer.q_proj.weight",
            "objective.far_future.down.weight", "objective.far_future.up.weight"} <= names  # fmt: skip
    after = ("model.layers.2.mixer.gate", "model.layers.2.mixer.o_proj", "model.layers.2.mlp", "model.layers.3")
    assert [n for n in names if n.startswith(after)] == []  # behind the last read-out
    with on.zero(model, "hook_recurrence_out"):
        assert [n for n in reached() if n.startswith("model.")] == []


def test_an_arm_without_states_uses_the_last_hidden_state():
    model, x = with_terms("transformer", far_future=1.0, entropy_floor=1.0, entropy_floor_level=1.0), ids()
    assert model.objective.far_future.down.in_features == 32
    loss = model(x, labels=x).loss
    loss.backward()
    assert model.objective.far_future.down.weight.grad.abs().sum() > 0
    assert model.objective.values["entropy_floor"] > 0


# --- entropy floor


def test_the_floor_of_product_and_maximally_entangled_states():
    product = torch.zeros(1, 2, 8, 4)
    product[..., 0, 0] = 3.0
    entangled = torch.cat([torch.eye(4), torch.zeros(4, 4)]).expand(1, 2, 8, 4)
    ceiling = math.log(4)
    assert objective.entropy_floor([product], 0.5).item() == pytest.approx((ceiling / 2) ** 2)
    assert objective.entropy_floor([entangled], 1.0).item() == pytest.approx(0, abs=1e-10)
    assert objective.entropy_floor([product, entangled], 0.5).item() == pytest.approx((ceiling / 2) ** 2 / 2)


def test_the_floor_raises_the_entropy_of_a_state():
    state = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.1, 0.1])
    state.requires_grad_()
    before = objective.entropy_floor([state], 1.0)
    [gradient] = torch.autograd.grad(before, [state])
    assert before > 0 and objective.entropy_floor([state - 0.1 * gradient / gradient.norm()], 1.0) < before


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qies", "complex", "unitary", "channel"])
def test_states_at_the_ends_of_chunks_are_those_of_prefixes(kind):
    model, x = stirred(kind), ids(length=21)
    out = model.model(x, observe=8)
    plain = model.model(x)
    assert torch.allclose(out.last_hidden_state, plain.last_hidden_state, atol=1e-5)
    groups = len(model.config.head_groups) * model.config.layer_types.count("linear_attention")
    assert len(out.states) == len(out.readouts) == groups
    for c, end in enumerate((8, 16, 21)):
        whole = model.model(x[:, :end], observe=2**62)
        for at_ends, last in zip(out.states, whole.states, strict=True):
            assert at_ends.shape[1] == 3 and torch.allclose(at_ends[:, c], last[:, 0], atol=1e-4)


def test_without_states_the_matrix_of_hidden_vectors_takes_their_place():
    hidden = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    matrices = objective.states_of_hidden(hidden, heads=2, chunk=4)
    assert matrices.shape == (2, 2, 2, 8, 4)
    assert torch.equal(matrices[1, 1, 1, :4], hidden[1, 4:8, 4:]) and not matrices[..., 4:, :].any()


# --- LongCE


@pytest.mark.parametrize(("length", "window"), [(24, 4), (21, 4), (9, 4), (8, 4), (5, 4)])
def test_segments_hold_every_later_position_once(length, window):
    x = torch.arange(2 * length).view(2, length)
    parts = objective.segments(x, window)
    assert parts.shape[1] == 2 * window
    if length <= 2 * window:
        return
    assert torch.equal(objective.second_halves(parts, 2, length), x[:, 2 * window :])
    assert torch.equal(parts[0], torch.nn.functional.pad(x[0, window : 3 * window], (0, max(0, 3 * window - length))))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qies", "transformer", "gpt2"])
def test_short_losses_are_those_of_the_text_cut_off(kind):
    model, x = stirred(kind), ids(length=22)
    targets = torch.roll(x, -1, 1)
    short = model.short_context_losses(targets, 4, x)
    for t in (8, 11, 12, 20):
        start = (t // 4 - 1) * 4  # the segment in whose second half t lies
        alone = model.model(x[:, start : t + 1]).last_hidden_state[:, -1:]
        expected = model.token_losses(alone, targets[:, t : t + 1])
        assert torch.allclose(short[:, t - 8], expected[:, 0], atol=1e-4)


def test_longce_weighs_tokens_by_what_distant_content_gains():
    long = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    short = torch.tensor([1.0, 2.0 + math.log(3), 9.0])
    added = objective.long_context(long, short, clip=5.0, count=3)
    assert (long.mean() + added).item() == pytest.approx((1 + 3 * 2 + 5 * 3) / 3)
    added.backward()
    assert torch.allclose(long.grad, torch.tensor([0.0, 2.0, 4.0]) / 3)


def test_the_whole_of_longce_in_a_model():
    model, x = with_terms("qies", long_context=1.0), ids()
    loss = model(x, labels=x).loss
    model.eval()
    with torch.no_grad():
        targets = torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100)
        long = model.token_losses(model.model(x).last_hidden_state, targets)
        weight = torch.ones_like(long)
        weight[:, 8:] = (model.short_context_losses(targets, 4, x) - long[:, 8:]).exp().clamp(max=5)
        expected = (weight * long).sum() / (targets != -100).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


# --- multi-token prediction


def test_targets_further_on_stop_at_the_end_of_a_document():
    targets = torch.tensor([[4, 5, 9, 0, 6, 7, 8, -100, 3]])  # 0 begins the second document
    assert objective.ahead(targets, ends(targets), 1).tolist() == [[5, 9, -100, -100, 7, 8, -100, -100, -100]]
    assert objective.ahead(targets, ends(targets), 2).tolist() == [[9, -100, -100, -100, 8, *[-100] * 4]]
    assert objective.ahead(targets, ends(targets), 20).tolist() == [[-100] * 9]


def test_multi_token_at_the_start_is_the_loss_of_the_plain_head_on_later_tokens():
    model, x = with_terms("qies", build, multi_token=1.0), ids()
    loss = model(x, labels=x).loss
    model.eval()
    with torch.no_grad():
        plain = [model(x[:, :-k], shift_labels=x[:, k:]).loss for k in (1, 2, 3)]
    assert loss.item() == pytest.approx((plain[0] + (plain[1] + plain[2]) / 2).item(), abs=1e-5)


# --- all terms


ALL = {"far_future": 0.3, "entropy_floor": 0.2, "long_context": 0.5, "multi_token": 0.4}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_and_falls_to_the_cross_entropy(kind):
    model, x = with_terms(kind, **ALL, until=0.5), ids()
    whole = model(x, labels=x).loss
    values = dict(model.objective.values)
    assert set(values) == {"cross_entropy", *TERMS}
    expected = values["cross_entropy"] + sum(weight * values[name] for name, weight in ALL.items())
    assert whole.item() == pytest.approx(expected.item(), rel=1e-6)
    whole.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("objective."))
    model.set_progress(0.25)
    half = model(x, labels=x).loss.item()
    assert half == pytest.approx((whole.item() + values["cross_entropy"].item()) / 2, rel=1e-5)
    plain = stirred(kind)
    plain.load_state_dict(model.state_dict(), strict=False)
    reference = plain.train()(x, labels=x).loss
    model.set_progress(0.5)
    assert torch.equal(model(x, labels=x).loss, reference)
    model.set_progress(0.0)
    assert torch.equal(model.eval()(x, labels=x).loss, plain.eval()(x, labels=x).loss)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        model.set_progress(1.5)


@pytest.mark.parametrize("kind", ["qies", "transformer"])
def test_accumulated_micro_batches_add_up(kind):
    """The terms are weighed by each batch's share of the tokens, as Trainer weighs the loss."""
    model, x = with_terms(kind, long_context=0.5, entropy_floor=0.3, far_future=0.2), ids(4)
    whole = model(x, labels=x).loss.item()
    count = 4 * 23
    parts = sum(model(part, labels=part, num_items_in_batch=count).loss.item() for part in x.split(2))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_gradient_checkpointing_changes_nothing():
    x = ids()
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = with_terms("qies", **ALL)
        if options is not None:
            model.gradient_checkpointing_enable(options)
        model(x, labels=x).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for other in gradients[1:]:
        assert all(torch.allclose(g, other[n], atol=1e-6) for n, g in gradients[0].items())


def test_without_terms_nothing_is_built_or_saved(tmp_path):
    plain, off = build("qies"), build("qies", objective={"far_future": 0.0, "far_future_rank": 4})
    assert off.objective is None and off.config.objective is None
    assert plain.state_dict().keys() == off.state_dict().keys()
    plain.save_pretrained(tmp_path / "a")
    off.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert "objective" not in json.loads((tmp_path / "a" / "config.json").read_text())


def test_terms_leave_the_other_initial_weights_as_they_are_and_are_saved(tmp_path):
    plain, model = build("qies"), build("qies", objective={**SHORT, **ALL})
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in plain.state_dict().items())
    model.save_pretrained(tmp_path)
    again = QiesForCausalLM.from_pretrained(tmp_path)
    assert again.config.objective == model.config.objective
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("arm", ["qies", "complex", "transformer", "gpt2"])
def test_heads_are_counted_apart(arm):
    values = presets.settings(arm, "50k", 97)
    chosen = values | {"objective": {**vars(ObjectiveConfig(**ALL))}}
    model = QiesForCausalLM(QiesConfig(**chosen))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: w.shape for n, w in model_weights(chosen).items()
    }
    before, after = count_parameters(values), count_parameters(chosen)
    assert after["objective"] == sum(w.size for w in objective_weights(chosen).values()) > 0
    assert after["non_embedding"] == before["non_embedding"]
    assert after["total"] == before["total"] + after["objective"] == sum(p.numel() for p in model.parameters())


def test_the_callback_anneals_and_logs():
    model, x = with_terms("qies", far_future=0.1, until=0.5), ids()
    callback, logs = ObjectiveCallback(), {}
    callback.on_step_begin(None, SimpleNamespace(global_step=1, max_steps=4), None, model=model)
    assert model.objective.factor == 0.5
    model(x, labels=x)
    callback.on_log(None, None, None, model=model, logs=logs)
    assert set(logs) == {"objective/cross_entropy", "objective/far_future"}
    callback.on_step_begin(None, SimpleNamespace(global_step=2, max_steps=4), None, model=model)
    callback.on_log(None, None, None, model=model, logs=(later := {}))
    assert model.objective.factor == 0 and later == {}


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"far_futur": 1.0}, "Did you mean 'far_future'"), ({"far_future": -1.0}, "0 \\(off\\) or a positive number"),
     ({"far_future": 1.0, "far_future_rank": 0}, "at least 1"), ({"until": 0.0}, "fraction"),
     ({"long_context_clip": 0.5}, "at least 1"), ({"entropy_floor_level": 2.0}, "fraction")],
)  # fmt: skip
def test_a_bad_objective_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        QiesConfig(objective=bad)


def test_a_layer_of_attention_alone_has_no_states_to_see():
    assert with_terms("transformer", far_future=1.0).config.layer_types == ATTENTION
