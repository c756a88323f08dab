"""Initialisation of a sharded model without holding the whole model in one process.

The model is built on the meta device and sharded. Then each process draws the weights of one module at a time, as in an
ordinary build (`qies.model.initialization`), and keeps its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from qies.errors import UserError
from qies.model import QiesForCausalLM
from qies.model.initialization import has_rule, init_module


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Context manager in which modules are built with parameters on the meta device; buffers are not affected."""

    def discard(module: nn.Module, name: str, p: nn.Parameter) -> nn.Parameter:
        return p if p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad)  # keeps tied weights tied

    hook = register_module_parameter_registration_hook(discard)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def whole_weights(model: QiesForCausalLM, name: str) -> dict[str, Tensor]:
    """The initial weights, on the CPU, of the module `name`'s own parameters that are on the meta device.

    Raises UserError for a module without `reset_parameters`.
    """
    module = model.get_submodule(name)
    blank = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.is_meta}
    if blank and not has_rule(module):
        raise UserError(
            f"{type(module).__name__} owns parameters ({', '.join(blank)}) but has no reset_parameters(), so its "
            "weights cannot be initialised in shards: define it, or train on one process."
        )
    try:
        module._parameters.update({k: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for k, p in blank.items()})
        init_module(module, model.init_seed, model.name_in_base(name))
        return {leaf: module._parameters[leaf].detach() for leaf in blank}
    finally:
        module._parameters.update(blank)


def fill(model: QiesForCausalLM) -> None:
    """Initialise the shards of a model that FSDP2 has sharded. All processes draw alike, without communication."""
    made: dict[Tensor, nn.Parameter] = {}
    for name, module in model.named_modules():
        blank = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.is_meta and p not in made}
        for leaf, whole in (whole_weights(model, name) if blank else {}).items():
            p = blank[leaf]
            whole = whole.to(p.device_mesh.device_type)
            made[p] = nn.Parameter(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
    every = model.named_parameters(remove_duplicate=False)
    parts = {name: made[p] for name, p in every if p in made}  # tied weights stay one
    model.load_state_dict(parts, strict=False, assign=True)
