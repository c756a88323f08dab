"""Bytes of the cache: predicted from the settings, and those of the tensors that a model keeps."""

import pytest
import torch

from qies import presets
from qies.accounting.cache import cache_bytes
from qies.model import QiesCache, QiesConfig, QiesForCausalLM


def tensors(cache):
    """Bytes held by part."""
    out = {"states": 0, "convolution": 0, "keys_values": 0}
    for layer in cache.layers:
        held = {
            "states": list(layer.recurrent_states.values()),
            "convolution": list(layer.conv_states.values()),
            "keys_values": [getattr(layer, "keys", None), getattr(layer, "values", None)],
        }
        for part, found in held.items():
            out[part] += sum(x.numel() * x.element_size() for x in found if x is not None)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arm", "overrides"),
    [*((arm, {}) for arm in presets.ARMS), ("qies", {"register_heads": 3, "conv_size": 2}),
     ("qies", {"register_heads": 2, "register_channels": 8}), ("qies", {"register_heads": 3, "register_mode": "real"}),
     ("qies", {"unitary_heads": 2}),
     ("transformer", {"attention_conv": "input"}), ("complex", {"decay": "channel"})],
)  # fmt: skip
def test_a_cache_is_as_large_as_predicted(arm, overrides, dtype):
    values = presets.settings(arm, "100k", 64, **overrides)
    model = QiesForCausalLM(QiesConfig(**values)).eval().to(dtype)
    cache, batch = QiesCache(model.config), 2
    with torch.no_grad():
        model(torch.zeros(batch, 37, dtype=torch.long), past_key_values=cache)
        for _ in range(3):
            model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
    predicted = cache_bytes(values, 40, itemsize=dtype.itemsize)
    assert {part: batch * size for part, size in predicted.items()} == tensors(cache)
    assert batch * sum(predicted.values()) == cache.state_bytes()


def test_registers_add_their_states_alone():
    """m levels and m values each, complex, in every entanglement layer."""
    heads, m = 3, 5
    own = cache_bytes(presets.settings("qies", "100k", 64, register_heads=heads, register_channels=m), 1000)
    bare = cache_bytes(presets.settings("no_phase", "100k", 64), 1000)
    layers = presets.settings("qies", "100k", 64)["layer_types"].count("linear_attention")
    assert own["states"] - bare["states"] == layers * heads * 2 * m * m * 4
    assert own["keys_values"] == bare["keys_values"]
