"""QIES: language models with a complex-valued entangled state, and the laboratory that measures how they scale."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "QiesConfig": "qies.model",
    "QiesForCausalLM": "qies.model",
    "QiesCache": "qies.model",
    "entangle": "qies.ops.entangle",
    "RunConfig": "qies.config",
    "StudyConfig": "qies.config",
    "UserError": "qies.errors",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import qies` stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'qies' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


class _RegisterWithAuto(importlib.abc.MetaPathFinder):
    """Registers the model as soon as the Auto classes of transformers are imported, so that `import qies` costs no
    import of torch and `AutoModelForCausalLM.from_pretrained` still knows QIES."""

    trigger = "transformers.models.auto.configuration_auto"

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                importlib.import_module("qies.model")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _RegisterWithAuto.trigger in sys.modules:
    importlib.import_module("qies.model")
else:
    sys.meta_path.insert(0, _RegisterWithAuto())
