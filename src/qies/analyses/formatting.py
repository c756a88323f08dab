"""Formatting of numbers and records, one function per kind of value."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from qies.plotting import axes

NONE = "n/a"


def number(value: Any) -> float | None:
    """A finite number as float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        return None
    return None if math.isnan(value) else float(value)


def count(value: Any) -> str:
    """12,345."""
    n = number(value)
    return NONE if n is None else f"{n:,.0f}"


def digits(value: Any, places: int = 4) -> str:
    n = number(value)
    return NONE if n is None else f"{n:.{places}f}"


def percent(value: Any) -> str:
    """0.0036 -> 0.36%, 0.79 -> 79%."""
    n = number(value)
    return NONE if n is None else f"{100 * n:.2g}%" if abs(n) < 0.1 else f"{100 * n:.0f}%"


def estimate(value: Any, lo: Any, hi: Any, places: str = ".3g", level: float | None = 0.95) -> str:
    """1.21 (95% CI 1.15 to 1.27); without "95% CI" for level None. An upper end of None is unbounded."""
    n, low, high = number(value), number(lo), number(hi)
    if n is None or low is None:
        return NONE if n is None else fixed(n, places)
    ci = "" if level is None else f"{100 * level:g}% CI "
    return f"{fixed(n, places)} ({ci}{fixed(low, places)} to {'unbounded' if high is None else fixed(high, places)})"


def fixed(value: float, places: str = "#.3g") -> str:
    """Three significant digits with trailing zeros, 1.20, or another format."""
    return f"{value:{places}}".rstrip(".")


def si(value: Any, significant: int = 3) -> str:
    """50k, 2.4M, 1.2G, 3.1T."""
    n = number(value)
    return NONE if n is None else axes.si(n, significant)


def mebibytes(value: Any) -> str:
    n = number(value)
    return NONE if n is None else f"{n / 2**20:,.0f}"


def law(fit: Mapping[str, Any]) -> str:
    """A stored fit as a formula."""
    p = fit["params"]
    floor = f"{p['E']:.3g} + " if "E" in p else ""
    return f"{floor}{p['A']:.4g} x^{-p['alpha']:.4f}"


def sentence(words: Any) -> str:
    text = str(words)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def show(value: Any) -> str:
    """A record's value: integers with separators, structures as JSON."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return NONE if value is None else str(value)
