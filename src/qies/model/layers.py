"""Layers that all mixers share: short convolution, output gate, MLP. Legend: B T D H V as in the mixers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import initialization as init

from qies.model.cache import read_conv, write_conv
from qies.ops.activation import mlp, relu_squared
from qies.ops.conv import causal_conv
from qies.ops.norm import rms_norm


def linear(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """A linear map without bias; `init_std`, by default inputs^-1/2, is the standard deviation of its initial weights.

    The constructor draws nothing that lasts: `init_module` sets the weights.
    """
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inputs, outputs, bias=False)
    layer.init_std = inputs**-0.5 if std is None else std  # type: ignore[assignment]
    return layer


def embedding(entries: int, width: int, std: float) -> nn.Embedding:
    """A table of vectors whose initial entries have the standard deviation `std`; as `linear`, it draws nothing."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Embedding(entries, width)
    layer.init_std = std  # type: ignore[assignment]
    return layer


def is_matrix(layer: nn.Module) -> bool:
    """Whether layer(x) is x W^T and nothing more, so that a fused kernel may read the weight W in its place.

    False where something may act around the weight: subclasses and parametrizations, adapters, a bias, quantised,
    sharded or offloaded weights, a replaced `forward`, and hooks on the layer or on all modules. Call such a layer.
    """
    weight = layer._parameters.get("weight")
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and "forward" not in layer.__dict__  # accelerate puts its hooks there
        and type(weight) is nn.Parameter
        and weight.device.type != "meta"
        and not any(hooks)
        and not _has_any_global_hook()
    )


def split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """x [..., sum(sizes)] -> a part [..., size] for each; one part is x itself, which saves backward a copy."""
    return [x] if len(sizes) == 1 else x.split(list(sizes), -1)


class ShortConv(nn.Module):
    """x + depthwise causal convolution of x over real (unpadded) tokens; the identity at the start.

    Short convolutions before a mixer: Poli et al., arXiv:2302.10866; as a residual: Allen-Zhu, Physics of
    Language Models 4.1.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, taps))

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache=None, texts: Tensor | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]; mask [B,T] bool, False at pads; cache: the layer's memory or None; texts [B,T] int64,
        the number of each token's text in a packed row, or None."""
        past = read_conv(cache)
        if mask is None:
            y, inputs = causal_conv(x, self.weight, past, texts)
        else:
            # Pads may be anywhere: gather the real tokens, convolve, scatter back.
            order = torch.argsort((~mask).long(), dim=1, stable=True)
            texts = None if texts is None else texts.gather(1, order)
            order = order[..., None].expand_as(x)
            real = (x * mask[..., None]).gather(1, order)
            packed, _ = causal_conv(real, self.weight, past, texts)
            y = torch.zeros_like(packed).scatter(1, order, packed) * mask[..., None]
            inputs = self._last_inputs(real, mask.sum(1), past)
        if cache is not None:
            write_conv(cache, inputs)
        return x + y

    def _last_inputs(self, real: Tensor, count: Tensor, past: Tensor | None) -> Tensor:
        """The last k-1 real inputs of each row, [B,k-1,D]."""
        keep = self.weight.shape[1] - 1
        if past is None:
            past = real.new_zeros(real.shape[0], keep, real.shape[2])
        line = torch.cat([past.to(real.dtype), real], 1)
        index = count[:, None] + torch.arange(keep, device=real.device)
        return line.gather(1, index[..., None].expand(-1, -1, real.shape[2]))


class OutputGate(nn.Module):
    """gate(x) * RMSNorm_head(o), the last step of every mixer before its output projection."""

    def __init__(self, width: int, heads: int, values: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        out = {"none": 0, "head": heads, "channel": values}[kind]
        self.proj = linear(width, out) if out else None

    def forward(self, x: Tensor, *groups: Tensor) -> Tensor:
        """x [B,T,D] and an o [B,T,H,V] for each group of heads -> [B,T,values], all groups' H*V, in the dtype of o."""
        out = [rms_norm(o) for o in groups]
        if self.proj is not None:
            gate = torch.sigmoid(self.proj(x)).to(out[0].dtype)
            shapes = [o.shape[2:3] if self.kind == "head" else o.shape[2:] for o in out]
            gates = split(gate, [shape.numel() for shape in shapes])
            gates = [g.unflatten(-1, shape) for g, shape in zip(gates, shapes, strict=True)]
            out = [o * (g[..., None] if self.kind == "head" else g) for o, g in zip(out, gates, strict=True)]
        flat = [o.flatten(2) for o in out]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


class MLP(nn.Module):
    """Two-layer network with the squared rectifier (So et al., arXiv:2109.08668), [B,T,D] -> [B,T,D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = linear(width, hidden)
        self.down_proj = linear(hidden, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if is_matrix(self.up_proj) and is_matrix(self.down_proj):
            return mlp(x, self.up_proj.weight, self.down_proj.weight)
        return self.down_proj(relu_squared(self.up_proj(x)))
