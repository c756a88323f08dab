"""Locating and identifying the text of a run: its content identifies it, its path only tells where it was found."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TypeVar

from qies.config import DataConfig, RunConfig, StudyConfig, from_dict, is_path
from qies.data.builder.streams import open_stream
from qies.errors import UserError

R = TypeVar("R", RunConfig, StudyConfig)


def locate(config: R, source: str | None = None) -> R:
    """`config` with the corpus `source` (default: its own) located and identified.

    A path is made absolute, and `data.hash` identifies its content: for a folder of shards the hash of its manifest,
    whose other settings replace those of `config`, for other files their fingerprint. Names ("builtin", "registry",
    "hub:...") are kept. Raises UserError if there is no such corpus.
    """
    data = dataclasses.replace(config.data, source=config.data.source if source is None else source, hash="")
    return dataclasses.replace(config, data=_identified(data))


def _identified(data: DataConfig) -> DataConfig:
    kind, _, rest = data.source.partition(":")
    place, colon, name = rest.partition(":")
    if kind == "hub" and os.path.isdir(os.path.expanduser(place)):
        data = dataclasses.replace(data, source=f"hub:{_absolute(place)}{colon}{name}")
    elif not is_path(data.source):
        open_stream(data)
        return data
    else:
        data = dataclasses.replace(data, source=_absolute(data.source))
        manifest = Path(data.source) / "manifest.json"
        if manifest.is_file():
            try:
                built = json.loads(manifest.read_text(encoding="utf-8"))
                own = from_dict(DataConfig, built["config"], f"{manifest} config")
                return dataclasses.replace(own, source=data.source, hash=str(built["hash"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{manifest} is not a manifest of token shards; build the data with qies data build."
                ) from None
    return dataclasses.replace(data, hash=open_stream(data).fingerprint())


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
