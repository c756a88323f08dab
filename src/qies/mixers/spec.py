"""What a mixer declares of itself. Imports no torch.

A mixer is the part of a layer that mixes positions: attention, an entanglement layer, any recurrence. `MixerSpec` is
its only declaration: parameter counts, FLOPs, memory, optimizer groups, the cache and the checks of a configuration are
derived from it. Every function of a declaration takes the model's settings (`presets.settings`, or `vars` of a
`QiesConfig`) and describes one layer.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qies.errors import UserError

Values = Mapping[str, Any]
Shape = tuple[int, ...]

OPTIMIZERS = ("matrix", "vector")
BACKBONE = ("embedding", "head", "mlp", "norm")  # groups of parameters that no mixer has


class NotCounted(ValueError):
    """The activations of a model have no closed form. The message says which, in one line."""


@dataclass(frozen=True)
class Weight:
    """One parameter tensor.

    shape: as the module has it. optimizer: "matrix" for Muon with weight decay (two dimensions), "vector" for AdamW
    without (biases, scales, convolutions, small control maps); "embedding" and "head" are the backbone's. group: the
    name under which it is counted, "" for the mixer's own. fp32: it stays in float32 where the model is in half
    precision.
    """

    shape: Shape
    optimizer: str = "matrix"
    group: str = ""
    fp32: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _nothing(values: Values) -> tuple[()]:
    return ()


def _zero(values: Values) -> int:
    return 0


def _no_flops(values: Values, seq_len: int) -> float:
    return 0.0


def _no_problem(values: Values) -> None:
    return None


@dataclass(frozen=True)
class MixerSpec:
    """The declaration of a mixer.

    name: what `layer_types` calls it. module: "package.module:Class" of the torch module, imported when a model is
    built; it is called with (config, layer_idx), and its forward(x, *, mask, texts, past_key_values, angles,
    causal_mask, blocks) returns the mixed [B,T,D] and attention weights or None.

    weights: every parameter by its name in the module. A module with other parameters is refused when it is built.
    flops: forward FLOPs per token of a sequence of T tokens, their mean, beyond the 2 per parameter that are counted
    for the weights; matrix products only, as for every mixer. step_flops: the same for one token that follows T cached
    ones; None: what one more token adds to the sequence, (T+1) flops(T+1) - T flops(T).
    group: the name of the mixer's parameters and FLOPs in counts; "" for `name`.
    fields: the configuration fields that it owns, with their defaults. check: what is wrong with their values, in one
    sentence, or None.

    states: the shapes, without the batch, of what a sequence carries from token to token, in float32. conv_inputs:
    numbers that a short convolution carries in addition, and cached: numbers kept of every token, both in the dtype of
    the activations.
    cache: "package.module:Class" of the layer of `QiesCache`, called with `number_of_states`. entangled: each state is
    a batch of bipartite states [H,2m,V], rows Re | Im, whose spectra and entropies are measured.
    layer_type: the transformers name of its kind: "full_attention" for a mixer that attends, and so takes `angles`,
    `causal_mask` and `blocks`; "linear_attention" for one with a state of constant size.

    activation_bytes: bytes per token that it keeps for the backward pass in bfloat16 on CUDA, without the norm before
    it; may raise `NotCounted`. None: not known.
    """

    name: str
    module: str
    weights: Callable[[Values], Mapping[str, Weight]]
    flops: Callable[[Values, int], float] = _no_flops
    step_flops: Callable[[Values, int], float] | None = None
    group: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Values], str | None] = _no_problem
    states: Callable[[Values], tuple[Shape, ...]] = _nothing
    conv_inputs: Callable[[Values], int] = _zero
    cached: Callable[[Values], int] = _zero
    cache: str = "qies.model.cache:StateLayer"
    entangled: bool = False
    layer_type: str = "linear_attention"
    activation_bytes: Callable[[Values], float] | None = None

    @property
    def label(self) -> str:
        """Under which its parameters and FLOPs are counted."""
        return self.group or self.name

    @property
    def attends(self) -> bool:
        """Whether it takes rotary angles and a causal mask."""
        return self.layer_type == "full_attention"

    def declared(self, values: Values) -> dict[str, Weight]:
        """`weights` with every group filled in. Raises UserError for a declaration that nothing can count."""
        out = {}
        for name, weight in self.weights(values).items():
            weight = weight if weight.group else replace(weight, group=self.label)
            if weight.group in BACKBONE:
                raise UserError(
                    f"Mixer '{self.name}' counts {name} in the group '{weight.group}', which is the backbone's; "
                    "give it another group."
                )
            if weight.optimizer not in OPTIMIZERS or (weight.optimizer == "matrix" and len(weight.shape) != 2):
                raise UserError(
                    f"Mixer '{self.name}' declares {name} of shape {list(weight.shape)} with the optimizer "
                    f"'{weight.optimizer}'; give a matrix 'matrix' or 'vector', and anything else 'vector'."
                )
            out[name] = weight
        return out

    def remembers(self, values: Values) -> bool:
        """Whether the mixer carries state from token to token, which an attention mask does not control."""
        return bool(self.states(values) or self.conv_inputs(values))

    def decode_flops(self, values: Values, context: int) -> float:
        """FLOPs of one token after `context` cached ones, beyond 2 per parameter."""
        if self.step_flops is not None:
            return self.step_flops(values, context)
        longer = (context + 1) * self.flops(values, context + 1)
        return longer - context * self.flops(values, context) if context else longer

    def kept_bytes(self, values: Values) -> float:
        """`activation_bytes`. Raises NotCounted where they are not known."""
        if self.activation_bytes is None:
            raise NotCounted(f"the mixer '{self.name}' declares no activation_bytes")
        return self.activation_bytes(values)


def resolve(path: str) -> Any:
    """What "package.module:Class" names. Raises UserError where there is no such thing."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it needs
        raise UserError(f"No module '{module}', where '{path}' should be; name it as 'package.module:Class'.") from None
    except AttributeError:
        raise UserError(f"The module '{module}' has no '{name}'; name the class as 'package.module:Class'.") from None
