"""Peak resident memory of this process."""

from __future__ import annotations

import ctypes
import platform
import re
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Return freed memory to the system and reset the peak (Linux only; elsewhere the peak is that of the process).

    Source: proc_pid_clear_refs(5): 5 resets the high-water mark of the resident set.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if CLEAR.exists():
        try:
            CLEAR.write_text("5")
        except OSError:  # not permitted in some containers
            return


def peak() -> int:
    """Peak resident memory in bytes, since the last `reset_peak` if the system supports it."""
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
