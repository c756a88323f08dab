"""Processes that die: at random moments, inside a save, one rank of two; and runs that change their number."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from faults.lab import Lab, Launch, Outcome, rows_written, saving
from qies import records

SECONDS_TO_END = 60.0  # for a rank whose peer is gone
# Between one process and two, fp32 sums in another order, which training amplifies; another batch is 0.05 nats apart.
# Every change of their number lies before step EARLY. Nats of every step up to there, and of the mean step after.
EARLY, EARLY_TOLERANCE, TOLERANCE = 20, 1e-4, 1e-2


def kills(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Half in one process, half in two; two of five inside a save; some in fresh interpreters."""
    for i in range(count):
        yield kill(lab, rng, size=1 + i % 2, inside=i % 5 in (0, 3), fresh=i % 10 == 2 or i == 5)


def kill(lab: Lab, rng: random.Random, *, size: int = 1, inside: bool = False, fresh: bool = False) -> Outcome:
    """SIGKILL at a random moment, then the same command again. In two processes one of them dies, or both."""
    for _ in range(50):  # a moment that the run was faster than, or that fell beside the save, does not count
        out, launch, what = lab.folder(), None, ""
        ranks = rng.choice([[0], [1], [0, 1]]) if size == 2 else [0]
        if inside:
            step = rng.randrange(0, lab.steps - lab.config.train.save_every, lab.config.train.save_every)
            delay = rng.uniform(0.0, 0.03)
        else:
            step = rng.randrange(-1, lab.steps)
            delay = rng.uniform(0.0, 0.5 if step in (-1, lab.steps - 1) else 0.03)  # longer: start and end
        launch = lab.train(out, size=size, fresh=fresh)
        launch.until(lambda out=out, step=step: rows_written(out) > step)  # type: ignore[misc]
        if inside:
            launch.until(lambda out=out: bool(saving(out)))  # type: ignore[misc]
        time.sleep(delay)
        launch.signal(signal.SIGKILL, ranks)
        codes = launch.codes(SECONDS_TO_END)
        hit = all(codes[r] == -signal.SIGKILL for r in ranks) and (saving(out) if inside else True)
        what = f"{delay * 1e3:.1f} ms after {'a save began past ' if inside else ''}step {step}, " + (
            f"rank {' and '.join(map(str, ranks))} of 2" if size == 2 else "1 process"
        )
        if None in codes:
            return Outcome(what, "the other rank did not end")
        if hit:
            wrong = lab.resumed(out, size, fresh)
            if not wrong:
                shutil.rmtree(out)
            return Outcome(what + (", fresh interpreters" if fresh else ""), wrong)
    raise RuntimeError("no save was slow enough to be killed in")


def lost_ranks(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Each rank in turn, by itself and below torchrun."""
    for i in range(count):
        yield lost_rank(lab, rng, i % 2, torchrun=i % 4 > 1)


def lost_rank(lab: Lab, rng: random.Random, lost: int, torchrun: bool = False) -> Outcome:
    """SIGKILL to one of two ranks: the other must end in time, fail, and name it."""
    out, step = lab.folder(), rng.randrange(1, lab.steps // 2)
    what = f"rank {lost} killed after step {step}" + (", below torchrun" if torchrun else "")
    if torchrun:
        lab.undisturbed()  # writes run.yaml
        words = ["--nproc-per-node", "2", "--standalone", "-m", "qies", "train", "--config", str(lab.root / "run.yaml")]
        log = lab.root / f"log-{out.name}"
        launch = Launch([*words, "--out", str(out)], log, module="torch.distributed.run", fresh=True)
    else:
        launch = lab.train(out, size=2)
    launch.until(lambda: rows_written(out) > step)
    if torchrun:
        os.kill(child_of_rank(launch.all[0].pid, lost), signal.SIGKILL)
    else:
        launch.signal(signal.SIGKILL, [lost])
    started = time.monotonic()
    codes = launch.codes(SECONDS_TO_END)
    what += f"; the rest ended after {time.monotonic() - started:.1f} s"
    said = launch.errors[0] if torchrun else launch.errors[1 - lost]
    named = f"rank      : {lost}" in said if torchrun else f"rank {lost} of 2 has ended" in said
    if (codes[0] if torchrun else codes[1 - lost]) != 1:
        return Outcome(what, f"the exit codes are {codes}")
    return Outcome(what, "" if named else f"the lost rank is not named: {said[-300:]}")


def moves(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    for _ in range(count):
        yield move(lab, rng)


def move(lab: Lab, rng: random.Random, sizes: Sequence[int] = (2, 1, 2)) -> Outcome:
    """A run that SIGTERM to one of its ranks stops at random steps and that goes on in another number of processes."""
    out = lab.folder()
    stops = sorted(rng.sample(range(2, EARLY - 2), len(sizes) - 1))
    for size, stop in zip(sizes, [*stops, lab.steps], strict=True):
        rows, launch, expected = rows_written(out), lab.train(out, size=size), 0
        if stop < lab.steps:
            after = max(stop, rows)  # a row of its own: before it, a signal ends a process that has nothing to save
            launch.until(lambda after=after: rows_written(out) > after)  # type: ignore[misc]
            launch.signal(signal.SIGTERM, [rng.randrange(size)])
            expected = 128 + signal.SIGTERM
        if (codes := launch.codes()) != [expected] * size:
            return Outcome(f"stopped at {stops}", f"{size} processes ended with {codes}: {launch.errors}")
    ours, theirs = records.steps(out), records.steps(lab.undisturbed())
    what = f"{' -> '.join(map(str, sizes))} processes, told to stop after steps {stops}"
    if [r["step"] for r in ours] != list(range(lab.steps)):
        return Outcome(what, "a step is missing or there twice")
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    early, late = max(apart[:EARLY]), fmean(apart[EARLY:])
    what += f": at most {early:.1e} nats apart in the first {EARLY} steps, on average {late:.1e} after"
    held = early < EARLY_TOLERANCE and late < TOLERANCE
    return Outcome(what, "" if held else "beyond the tolerance")


def child_of_rank(agent: int, rank: int) -> int:
    """The process id of a rank that torchrun's agent started."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise RuntimeError(f"torchrun has no rank {rank}")
