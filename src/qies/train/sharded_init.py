"""Initial weights of a model that no process holds whole.

The model is built with its weights on the meta device and sharded; then each process makes one module's weights after
another, by the rule and the seed of an ordinary build (`qies.model.initialization`), and keeps its own part.
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
    """Within this context modules are built with parameters on the meta device; buffers stay where they are."""

    def discard(module: nn.Module, name: str, p: nn.Parameter) -> nn.Parameter:
        return p if p.is_meta else nn.Parameter(p.to("meta"), p.requires_grad)  # tied weights stay one

    hook = register_module_parameter_registration_hook(discard)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def whole_weights(model: QiesForCausalLM, name: str) -> dict[str, Tensor]:
    """The initial weights, on the CPU, of the parameters on the meta device that the module `name` owns itself.

    Raises UserError for a module whose weights only its constructor knows.
    """
    module = model.get_submodule(name)
    blank = {leaf: p for leaf, p in module.named_parameters(recurse=False) if p.is_meta}
    if blank and not has_rule(module):
        raise UserError(
            f"{type(module).__name__} owns parameters ({', '.join(blank)}) but has no reset_parameters(), so its "
            "weights cannot be made in parts: define it, or train on one process."
        )
    try:
        module._parameters.update({k: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for k, p in blank.items()})
        init_module(module, model.init_seed, model.name_in_base(name))
        return {leaf: module._parameters[leaf].detach() for leaf in blank}
    finally:
        module._parameters.update(blank)


def fill(model: QiesForCausalLM) -> None:
    """Give a model that FSDP2 has sharded its part of every weight. Nothing is sent: all processes draw alike."""
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
