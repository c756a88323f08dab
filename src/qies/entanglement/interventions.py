"""Interventions on the entanglement layers of a model, as context managers over its hook points.

Each takes a hook point's name (`qies.model.hooks.HeadHooks`, or `hook_out`) and optionally the indices of the layers to
act on; the default is every entanglement layer. They nest, act on training, inference and generation alike, and are
removed when the context ends. Hook names and the form of the edits follow TransformerLens. `zero` and `read_state` are
ablations (Meyes et al., arXiv:1901.08644), `replace` with values from another run is activation patching (Vig et al.,
arXiv:2004.12265).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qies.errors import UserError, unknown
from qies.model import QiesForCausalLM
from qies.model.hooks import HookPoint, hook_points, is_compiled

Edit = Callable[[Tensor], Tensor | None]


def points(model: nn.Module, name: str, layers: Sequence[int] | None = None) -> dict[str, HookPoint]:
    """The hook points called `name` (`hook_beta`), or whose qualified name it is, in the given layers.

    Raises UserError when there is none: an unknown name, a layer that is no entanglement layer, or a compiled model,
    which would not run hooks attached now.
    """
    if is_compiled(model):
        raise UserError(
            "A compiled model does not run hooks attached after compilation; intervene on the original one."
        )
    known = hook_points(model)
    if not known:
        raise UserError("The model has no entanglement layer, so there is no hook point to attach to.")
    named = {path: p for path, p in known.items() if name in (path, path.rpartition(".")[2])}
    if not named:
        names = sorted({path.rpartition(".")[2] for path in known})
        raise unknown("hook point", name, names)
    if layers is None:
        return named
    chosen = {path: p for path, p in named.items() if _layer(path) in layers}
    if missing := sorted(set(layers) - {_layer(path) for path in chosen}):
        have = sorted({_layer(path) for path in named})
        raise UserError(f"Layers {missing} have no hook point '{name}'; choose among {have}.")
    return chosen


@contextmanager
def edit(model: nn.Module, name: str, function: Edit, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Within this context the value at a hook point is `function(value)`, or stays as it is where that is None.

    Raises UserError, where the model runs, for a value of another shape.
    """

    def hook(path: str) -> Callable[..., Tensor | None]:
        def called(module: nn.Module, args: tuple, value: Tensor) -> Tensor | None:
            new = function(value)
            if new is not None and new.shape != value.shape:
                raise UserError(f"{path} has shape {list(value.shape)} but the edit returns {list(new.shape)}.")
            return None if new is None else new.to(value)

        return called

    with ExitStack() as stack:
        for path, point in points(model, name, layers).items():
            stack.callback(point.register_forward_hook(hook(path)).remove)
        yield


@contextmanager
def record(model: nn.Module, *names: str, layers: Sequence[int] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the values at hook points, by qualified name, as the model runs; each run replaces the last one's.

    The values stay in the autograd graph, so a loss may be computed from them; detach what is kept for longer.
    """
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def called(module: nn.Module, args: tuple, value: Tensor) -> None:
            seen[path] = value

        return called

    with ExitStack() as stack:
        for name in names:
            for path, point in points(model, name, layers).items():
                stack.callback(point.register_forward_hook(keep(path)).remove)
        yield seen


@contextmanager
def scale(model: nn.Module, name: str, factor: float, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Multiply the value at a hook point by `factor`."""
    with edit(model, name, lambda value: value * factor, layers):
        yield


@contextmanager
def zero(model: nn.Module, name: str, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Ablate a hook point: its value becomes zero, even where it was not finite."""
    with edit(model, name, torch.zeros_like, layers):
        yield


@contextmanager
def replace(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Patch hook points, given by qualified name as `record` returns them, with values from elsewhere."""
    with ExitStack() as stack:
        for path, value in values.items():
            stack.enter_context(edit(model, path, lambda _, value=value: value))  # type: ignore[misc]
        yield


@contextmanager
def dephase(model: nn.Module, strength: float = 1.0, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Reduce the phase that each token applies to the state, theta, to (1 - strength) theta; 1 removes it.

    Has no effect on heads without phases.
    """
    with scale(model, "hook_theta", 1 - strength, layers):
        yield


@contextmanager
def read_state(model: QiesForCausalLM, on: bool = True) -> Iterator[None]:
    """Switch the read-out of every entanglement layer on or off; the states evolve either way."""
    with model.read_state(on):
        yield


def _layer(path: str) -> int:
    """The index of the layer in a hook point's qualified name."""
    return int(path.rpartition("layers.")[2].partition(".")[0])
