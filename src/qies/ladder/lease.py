"""Leases on runs: a chain of attempts, `attempts/0001.json`, 0002 and so on, the last of which is the lease.

Attempt n + 1 is created with link(2), which fails if the name exists: of any number of controllers that find attempt
n ended or abandoned, one gets the next. Only its creator writes an attempt's file, so no lease can be removed by
mistake, and the chain is also the log of what was tried and how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qies import records, storage

STALE_SECONDS = 60.0  # without a heartbeat, a lease of another host is abandoned
OVER = ("done", "diverged", "refused")  # outcomes after which there is nothing to try


@dataclass(frozen=True)
class Attempt:
    """One attempt as its file says; `facts` is empty where the file cannot be read."""

    path: Path
    facts: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.path.stem)

    @property
    def outcome(self) -> str | None:
        """done, diverged, failed, refused, interrupted, reset; None while it is open."""
        return self.facts.get("outcome")

    def abandoned(self, stale: float) -> bool:
        """Whether nobody holds this open attempt: its process is gone from this host, or its heartbeat is old.

        Ages are taken by the clock of the file system alone, so hosts with wrong clocks agree. A heartbeat that lies
        in the future by more than `stale` was written before that clock was set back; its owner would have renewed it.
        """
        if self.facts.get("host") == host() and not _alive(self.facts["pid"], self.facts["started"]):
            return True
        probe = self.path.with_name(f".clock.{os.getpid()}")
        probe.touch()
        age = probe.stat().st_mtime - self.path.stat().st_mtime
        return abs(age) > stale


def attempts(folder: Path) -> list[Attempt]:
    """Every attempt at the run in `folder`, oldest first."""
    out = []
    for path in sorted((folder / "attempts").glob("[0-9]*.json")):
        try:
            out.append(Attempt(path, json.loads(path.read_text())))
        except ValueError:
            out.append(Attempt(path, {}))
    return out


def failures(history: list[Attempt]) -> int:
    """Failed attempts since the last reset."""
    count = 0
    for attempt in history:
        count = 0 if attempt.outcome == "reset" else count + (attempt.outcome == "failed")
    return count


def exhausted(history: list[Attempt], retries: int) -> bool:
    """Whether the run may not be tried again: bad input, or `retries` failures after the first."""
    return bool(history) and (history[-1].outcome == "refused" or failures(history) > retries)


class Lease:
    """The open attempt `number` at the run in `folder`, held by this process."""

    def __init__(self, folder: Path, number: int, facts: dict[str, Any]) -> None:
        self.folder, self.number, self.facts = folder, number, facts
        self.path = folder / "attempts" / f"{number:04d}.json"
        self.log = self.path.with_suffix(".log")

    def beat(self) -> bool:
        """Renew the lease; False when another controller has taken the run over."""
        if (self.path.with_name(f"{self.number + 1:04d}.json")).exists():
            return False
        os.utime(self.path)
        return True

    def end(self, outcome: str, reason: str) -> None:
        """Close the attempt and record why it ended."""
        self.facts |= {"outcome": outcome, "reason": reason, "ended": time.time()}
        storage.write_json(self.path, self.facts)


def acquire(folder: Path, owner: str, *, stale: float = STALE_SECONDS, retries: int = 2) -> Lease | None:
    """The next attempt at the run in `folder`, or None when it is held, or not to be tried again."""
    history = attempts(folder)
    last = history[-1] if history else None
    record = records.read(folder)  # after the history: a run that ended in between is seen as finished here
    if record is not None and record.finished:
        return None
    if exhausted(history, retries) or (last and last.outcome is None and not last.abandoned(stale)):
        return None
    number = last.number + 1 if last else 1
    facts = {"owner": owner, "host": host(), "pid": os.getpid(), "started": _started(os.getpid()), "at": time.time()}
    if last and last.outcome is None:
        facts["took_over"] = f"attempt {last.number}, whose controller {last.facts.get('owner')} is gone"
    lease = Lease(folder, number, facts)
    return lease if storage.create(lease.path, json.dumps(facts)) else None


def reset(folder: Path, owner: str, retries: int) -> None:
    """Allow further attempts at a run that has no retries left."""
    history = attempts(folder)
    if exhausted(history, retries):
        path = folder / "attempts" / f"{history[-1].number + 1:04d}.json"
        storage.create(path, json.dumps({"owner": owner, "at": time.time(), "outcome": "reset"}))


@cache
def host() -> str:
    """This host, this boot and this process namespace: where a process id means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    known = [boot.read_text().strip() if boot.exists() else "", os.readlink(space) if space.exists() else ""]
    return "/".join([socket.gethostname(), *known])


def _started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot, which tells it from a later one of the same id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _alive(pid: int, started: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return started is None or _started(pid) == started
