"""YAML as configurations use it: the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), strictly.

PyYAML reads YAML 1.1, where 010 is 8, 21:20 is 1280, `no` is false and 1e-3 is text; and of a key that comes twice it
keeps the last value.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

TAG = "tag:yaml.org,2002:"
# Kind, how it is written, and the characters it can start with.
SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML declares it so)
    yaml_constructors: ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


def _boolean(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    if node.value.lower() not in ("true", "false"):
        raise ValueError(f"{node.value!r} is not true or false")
    return node.value.lower() == "true"


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _real(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(node.value).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _list(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in node.value]


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} in line {line} is not text")
        if key in out:
            raise ValueError(f"the key '{key}' in line {line} is a repeat; keep one of them")
        out[key] = loader.construct_object(value_node, deep=True)
    return out


for _kind, _pattern, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(_pattern + r"\Z"), _first)
_Loader.yaml_constructors.update(
    {
        TAG + "null": _Loader.construct_yaml_null,
        TAG + "bool": _boolean,
        TAG + "int": _integer,
        TAG + "float": _real,
        TAG + "str": _Loader.construct_yaml_str,
        TAG + "seq": _list,
        TAG + "map": _mapping,
        None: _Loader.construct_undefined,
    }
)


def loads(text: str) -> Any:
    """The value of one document: None, bool, int, float, str, lists, and dictionaries with text as keys.

    Raises ValueError, with a reason of one line: no valid YAML, another type, a repeated key, a value inside itself.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def dumps(value: Any) -> str:
    """A document that `loads`, and any reader of YAML 1.1, reads as `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
