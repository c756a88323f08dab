"""The cache of a hybrid stack: states of constant size for recurrent layers, keys and values for attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from qies.mixers import mixer, resolve


class StateLayer(LinearAttentionLayer):
    """One recurrent layer's memory: its states fp32, each [B,...] (for an entanglement layer [B,H,2m,V] for each group
    of heads), and the convolution's last inputs [B,k-1,D]."""

    is_compileable = is_croppable = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        _each_state(self, lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        _each_state(self, lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("A recurrent state cannot forget its last tokens, so this cache cannot be cropped.")


class AttentionStateLayer(LinearAttentionAndFullAttentionLayer):
    """Keys and values of an attention layer, and the last inputs of its short convolution if it has one."""

    @property
    def is_croppable(self) -> bool:
        return not any(self.is_conv_states_initialized.values())

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.has_previous_state[0] = True  # without a convolution nothing else would mark it
        return super().update(*args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        _each_state(self, lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        _each_state(self, lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_croppable and tokens_to_remove != 0:
            raise ValueError("A layer with a short convolution cannot be cropped.")
        DynamicLayer.crop(self, tokens_to_remove)


class QiesCache(DynamicCache):
    """A `DynamicCache` with the cache layers that the mixers of `config.layer_types` declare.

    Gradients flow through it to earlier forward passes; `detach_()` stops them (truncated backpropagation through
    time).

    `get_seq_length()` also works for stacks without attention, where nothing else counts the tokens.
    """

    def __init__(self, config) -> None:
        specs = [mixer(kind) for kind in config.layer_types]
        layers = [resolve(s.cache)(number_of_states=max(1, len(s.states(vars(config))))) for s in specs]
        Cache.__init__(self, layers=layers)  # DynamicCache would make layers by the names that transformers knows
        self.layers: list[Any]
        self.entangled = [spec.entangled for spec in specs]
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0

    def detach_(self) -> QiesCache:
        """Detach all tensors in place, so that gradients of later tokens do not reach earlier ones."""
        for layer in self.layers:
            _each_state(layer, torch.Tensor.detach)
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return self

    def crop(self, tokens_to_remove: int) -> None:
        for layer in sorted(self.layers, key=lambda layer: layer.is_croppable):  # a refusal comes before any change
            layer.crop(tokens_to_remove)
        self.seen_tokens -= abs(tokens_to_remove)

    def state_bytes(self, *, entangled_only: bool = False) -> int:
        """Bytes held now, or those of entanglement layers. States do not grow with the context; keys and values do."""
        total = 0
        for layer, entangled in zip(self.layers, self.entangled, strict=True):
            if entangled_only and not entangled:
                continue
            tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
            total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return total


def read_states(layer, groups: int) -> list[Tensor | None]:
    """The `groups` states of a layer (an entanglement layer has one per head group), None before the first token."""
    if layer is None or not layer.has_previous_state[0]:
        return [None] * groups
    return list(layer.recurrent_states.values())


def read_conv(layer) -> Tensor | None:
    """The convolution inputs [B,k-1,D] of a layer, or None before the first token."""
    return layer.conv_states[0] if layer is not None and layer.is_conv_states_initialized[0] else None


def write_states(layer, states: Iterable[Tensor]) -> None:
    """Store the states of a layer, in the order in which `read_states` returns them."""
    for i, state in enumerate(states):
        layer.recurrent_states[i] = state
        layer.is_recurrent_states_initialized[i] = True
        layer.has_previous_state[i] = True
        layer.device, layer.dtype = state.device, state.dtype


def write_conv(layer, inputs: Tensor) -> None:
    """Store the last inputs of the short convolution."""
    layer.conv_states[0] = inputs
    layer.is_conv_states_initialized[0] = True
    layer.device = inputs.device


def _each_state(layer, change) -> None:
    for states in (layer.conv_states, layer.recurrent_states):
        for index, tensor in states.items():
            if isinstance(tensor, torch.Tensor):
                states[index] = change(tensor)
