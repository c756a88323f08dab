"""QIES: language models with a complex-valued entangled state, and the laboratory that measures how they scale."""

from __future__ import annotations

import importlib
from typing import Any

from qies._register import register_with_transformers

__version__ = "0.1.0"

_WHERE = {
    "QiesConfig": "qies.model.configuration",
    "QiesForCausalLM": "qies.model.modeling",
    "QiesCache": "qies.model.cache",
    "entangle": "qies.ops.entangle",
    "MixerSpec": "qies.mixers",
    "Weight": "qies.mixers",
    "register_mixer": "qies.mixers",
    "register_arm": "qies.presets",
    "RunConfig": "qies.config",
    "StudyConfig": "qies.config",
    "UserError": "qies.errors",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import qies` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'qies' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)


register_with_transformers()
