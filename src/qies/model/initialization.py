"""Initial weights: each parameter is a function of (seed, its qualified name).

Adding, removing or reordering parameters does not change the others, arms share the weights whose names and shapes they
share, and a process can make one weight without the rest (`qies.train.sharded_init`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import initialization as init


def draw_seed() -> int:
    """A model's seed: one draw from torch's default generator, however many parameters the model has."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def derived_seed(seed: int, name: str) -> int:
    """The seed of the stream called `name`: SHA-256 of both, in 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int | None, name: str) -> Iterator[None]:
    """Within this context torch's default CPU generator is the stream `name` of `seed`; restored afterwards.

    Without a seed the generator is left as it is.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, name))
        yield


def has_rule(module: nn.Module) -> bool:
    """Whether `init_module` initialises every parameter that `module` owns itself."""
    known = isinstance(module, nn.Linear | nn.Embedding) or callable(getattr(module, "reset_parameters", None))
    return known or not any(True for _ in module.parameters(recurse=False))


@torch.no_grad()
def init_module(module: nn.Module, seed: int | None = None, name: str = "") -> None:
    """Initialise the parameters that `module`, called `name` in its model, owns itself (not its children's).

    Weights of `nn.Linear` and `nn.Embedding` are drawn from N(0, std^2), each from its own stream, in float32 on the
    CPU, so that they are the same on every device; std is the module's `init_std`, else in_features^-1/2 and 1. Their
    biases are zero. Every other module initialises itself by `reset_parameters()`, PyTorch's convention; what it draws
    comes from one stream for the module. A module without it keeps what its constructor wrote. `seed` None draws from
    torch's default generator. Parameters on the meta device are left alone.
    """
    own = list(module.parameters(recurse=False))
    if not own or all(p.is_meta for p in own):
        return
    if isinstance(module, nn.Linear | nn.Embedding):
        default = 1.0 if isinstance(module, nn.Embedding) else module.in_features**-0.5
        std = getattr(module, "init_std", default)
        if not getattr(module.weight, "_is_hf_initialized", False):
            init.copy_(module.weight, _normal(module.weight.shape, std, seed, f"{name}.weight"))
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)
    elif has_rule(module):
        with seeded(seed, name):
            module.reset_parameters()  # type: ignore[operator]


def _normal(shape: torch.Size, std: float, seed: int | None, name: str) -> Tensor:
    weight = torch.zeros(shape, dtype=torch.float32, device="cpu")
    generator = None if seed is None else torch.Generator().manual_seed(derived_seed(seed, name))
    return weight.normal_(std=std, generator=generator) if std else weight
