"""Faults injected into real runs, and what must hold after each. `make faults` writes the table of docs/faults.md.

Every fault is one function that injects it once and says how it ended; the tests call the same functions.
"""

from faults.lab import Outcome
from faults.table import FAULTS, Fault, Row, chosen, joined, page, run, table, total

__all__ = ["FAULTS", "Fault", "Outcome", "Row", "chosen", "joined", "page", "run", "table", "total"]
