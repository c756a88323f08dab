"""What transformers' own common tests ask of every model, asked of every arm."""

import copy
import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARMS, VARIANTS, build, config, stirred
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qies.model import QiesConfig, QiesForCausalLM, QiesModel


@pytest.fixture(params=[*ARMS, "tied"], scope="module")
def arm(request):
    return request.param


@pytest.fixture(scope="module")
def model(arm):
    return stirred(arm)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def eager(arm):
    model = stirred(arm)
    model.set_attn_implementation("eager")
    return model


# Forward


def test_forward_takes_the_names_that_transformers_gives():
    for kind in (QiesModel, QiesForCausalLM):
        names = list(inspect.signature(kind.forward).parameters)
        assert names[1:4] == ["input_ids", "attention_mask", "position_ids"]
        assert {"past_key_values", "inputs_embeds", "use_cache"} <= set(names)
    assert {"labels", "logits_to_keep", "num_items_in_batch"} <= set(names)


@torch.no_grad()
def test_the_same_input_gives_the_same_output(model, ids):
    assert torch.equal(model(ids).logits, model(ids).logits)
    once = model.eval().eval()(ids).logits
    assert torch.equal(once, copy.deepcopy(model)(ids).logits)


def test_a_copy_is_independent(model, ids):
    twin = copy.deepcopy(model)
    before = model(ids).logits
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1.0)
    assert torch.equal(model(ids).logits, before) and not torch.equal(twin(ids).logits, before)
    assert (twin.lm_head.weight is twin.get_input_embeddings().weight) == model.config.tie_word_embeddings


@torch.no_grad()
def test_embeddings_in_place_of_ids(model, ids):
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for both in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**both)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model, ids):
    together = model(ids, output_hidden_states=True)
    for i in range(3):
        alone = model(ids[i : i + 1], output_hidden_states=True)
        assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-5)
        for a, b in zip(together.hidden_states, alone.hidden_states, strict=True):
            assert torch.allclose(a[i], b[0], atol=1e-4)


@torch.no_grad()
def test_positions_are_those_of_the_real_tokens(model, ids):
    positions = torch.arange(11).expand(3, -1)
    assert torch.allclose(model(ids, position_ids=positions).logits, model(ids).logits, atol=1e-6)
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    given = torch.nn.functional.pad(positions, (4, 0))
    out = model(padded, attention_mask=mask, position_ids=given).logits[:, 4:]
    assert torch.allclose(out, model(ids).logits, atol=1e-4)


@torch.no_grad()
def test_only_the_logits_asked_for(model, ids):
    whole = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    some = torch.tensor([0, 7])
    assert torch.allclose(model(ids, logits_to_keep=some).logits, whole[:, some], atol=1e-6)


# Hidden states and attention weights


@torch.no_grad()
@pytest.mark.parametrize("by", ["argument", "config"])
def test_hidden_states_and_weights_have_their_shapes(eager, ids, by):
    flags = {"output_hidden_states": True, "output_attentions": True}
    if by == "config":
        for flag, on in flags.items():
            setattr(eager.config, flag, on)
    out = eager(ids, **(flags if by == "argument" else {}))
    kinds = eager.config.layer_types
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 11, 32)] * (len(kinds) + 1)
    assert [tuple(a.shape) for a in out.attentions] == [(3, 2, 11, 11)] * kinds.count("full_attention")
    for weights in out.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(())) and weights.triu(1).abs().max() == 0
    assert torch.allclose(eager.lm_head(out.hidden_states[-1]).argmax(-1).float(), out.logits.argmax(-1).float())


@torch.no_grad()
def test_nothing_is_reported_unasked(model, ids):
    out = model(ids)
    assert out.hidden_states is None and out.attentions is None and out.loss is None
    base = model.model(ids, use_cache=False)
    assert list(base) == ["last_hidden_state"]


def test_hidden_states_and_weights_keep_their_gradients(eager, ids):
    out = eager(ids, output_hidden_states=True, output_attentions=True)
    watched = [*out.hidden_states[:-1], *out.attentions]
    for tensor in watched:
        tensor.retain_grad()
    out.logits[..., 0].sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in watched)


@torch.no_grad()
def test_outputs_as_a_tuple(model, ids):
    whole = model(ids, labels=ids, output_hidden_states=True, use_cache=False)
    loss, logits, hidden = model(ids, labels=ids, output_hidden_states=True, use_cache=False, return_dict=False)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
    assert all(torch.equal(a, b) for a, b in zip(hidden, whole.hidden_states, strict=True))
    twin = copy.deepcopy(model)
    twin.config.return_dict = False
    assert torch.equal(twin(ids)[0], whole.logits)


# Training


def test_gradient_checkpointing_changes_no_gradient(arm, ids):
    grads = []
    for on in (False, True):
        model = stirred(arm).train()
        if on:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_checkpointed_training_keeps_no_cache(arm, ids):
    model = stirred(arm)
    cache = model(ids).past_key_values
    model.train().activation_checkpointing_enable()
    assert model(ids, labels=ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="cannot continue from past_key_values"):
        model(ids, labels=ids, past_key_values=cache)


def test_training_in_bf16(arm, ids):
    model = stirred(arm).to(torch.bfloat16).train()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# Initial weights


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_initialised(name):
    """Built without memory, filled with garbage, then initialised: as a loader does with what a file lacks."""
    with torch.device("meta"):
        model = QiesForCausalLM(config(name))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    torch.manual_seed(1)
    model.init_weights()
    for (n, a), b in zip(model.state_dict().items(), build(name).state_dict().values(), strict=True):
        assert torch.isfinite(a).all(), n
        if b.ndim == 2 and b.any():  # drawn at random
            spread, error = b.std().item(), 5 * b.numel() ** -0.5  # five standard errors
            assert a.std().item() == pytest.approx(spread, rel=error) and abs(a.mean().item()) < error * spread, n
        else:
            assert torch.equal(a, b), n


def test_a_weight_missing_from_a_file_is_initialised_and_the_others_are_kept(arm, tmp_path):
    model = stirred(arm)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = [n for n in stored if n.endswith(("layers.0.mixer.decay_bias", "layers.3.mixer.o_proj.weight"))]
    assert lost
    save_file({n: t for n, t in stored.items() if n not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = QiesForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lost) and not info["unexpected_keys"] and not info["mismatched_keys"]
    fresh, now = build(arm).state_dict(), loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in lost:
            assert torch.equal(now[name], tensor), name
        elif "decay_bias" in name or arm != "gpt2":
            assert torch.equal(now[name], fresh[name]), name  # these start the same whatever the seed
        else:
            assert now[name].std() == pytest.approx(fresh[name].std().item(), rel=0.3)


# Files


def test_every_key_comes_back_from_a_file(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    tied = model.config.tie_word_embeddings
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_the_base_model_and_the_whole_share_files(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(base) is QiesModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    whole, info = QiesForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == (set() if model.config.tie_word_embeddings else {"lm_head.weight"})
    assert torch.equal(whole.eval().model(ids).last_hidden_state, base(ids).last_hidden_state)


def test_weights_of_another_size_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, vocab_size=50, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert loaded.lm_head.weight.shape == (50, 32) and info["mismatched_keys"]


def test_a_configuration_comes_back_whole(arm, tmp_path):
    for name, kept in (("plain", config(arm)), ("odd", config(arm, hidden_size=48, num_hidden_layers=4, gate="none"))):
        kept.save_pretrained(tmp_path / name)
        read = AutoConfig.from_pretrained(tmp_path / name)
        assert type(read) is QiesConfig
        assert read.to_dict() == {**kept.to_dict(), "_name_or_path": str(tmp_path / name)}
        assert QiesConfig.from_dict(kept.to_dict()).to_dict() == kept.to_dict()
        assert set(json.loads((tmp_path / name / "config.json").read_text())["layer_types"]) <= {
            "full_attention",
            "linear_attention",
        }


# Embeddings


def test_embeddings_can_be_got_and_set(arm, ids):
    model = stirred(arm)
    old = model.get_input_embeddings()
    assert old is model.model.embed_tokens and model.get_output_embeddings() is model.lm_head
    new = torch.nn.Embedding(97, 32)
    model.set_input_embeddings(new)
    assert model.model.embed_tokens is new
    head = torch.nn.Linear(32, 97, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head
    assert model(ids).logits.shape == (3, 11, 97)


@pytest.mark.parametrize("size", [90, 120])
@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_resize(arm, tie, size, ids):
    model = stirred(arm, tie_word_embeddings=tie)
    ids = ids.clamp(max=80)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(size)
        after = model(ids).logits
    assert after.shape[-1] == size == model.config.vocab_size == model.get_input_embeddings().num_embeddings
    assert torch.allclose(after[..., :90], before[..., :90], atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    model.train()(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.shape == (size, 32)


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one():
    model = stirred("qies").train()
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    want = model(ids, labels=ids).loss
    want.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.compile(backend="eager")
    got = model(ids, labels=ids).loss
    got.backward()
    torch.testing.assert_close(got, want)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
