"""What tells an attention layer the order of tokens: rotary positions, in part or not in every layer, and a short
convolution on its input or on its keys."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ATTENTION, build, stirred

from qies.errors import UserError
from qies.model.attention import rotary_angles
from qies.presets import settings


def test_angles_by_hand():
    positions = torch.tensor([[0, 1, 10]])
    whole = rotary_angles(positions, 8, 1e4)
    assert whole.shape == (1, 3, 1, 4)
    assert torch.allclose(whole[0, 2, 0], 10 * torch.tensor([1, 1e-1, 1e-2, 1e-3]))
    half = rotary_angles(positions, 8, 1e4, 0.5)  # two pairs, with the frequencies of a head of two pairs
    assert torch.allclose(half[0, 2, 0], 10 * torch.tensor([1, 1e-2, 0, 0]))
    assert not rotary_angles(positions, 8, 1e4, 0.0).any()


@torch.no_grad()
def test_layers_without_positions_among_others():
    ids = torch.randint(0, 97, (2, 20))
    model = stirred("transformer", nope_interval=2)
    assert [layer.mixer.rotates for layer in model.model.layers] == [True, False, True, False]
    never, none = stirred("transformer", nope_interval=1), stirred("transformer", position="none")
    assert torch.equal(never(ids).logits, none(ids).logits)
    assert not torch.allclose(model(ids).logits, none(ids).logits, atol=1e-3)
    zero = stirred("transformer", rope_fraction=0.0)
    assert torch.allclose(zero(ids).logits, none(ids).logits, atol=1e-6)


def test_layers_without_positions_are_counted_among_those_of_attention():
    """In a 3:1 hybrid every second attention layer, not all of them and not none."""

    def rotating(interval: int) -> list[bool]:
        model = build("no_phase", num_hidden_layers=16, nope_interval=interval)
        return [layer.mixer.rotates for layer in model.model.layers[3::4]]

    assert rotating(0) == [True] * 4 and rotating(1) == [False] * 4
    assert rotating(2) == [True, False, True, False] and rotating(4) == [True, True, True, False]
    assert rotating(3) == [True, True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("where", ["input", "keys"])
def test_attention_with_a_convolution_by_its_definition(where):
    mixer = stirred("transformer", attention_conv=where, position="none", gate="none").model.layers[0].mixer
    x = torch.randn(2, 9, 32)

    def convolved(z):
        past = torch.cat([z.new_zeros(2, 3, z.shape[2]), z], 1)
        return z + sum(mixer.conv.weight[:, j] * past[:, j : j + 9] for j in range(4))

    mixed = convolved(x) if where == "input" else x
    q, v = (F.linear(mixed, p.weight).view(2, 9, 2, 16).transpose(1, 2) for p in (mixer.q_proj, mixer.v_proj))
    k = F.linear(mixed, mixer.k_proj.weight)
    k = (convolved(k) if where == "keys" else k).view(2, 9, 2, 16).transpose(1, 2)
    q, k = F.rms_norm(q, (16,), eps=1e-6) * mixer.q_scale, F.rms_norm(k, (16,), eps=1e-6)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    y = F.linear(F.rms_norm(o, (16,), eps=1e-6).flatten(2), mixer.o_proj.weight)
    got, _ = mixer(x, angles=None, causal_mask=None, mask=None, past_key_values=None)
    assert torch.allclose(got, y, atol=1e-5)


def test_the_convolution_on_keys_has_a_channel_a_key():
    model = build("transformer")
    assert model.config.layer_types == ATTENTION
    assert model.model.layers[0].mixer.conv.weight.shape == (32, 4)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5; it must lie in"),
        ({"nope_interval": -1}, "nope_interval is -1"),
        ({"attention_conv": "key"}, "Did you mean 'keys'"),
    ],
)
def test_bad_values_are_one_line(bad, words):
    with pytest.raises(UserError, match=words):
        settings("transformer", "50k", 97, **bad)
