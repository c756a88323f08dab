"""Rows of a table as flat dictionaries, from any kind of file or from a folder of run records."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qies.errors import UserError
from qies.records import read

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
SEPARATORS = ";\t,"  # of equally many in the head, the first
SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # the first line that Excel writes and reads


def read_rows(path: Path) -> list[dict[str, Any]]:
    """One flat dictionary a row, nested names joined by dots. Raises UserError for an unreadable table."""
    if path.is_dir():
        found = [(p.parent, read(p.parent)) for p in sorted(path.glob("**/run.json"))]
        if not found:
            raise UserError(f"{path} has no run record (run.json); give a table or a directory of runs.")
        return [{**_flat(r.to_dict()), "name": str(folder.relative_to(path))} for folder, r in found if r is not None]
    if not path.is_file():
        raise UserError(f"no table at {path}; give a file or a directory of run records.")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UserError(f"{path} has an unknown suffix; give {', '.join(SUFFIXES)} or a directory of run records.")
    if kind == ".parquet":
        return _parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    if kind in (".csv", ".tsv"):
        return _separated(text, path)
    try:
        if kind != ".json":
            return [_flat(_object(json.loads(line), path)) for line in text.splitlines() if line.strip()]
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is not valid {kind[1:].upper()} ({e}).") from None
    if isinstance(value, dict) and isinstance(value.get("runs"), list):
        value = value["runs"]
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) != 1:
            raise UserError(f"{path}: the columns differ in length; give one value a run in each.")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{path}: give a list of runs, or one list a column.")
    return [_flat(_object(row, path)) for row in value]


def _separated(text: str, path: Path) -> list[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    named = SEPARATOR.fullmatch(lines[0].strip()) if lines else None
    if named:
        del lines[0]
    plain = [line for line in lines if not line.lstrip().startswith("#")]
    if not plain:
        return []

    def split(some: list[str], names: str) -> list[list[str]]:
        separator = named[1] if named else max(SEPARATORS, key=names.count)
        return list(csv.reader(some, delimiter=separator, skipinitialspace=True))

    above = lines.index(plain[0]) - 1
    if above >= 0 and any(_numeric(cell) for cell in re.split(f"[{SEPARATORS}]", plain[0])):
        names = lines[above].lstrip().removeprefix("#")
        if len(split([names], names)[0]) == len(split(plain[:1], names)[0]):
            plain = [names, *plain]
    head, *body = split(plain, plain[0])
    head = [h.strip() for h in head]
    if twice := [h for h in head if head.count(h) > 1 and h]:
        raise UserError(f"{path}: two columns are called '{twice[0]}'; rename one.")
    for i, row in enumerate(body):
        if len(row) != len(head):
            counts = f"row {i + 1} has {len(row)} cells and the head {len(head)}"
            raise UserError(f"{path}: {counts}; quote numbers with commas.")
    return [dict(zip(head, row, strict=True)) for row in body if any(cell.strip() for cell in row)]


def _numeric(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install pyarrow, or save the table as CSV.") from None
    try:
        return [_flat(row) for row in parquet.read_table(path).to_pylist()]
    except Exception as e:
        raise UserError(f"{path} is not a readable Parquet file ({type(e).__name__}).") from None


def _object(row: Any, path: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{path}: every run must be an object of names and values.")
    return row


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
