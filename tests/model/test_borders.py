"""What other libraries do to a model and read from it: hooks, offloading, pruning, quantisation, names, refusals."""

import subprocess
import sys

import pytest
import torch
from tiny_models import ARMS, build, config, stirred
from torch import nn
from transformers import AutoModelForCausalLM

from qies.model import QiesConfig
from qies.model.layers import is_matrix
from qies.objective import language_modelling_of_logits

READ = {"up_proj": "model.layers.0.mlp.up_proj", "down_proj": "model.layers.0.mlp.down_proj", "lm_head": "lm_head"}


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(2))


def loss_of_logits(model, ids) -> torch.Tensor:
    """The loss written out from the logits, which come from calls of the modules."""
    return language_modelling_of_logits(model(ids).logits[:, :-1], ids[:, 1:])


def test_a_plain_layer_is_read_as_a_matrix():
    model = build("qies")
    assert all(is_matrix(model.get_submodule(path)) for path in READ.values())
    assert not is_matrix(nn.Linear(3, 3))  # the bias would be lost
    with torch.device("meta"):
        assert not is_matrix(nn.Linear(3, 3, bias=False))


# Hooks


@pytest.mark.parametrize("path", READ.values(), ids=READ)
def test_a_forward_hook_fires_and_its_output_counts(path, ids):
    model = stirred("qies")
    plain = model(ids, labels=ids)
    calls = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, args, out: calls.append(1) or 2 * out)
    hooked = model(ids, labels=ids)
    assert calls and not torch.allclose(hooked.logits, plain.logits, atol=1e-3)
    torch.testing.assert_close(hooked.loss, loss_of_logits(model, ids))
    handle.remove()
    assert torch.equal(model(ids, labels=ids).loss, plain.loss)


@pytest.mark.parametrize("path", READ.values(), ids=READ)
@pytest.mark.parametrize("kind", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_every_other_hook_fires_in_training(path, kind, ids):
    model, calls = stirred("qies").train(), []
    getattr(model.get_submodule(path), f"register_{kind}")(lambda *args: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert calls == [1]


def test_a_hook_on_all_modules_sees_every_layer(ids):
    model, seen = stirred("qies").train(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        model(ids, labels=ids)
    finally:
        handle.remove()
    assert seen >= {model.get_submodule(path) for path in READ.values()}


# Weights that are not plain


@pytest.mark.parametrize("name", ARMS)
def test_an_offloaded_model_is_the_same_model(name, ids):
    import accelerate

    model = stirred(name)
    want = model(ids, labels=ids)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.device.type == "meta"
    got = model(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", READ.values(), ids=READ)
def test_a_pruned_weight_is_pruned_in_the_loss_and_in_training(path, ids):
    from torch.nn.utils import prune

    model, zeroed = stirred("qies"), stirred("qies")
    layer = model.get_submodule(path)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        zeroed.get_submodule(path).weight.mul_(layer.weight_mask)
    for _ in range(2):  # the second step reads the weight that the first one has left
        losses = []
        for m in (model, zeroed):
            m.train().zero_grad()
            losses.append(m(ids, labels=ids).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        with torch.no_grad():
            layer.weight_orig.sub_(0.1 * layer.weight_orig.grad)
            weight = zeroed.get_submodule(path).weight
            weight.sub_(0.1 * weight.grad * layer.weight_mask)


@pytest.mark.parametrize("path", READ.values(), ids=READ)
def test_a_parametrized_weight_counts_as_it_is_computed(path, ids):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    model, halved = stirred("qies"), stirred("qies")
    nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Half())
    with torch.no_grad():
        halved.get_submodule(path).weight.div_(2)
    torch.testing.assert_close(model(ids, labels=ids).loss, halved(ids, labels=ids).loss)


def test_dynamic_quantisation_reaches_the_loss(ids):
    model = stirred("qies")
    want = model(ids, labels=ids).loss
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    out = small(ids, labels=ids)
    torch.testing.assert_close(out.loss, loss_of_logits(small, ids))
    assert 0 < abs(out.loss - want) < 0.1


@pytest.mark.parametrize("path", READ.values(), ids=READ)
def test_a_layer_of_another_class_is_called(path, ids):
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, doubled = stirred("qies"), stirred("qies")
    parent, _, name = path.rpartition(".")
    layer = Doubling(*reversed(model.get_submodule(path).weight.shape), bias=False)
    layer.weight = model.get_submodule(path).weight
    setattr(model.get_submodule(parent), name, layer)
    with torch.no_grad():
        doubled.get_submodule(path).weight.mul_(2)
    torch.testing.assert_close(model(ids, labels=ids).loss, doubled(ids, labels=ids).loss)


def test_the_bias_of_a_new_head_counts(ids):
    model = stirred("qies")
    head = nn.Linear(32, 97)
    model.set_output_embeddings(head)
    torch.testing.assert_close(model(ids, labels=ids).loss, loss_of_logits(model, ids))


# Names that other libraries read


def test_the_soft_cap_has_the_name_that_other_libraries_read():
    assert config("qies").final_logit_softcapping == 15.0
    assert config("gpt2").final_logit_softcapping is None  # 0.0 would be taken for a cap
    for value, cap in ((30.0, 30.0), (None, 0.0)):
        made = QiesConfig(final_logit_softcapping=value)
        assert made.logit_softcap == cap and made.final_logit_softcapping == value
        assert QiesConfig.from_dict(made.to_dict()).logit_softcap == cap
    assert "final_logit_softcapping" not in config("qies").to_dict()


def test_the_soft_cap_under_the_other_name_gives_the_same_logits(ids):
    model = stirred("qies")
    hidden = model.model(ids).last_hidden_state
    cap = model.config.get_text_config().final_logit_softcapping
    torch.testing.assert_close(cap * torch.tanh(model.lm_head(hidden) / cap), model(ids).logits)


def test_heads_of_keys_and_values_are_those_of_the_queries():
    assert config("qies").num_key_value_heads == config("qies").num_attention_heads == 2
    assert QiesConfig(num_key_value_heads=2).num_key_value_heads == 2
    with pytest.raises(ValueError, match="must equal num_attention_heads, 2"):
        QiesConfig(num_key_value_heads=1)


@pytest.mark.parametrize("name", ARMS)
def test_the_controls_kept_in_fp32_are_those_that_the_model_has(name):
    model = build(name)
    kept = model._keep_in_fp32_modules_strict
    assert kept == {n.rsplit(".", 1)[-1] for n, _ in model.named_parameters()} & {
        "beta_bias", "decay_bias", "decay_rate", "phase_bias"
    }  # fmt: skip
    assert bool(kept) == ("linear_attention" in model.config.layer_types)


# Refusals and loading


@pytest.mark.parametrize("name", ["transformer", "gpt2", "qies"])
def test_continuous_batching_is_refused(name):
    with pytest.raises(ValueError, match=r"use generate\(\) with a padded batch"):
        stirred(name).generate_batch([[5, 6, 7]], max_new_tokens=3)


@pytest.mark.slow  # processes that import transformers
def test_a_saved_folder_says_how_to_load_it(tmp_path):
    model = stirred("qies")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
