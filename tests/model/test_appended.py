"""Keys and values in a growing buffer: the numbers of `torch.cat`, whatever is done with them in between."""

import copy

import pytest
import torch
from tiny_models import stirred

from qies.model import QiesCache
from qies.model.cache import Appended


def test_a_further_token_copies_itself_alone():
    rows, held = Appended(), torch.tensor([])
    parts = [torch.randn(2, 3, n, 4) for n in (16, 1, 1)]
    places = []
    for i, part in enumerate(parts):
        held = rows.append(held, part)
        assert torch.equal(held, torch.cat(parts[: i + 1], -2))
        places.append(held.data_ptr())
    assert len(set(places)) == 1 and rows.buffer.shape[-2] == 19  # an eighth more than the first 16, and one


def test_tokens_after_a_crop_or_a_copy_leave_what_was_there():
    rows = Appended()
    first = rows.append(torch.tensor([]), torch.randn(1, 1, 16, 2))
    whole = rows.append(first, torch.randn(1, 1, 1, 2))
    kept, twin = whole.clone(), copy.deepcopy(rows)
    new = torch.randn(1, 1, 1, 2)
    for other in (rows.append(whole[..., :-3, :], new), twin.append(twin.last, new), rows.append(first, new)):
        assert torch.equal(other[..., -1:, :], new)
        assert torch.equal(whole, kept)


@pytest.mark.parametrize("arm", ["transformer", "qies", "gpt2"])
def test_modes_of_autograd_may_change_between_tokens(arm):
    model = stirred(arm)
    ids = torch.randint(1, model.config.vocab_size, (2, 12))
    expected = model(ids, use_cache=False).logits
    cache = QiesCache(model.config)
    modes = (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad, torch.no_grad)
    parts = []
    for mode, part in zip(modes, ids.split(2, 1), strict=True):
        with mode():
            parts.append(model(part, past_key_values=cache).logits.clone())
    assert torch.allclose(torch.cat(parts, 1), expected, atol=2e-5)


def test_gradients_flow_through_keys_and_values_of_earlier_tokens():
    model = stirred("transformer")
    ids = torch.randint(1, model.config.vocab_size, (1, 8))
    cache = QiesCache(model.config)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    first = model(ids[:, 3:5], past_key_values=cache).logits
    with torch.no_grad():
        held = copy.copy(cache.layers[0].keys)
        model(ids[:, 5:6], past_key_values=copy.deepcopy(cache.detach_()))
    assert torch.equal(held, cache.layers[0].keys)
    first.sum().backward()  # nothing that it keeps was written over
    assert model.model.layers[0].mixer.k_proj.weight.grad.abs().sum() > 0
