"""QIES models in the classes of transformers. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "QiesCache": "qies.model.cache",
    "QiesConfig": "qies.model.configuration",
    "QiesForCausalLM": "qies.model.modeling",
    "QiesModel": "qies.model.modeling",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qies.model' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
