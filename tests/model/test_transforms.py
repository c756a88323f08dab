"""What torch can do with a model: function transforms, exports, deterministic mode, another default dtype, and
gradients through a carried state."""

import pytest
import torch
from tiny_models import ARMS, VARIANTS, stirred
from torch.func import functional_call, grad, jvp, vmap

from qies.model import QiesCache

SOME = ["qies", "complex", "transformer", "gpt2"]
SLOW = ["complex", "transformer", "selective_phase"]


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def close(got, want, tolerance=1e-5):
    """In the Frobenius norm."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got - want).norm() <= tolerance * max(1.0, want.norm())


def loss_of(model):
    def loss(parameters, ids):
        return functional_call(model, parameters, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss

    return loss


def gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", SOME)
def test_function_transforms_of_the_model(name, ids):
    model = stirred(name).train()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    want = gradients(model, model(ids, labels=ids).loss)
    got = grad(loss_of(model))(parameters, ids)
    for key, value in want.items():
        close(got[key], value)

    generator = torch.Generator().manual_seed(2)
    direction = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    slope = jvp(lambda p: loss_of(model)(p, ids), (parameters,), (direction,))[1]
    close(slope, sum((direction[n] * g).sum() for n, g in want.items()), 1e-4)

    each = vmap(grad(loss_of(model)), in_dims=(None, 0))(parameters, ids[:, None])
    for row in range(2):
        alone = gradients(model, model(ids[row : row + 1], labels=ids[row : row + 1]).loss)
        for key, value in alone.items():
            close(each[key][row], value)


def test_forward_mode_without_a_transform(ids):
    model = stirred("qies")
    embeds = torch.randn(1, 5, 32)
    tangent = torch.randn(1, 5, 32)
    want = jvp(lambda x: model(inputs_embeds=x, use_cache=False).logits, (embeds,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(embeds, tangent)
        out = model(inputs_embeds=dual, use_cache=False).logits
        close(torch.autograd.forward_ad.unpack_dual(out).tangent, want)
    e = 1e-3
    near, far = (model(inputs_embeds=embeds + s * e * tangent).logits for s in (1, -1))
    close(want, (near - far) / (2 * e), 1e-2)


@pytest.mark.parametrize("name", ["qies", "transformer"])
def test_transforms_of_packed_rows(name, ids):
    model = stirred(name)
    embeds, seq_idx = torch.randn(1, 11, 32), torch.tensor([[0] * 4 + [1] * 7])

    def loss(x):
        return model(inputs_embeds=x, seq_idx=seq_idx, use_cache=False).logits.square().sum()

    x = embeds.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    close(grad(loss)(embeds), want, 2e-5)


@pytest.mark.parametrize("name", ["qies", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_an_export_takes_masks_and_any_length(name):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = stirred(name, **({"num_hidden_layers": 2} if name == "qies" else {}))

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    gen = torch.Generator().manual_seed(4)
    model, length = Logits().eval(), torch.export.Dim("length", min=2, max=60)

    def example(n, pads):
        mask = torch.ones(2, n, dtype=torch.long)
        mask[0, :pads] = 0
        return torch.randint(1, 97, (2, n), generator=gen), mask

    program = torch.export.export(model, example(12, 3), dynamic_shapes=({1: length}, {1: length}), strict=False)
    exported = program.module()
    for n, pads in ((12, 3), (7, 0), (41, 5), (2, 1)):
        given = example(n, pads)
        real = given[1].bool()
        close(exported(*given)[real], model(*given)[real])


@pytest.mark.parametrize("name", ARMS)
def test_a_training_step_in_deterministic_mode(name, ids):
    model = stirred(name).train()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for more in ({}, {"attention_mask": mask}, {"seq_idx": (ids.cumsum(1) > 200).long()}):
        want = model(ids, labels=ids, **more).loss
        grads = gradients(model, want)
        torch.use_deterministic_algorithms(True)
        try:
            loss = model(ids, labels=ids, **more).loss
            again = gradients(model, loss)
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(loss, want) and all(torch.equal(again[n], g) for n, g in grads.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ARMS)
def test_the_default_dtype_changes_nothing(name, dtype, ids):
    def everything():
        model.train()
        loss = model(ids, labels=ids).loss
        cache = QiesCache(model.config)
        model.eval()
        logits = model(ids, past_key_values=cache).logits
        states = [t for layer in cache.layers for t in layer.recurrent_states.values() if t is not None]
        return [loss, logits, *states, *gradients(model, loss).values()]

    model = stirred(name)
    want = everything()
    torch.set_default_dtype(dtype)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_flow_through_a_carried_state(name, padded):
    model = stirred(name).double()  # in float32 a gradient of this model is good to 1e-4 only
    generator = torch.Generator().manual_seed(5)
    embeds, weights = (torch.randn(2, 13, n, generator=generator).double() for n in (32, 97))
    mask = torch.ones(2, 13, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
        weights[0, :2] = 0
    leaves = [embeds.clone().requires_grad_() for _ in range(3)]
    (model(inputs_embeds=leaves[0], attention_mask=mask, use_cache=False).logits * weights).sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def in_chunks(x, cut):
        model.zero_grad()
        cache, total = QiesCache(model.config), 0
        for start, end in ((0, 6), (6, 7), (7, 13)):
            given = {"inputs_embeds": x[:, start:end], "attention_mask": mask[:, :end], "past_key_values": cache}
            total = total + (model(**given).logits * weights[:, start:end]).sum()
            if cut:
                cache.detach_()
        total.backward()

    in_chunks(leaves[1], cut=False)
    close(leaves[1].grad, leaves[0].grad, 1e-5)
    for n, g in whole.items():
        close(dict(model.named_parameters())[n].grad, g, 1e-5)
    in_chunks(leaves[2], cut=True)
    assert torch.isfinite(leaves[2].grad).all() and not torch.allclose(leaves[2].grad, leaves[0].grad, rtol=0.01)
    close(leaves[2].grad[:, 7:], leaves[0].grad[:, 7:], 1e-5)
