"""The cache of a hybrid stack: states of constant size for recurrent layers, keys and values for attention layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from qies.mixers import mixer, resolve
from qies.ops.autograd import transformed


class StateLayer(LinearAttentionLayer):
    """The cache of a recurrent layer: its states in fp32, each [B,...] (in an entanglement layer [B,H,2m,V] for each
    group of heads), and the last inputs [B,k-1,D] of the convolution."""

    is_compileable = is_croppable = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        _each_state(self, lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        _each_state(self, lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError("A recurrent state cannot be rolled back, so this cache cannot be cropped.")


class Appended:
    """Keys or values [B,H,T,K] in a buffer with room for an eighth more: a further token copies itself alone, where
    `torch.cat` copies all that came before."""

    def __init__(self) -> None:
        self.buffer = self.last = torch.empty(0)

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """`held` [B,H,S,K], or an empty tensor, with `new` [B,H,T,K] after it, as a view of the buffer.

        `held` keeps its numbers: a tensor other than the last that was returned here (cropped, reordered, put back) is
        copied first.
        """
        before = held.shape[-2] if held.numel() else 0
        after = before + new.shape[-2]
        stale = held is not self.last or after > self.buffer.shape[-2]
        if stale or (self.buffer.is_inference() and not torch.is_inference_mode_enabled()):
            self.buffer = new.new_empty(*new.shape[:-2], after + after // 8 + 1, new.shape[-1])
            if before:
                self.buffer[..., :before, :] = held
        self.buffer[..., before:after, :] = new
        self.last = self.buffer[..., :after, :]
        return self.last


class AttentionStateLayer(LinearAttentionAndFullAttentionLayer):
    """The cache of an attention layer: keys, values, and the last inputs of its short convolution if it has one."""

    keys: Any
    values: Any

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.appended = Appended(), Appended()

    @property
    def is_croppable(self) -> bool:
        return not any(self.is_conv_states_initialized.values())

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.has_previous_state[0] = True  # set here, since the layer may have no convolution
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():  # nothing is written in place
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.appended
        self.keys, self.values = keys.append(self.keys, key_states), values.append(self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self.appended = Appended(), Appended()

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
    time). `get_seq_length()` also works for stacks without attention layers.
    """

    def __init__(self, config) -> None:
        specs = [mixer(kind) for kind in config.layer_types]
        layers = [resolve(s.cache)(number_of_states=max(1, len(s.states(vars(config))))) for s in specs]
        Cache.__init__(self, layers=layers)  # DynamicCache would create layers from the layer types of transformers
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

    def snapshot(self) -> QiesCache:
        """A copy that does not change when this cache reads more tokens; also the way to roll back, by `restore`.

        States and convolution inputs are copied; keys and values are shared, as each update makes new ones.
        """
        out = copy.copy(self)
        out.layers = [copy.copy(layer) for layer in self.layers]
        for layer in out.layers:
            for name, value in vars(layer).items():
                if isinstance(value, dict):
                    setattr(layer, name, dict(value))
            _each_state(layer, torch.Tensor.clone)
        return out

    def restore(self, snapshot: QiesCache) -> None:
        """Go back to what a `snapshot` of this cache holds; it can be restored any number of times."""
        self.layers, self.seen_tokens = snapshot.snapshot().layers, snapshot.seen_tokens

    def detach_(self) -> QiesCache:
        """Detach all tensors in place, so that gradients do not flow to earlier tokens."""
        for layer in self.layers:
            _each_state(layer, torch.Tensor.detach)
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return self

    def crop(self, tokens_to_remove: int) -> None:
        for layer in sorted(self.layers, key=lambda layer: layer.is_croppable):  # raises before any layer is changed
            layer.crop(tokens_to_remove)
        self.seen_tokens -= abs(tokens_to_remove)

    def state_bytes(self, *, entangled_only: bool = False) -> int:
        """Current bytes of all layers, or of entanglement layers. Only keys and values grow with the context."""
        total = 0
        for layer, entangled in zip(self.layers, self.entangled, strict=True):
            if entangled_only and not entangled:
                continue
            tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
            total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return total


def read_states(layer, groups: int) -> list[Tensor | None]:
    """The states of a layer (an entanglement layer has one per head group); None each before the first token."""
    if layer is None or not layer.has_previous_state[0]:
        return [None] * groups
    return list(layer.recurrent_states.values())


def read_conv(layer) -> Tensor | None:
    """The convolution inputs [B,k-1,D] of a layer, or None before the first token."""
    return layer.conv_states[0] if layer is not None and layer.is_conv_states_initialized[0] else None


def write_states(layer, states: Iterable[Tensor]) -> None:
    """Store the states of a layer, in the order of `read_states`."""
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
