"""The registry of mixers: one declaration (`MixerSpec`) each, which everything else reads. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from qies.errors import UserError, unknown
from qies.mixers.attention import ATTENTION
from qies.mixers.entanglement import ENTANGLEMENT
from qies.mixers.spec import MixerSpec, NotCounted, Weight, resolve

__all__ = [
    "BUILT_IN",
    "MixerSpec",
    "NotCounted",
    "Weight",
    "mixer",
    "mixers",
    "names",
    "register",
    "register_mixer",
    "resolve",
]

R = TypeVar("R")

BUILT_IN = (ATTENTION, ENTANGLEMENT)
_SPECS = {spec.name: spec for spec in BUILT_IN}


def register_mixer(spec: MixerSpec) -> None:
    """Make a mixer known under `spec.name`, for the patterns of arms and for `layer_types`.

    Raises UserError when another mixer has the name already; registering the same one again does nothing.
    """
    register(_SPECS, spec.name, spec, "mixer")


def register(registry: dict[str, R], name: str, row: R, kind: str) -> None:
    """Add a row to a registry. Raises UserError when the name stands for another row already."""
    if registry.setdefault(name, row) != row:
        raise UserError(f"The {kind} '{name}' is registered already with another declaration; give it another name.")


def mixer(name: str) -> MixerSpec:
    """The declaration of a mixer. Raises UserError for an unknown name."""
    if name not in _SPECS:
        raise unknown(
            "mixer",
            name,
            _SPECS,
            note="A mixer from outside the package is known once the module that registers it is imported: "
            "--plugin MODULE, or plugins: [MODULE] in the configuration.",
        )
    return _SPECS[name]


def names() -> tuple[str, ...]:
    """Every registered mixer."""
    return tuple(_SPECS)


def mixers(kinds: Iterable[str]) -> tuple[MixerSpec, ...]:
    """The declarations of the mixers that occur in `kinds`, each once. Raises UserError for an unknown name."""
    return tuple(mixer(kind) for kind in dict.fromkeys(kinds))
