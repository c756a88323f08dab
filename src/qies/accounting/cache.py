"""Bytes of the cache in decoding, from the settings of the model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qies.accounting.parameters import layers
from qies.mixers import mixer
from qies.mixers.common import FULL, HALF


def cache_bytes(values: Mapping[str, Any], context: int, *, itemsize: int = HALF) -> dict[str, int]:
    """Bytes of the cache of one sequence after `context` tokens, all layers together; exact for `QiesCache`.

    states: those of recurrent layers, float32 whatever the model's dtype. convolution: the last inputs of the short
    convolutions. keys_values: of every token, in attention layers. The last two take `itemsize` bytes a number, as the
    activations do: 2 in half precision, 4 in float32.
    """
    out = {"states": 0, "convolution": 0, "keys_values": 0}
    for kind, times in layers(values).items():
        spec = mixer(kind)
        out["states"] += times * FULL * sum(math.prod(shape) for shape in spec.states(values))
        out["convolution"] += times * itemsize * spec.conv_inputs(values)
        out["keys_values"] += times * itemsize * spec.cached(values) * context
    return out
