"""Ladders: plan, execute, monitor and resume many runs."""

from qies.ladder.controller import Slot, check_batches, check_runs, cores, devices, execute, finished, run_folder
from qies.ladder.jobs import submit
from qies.ladder.status import OVER, status

__all__ = [
    "OVER", "Slot", "check_batches", "check_runs", "cores", "devices", "execute", "finished", "run_folder", "status",
    "submit",
]  # fmt: skip
