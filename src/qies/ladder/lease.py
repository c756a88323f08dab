"""Leases on runs. A run has a sequence of attempts, `attempts/0001.json`, `0002.json`, ...; the last one is the lease.

Attempt n + 1 is created with link(2), which fails if the name exists, so only one of several controllers that find
attempt n ended or abandoned gets the next one. Only the creator of an attempt writes its file, so no lease can be
removed by mistake. The sequence is also the log of all attempts and their outcomes.
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

STALE_SECONDS = 60.0  # without a heartbeat, after which a lease of another host is abandoned
OVER = ("done", "diverged", "refused")  # outcomes after which there is no further attempt


@dataclass(frozen=True)
class Attempt:
    """One attempt, read from its file; `facts` is empty if the file cannot be read."""

    path: Path
    facts: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.path.stem)

    @property
    def outcome(self) -> str | None:
        """done, diverged, failed, refused, interrupted or reset; None while the attempt is open."""
        return self.facts.get("outcome")

    def abandoned(self, stale: float) -> bool:
        """Whether no controller holds this open attempt: its process has ended on this host, or its heartbeat is old.

        Ages are measured by the clock of the file system, so the clocks of hosts do not matter. A heartbeat more than
        `stale` in the future was written before that clock was set back; a live owner would have renewed it.
        """
        if self.facts.get("host") == host() and not _alive(self.facts["pid"], self.facts["started"]):
            return True
        probe = self.path.with_name(f".clock.{os.getpid()}")
        probe.touch()
        age = probe.stat().st_mtime - self.path.stat().st_mtime
        return abs(age) > stale


def attempts(folder: Path) -> list[Attempt]:
    """All attempts at the run in `folder`, oldest first."""
    out = []
    for path in sorted((folder / "attempts").glob("[0-9]*.json")):
        try:
            out.append(Attempt(path, json.loads(path.read_text())))
        except ValueError:
            out.append(Attempt(path, {}))
    return out


def failures(history: list[Attempt]) -> int:
    """Number of failed attempts since the last reset."""
    count = 0
    for attempt in history:
        count = 0 if attempt.outcome == "reset" else count + (attempt.outcome == "failed")
    return count


def exhausted(history: list[Attempt], retries: int) -> bool:
    """Whether the run has no retries left: bad input, or `retries` failures after the first."""
    return bool(history) and (history[-1].outcome == "refused" or failures(history) > retries)


class Lease:
    """The open attempt `number` at the run in `folder`, held by this process."""

    def __init__(self, folder: Path, number: int, facts: dict[str, Any]) -> None:
        self.folder, self.number, self.facts = folder, number, facts
        self.path = folder / "attempts" / f"{number:04d}.json"
        self.log = self.path.with_suffix(".log")

    def beat(self) -> bool:
        """Renew the lease. Returns False if another controller has taken over."""
        if (self.path.with_name(f"{self.number + 1:04d}.json")).exists():
            return False
        os.utime(self.path)
        return True

    def end(self, outcome: str, reason: str) -> None:
        """Close the attempt and record the outcome with its reason."""
        self.facts |= {"outcome": outcome, "reason": reason, "ended": time.time()}
        storage.write_json(self.path, self.facts)


def acquire(folder: Path, owner: str, *, stale: float = STALE_SECONDS, retries: int = 2) -> Lease | None:
    """Acquire the next attempt at the run in `folder`. Returns None if another holds it or no attempt is left."""
    history = attempts(folder)
    last = history[-1] if history else None
    record = records.read(folder)  # read after the history, so that a run that ended in between counts as finished
    if record is not None and record.finished:
        return None
    if exhausted(history, retries) or (last and last.outcome is None and not last.abandoned(stale)):
        return None
    number = last.number + 1 if last else 1
    facts = {"owner": owner, "host": host(), "pid": os.getpid(), "started": _started(os.getpid()), "at": time.time()}
    if last and last.outcome is None:
        facts["took_over"] = f"attempt {last.number} of controller {last.facts.get('owner')}, which has ended"
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
    """An identifier of this host, boot and process namespace, within which process ids are unique."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    known = [boot.read_text().strip() if boot.exists() else "", os.readlink(space) if space.exists() else ""]
    return "/".join([socket.gethostname(), *known])


def _started(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot; distinguishes it from a later one with the same id."""
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
