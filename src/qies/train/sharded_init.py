"""A model built without its weights, and each weight made later, alone, with the values it would have had.

On many processes nobody then holds the whole model: each makes one weight after another and keeps its own part. What is
written into a weight while the model is built (draws of random numbers and constants) is noted with the state of the
generator before it, and repeated when the weight is made. The idea is that of torchdistX's deferred initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qies.model import QiesForCausalLM


@dataclass(frozen=True)
class _Write:
    """One operation in place on a weight, and the generator before it."""

    operation: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: Tensor


class _Note(TorchDispatchMode):
    """Puts uninitialised memory on the meta device and notes what is written into it.

    Every draw is made and thrown away, one weight at a time, so that the generator stands where it would.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: dict[int, list[_Write]] = {}  # by storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            return func(*args, **kwargs | {"device": "meta"})
        if func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].is_meta:
            write = _Write(func, args[1:], kwargs, torch.get_rng_state())
            self.writes.setdefault(args[0].untyped_storage()._cdata, []).append(write)
            func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            return args[0]
        return func(*args, **kwargs)


class Deferred:
    """The model that `build` makes, on the CPU but for its weights, which `fill` makes."""

    def __init__(self, build: Callable[[], QiesForCausalLM]) -> None:
        with _Note() as note:
            self.model = build()
        meta = [(name, p) for name, p in self.model.named_parameters() if p.is_meta]
        self.writes = {name: note.writes[p.untyped_storage()._cdata] for name, p in meta}
        self.shapes = {name: p.shape for name, p in meta}

    def weight(self, name: str) -> Tensor:
        """The whole weight, on the CPU."""
        after, whole = torch.get_rng_state(), torch.empty(self.shapes[name])
        for write in self.writes[name]:
            torch.set_rng_state(write.random)
            write.operation(whole, *write.args, **write.kwargs)
        torch.set_rng_state(after)
        return whole

    def fill(self) -> None:
        """Give a model that FSDP2 has sharded its part of every weight. Nothing is sent: all draw the same numbers."""
        made: dict[Tensor, nn.Parameter] = {}
        parts: dict[str, nn.Parameter] = {}
        for name, blank in self.model.named_parameters(remove_duplicate=False):
            if blank.is_meta and blank not in made:
                whole = self.weight(name).to(blank.device_mesh.device_type)
                part = distribute_tensor(whole, blank.device_mesh, blank.placements, src_data_rank=None)
                made[blank] = nn.Parameter(part)
            if blank in made:  # tied weights stay one
                parts[name] = made[blank]
        self.model.load_state_dict(parts, strict=False, assign=True)
