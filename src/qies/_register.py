"""Makes the Auto classes of transformers know QIES as soon as both are imported, in either order.

`import qies` itself stays light: nothing of transformers or torch is imported until the user does so.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType


def _configuration(module: ModuleType) -> None:
    from qies.model.configuration import QiesConfig

    module.AutoConfig.register("qies", QiesConfig, exist_ok=True)


def _models(module: ModuleType) -> None:
    layers = sys.modules.get("transformers.modeling_layers")
    half = layers is not None and not hasattr(layers, "GradientCheckpointingLayer")
    # Our model needs these layers whole; they import the Auto classes on their way, and then this is called again.
    # And if our model is what is being imported, it registers itself.
    if not half and "qies.model.modeling" not in sys.modules:
        importlib.import_module("qies.model.modeling")


_AFTER = {
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.modeling_layers": _models,
}


class _Watch(importlib.abc.MetaPathFinder):
    """Lets an import of the named module pass, and registers once it has run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _AFTER[fullname](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_with_transformers() -> None:
    """Register now what is imported already, and the rest when it is."""
    for name, register in _AFTER.items():
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Watch(name))
