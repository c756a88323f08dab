"""Plugins: modules from outside the package that register mixers and arms when they are imported.

A configuration names them (`plugins: [module]`), and so does the command line (`--plugin module`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

from qies.errors import UserError

# Verbs whose configuration, and so the run record, names the plugins.
RECORDED = (["study"], ["train"], ["ladder", "plan"], ["ladder", "run"])
_LOADED: dict[str, None] = {}


def load(modules: Iterable[str]) -> None:
    """Import each module, from the working directory too. Raises UserError, in one line, where one cannot be imported.

    A module that is imported already is left as it is.
    """
    for name in modules:
        if name in _LOADED:
            continue
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(
                f"plugins names {name!r}, which is no module; write it as in an import, such as package.module."
            )
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise UserError(f"The plugin {name} needs the module {error.name}, which is not installed.") from error
            raise UserError(
                f"No plugin module '{name}'. Install it, or run the command in the folder that holds "
                f"{name.partition('.')[0]}."
            ) from None
        except UserError as error:
            raise UserError(f"The plugin {name} cannot be used: {error}") from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"The plugin {name} cannot be imported ({reason}); correct it.") from error
        _LOADED[name] = None


def import_module(name: str) -> ModuleType:
    """`importlib.import_module`, from the working directory too."""
    if not {"", os.getcwd()} & set(sys.path):  # a console script has its own folder there instead
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def loaded() -> tuple[str, ...]:
    """The plugins of this process, for processes that it starts."""
    return tuple(_LOADED)


def take_option(args: Sequence[str]) -> list[str]:
    """Import the modules of `--plugin MODULE` in a command line's arguments, and return the arguments without them.

    For the verbs in RECORDED an override of the configuration's `plugins` takes their place. Raises UserError for an
    option without a module or a verb.
    """
    rest: list[str] = []
    modules: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--plugin":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise UserError("--plugin needs a module, such as --plugin my_mixer.")
        modules.append(value)
    load(modules)
    if modules and not rest:
        raise UserError("--plugin needs a verb, such as qies train --plugin my_mixer.")
    recorded = rest[:1] in RECORDED or rest[:2] in RECORDED
    return [*rest, f"plugins=[{','.join(modules)}]"] if modules and recorded else rest
