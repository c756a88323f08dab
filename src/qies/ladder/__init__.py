"""Many runs: planned, executed side by side in processes of their own, watched, and resumed after a kill."""

from qies.ladder.controller import Slot, cores, execute, finished, run_folder
from qies.ladder.status import status

__all__ = ["Slot", "cores", "execute", "finished", "run_folder", "status"]
