"""The table: every fault, how often it was injected, how often what must hold held."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from faults.controllers import controllers
from faults.inputs import bad_inputs, cases
from faults.kills import EARLY, EARLY_TOLERANCE, SECONDS_TO_END, TOLERANCE, kills, lost_ranks, moves
from faults.lab import Lab, Outcome
from faults.steps import bad_batches
from faults.storage import damages, full_disks, hostile_folders
from qies.errors import unknown

EVERY = 1000  # more than the cases there are


@dataclass(frozen=True)
class Fault:
    """One row to be: `inject(lab, rng, count)` yields the outcome of each of `count` injections, or of every case."""

    name: str
    what: str
    must_hold: str
    inject: Callable[[Lab, random.Random, int], Iterator[Outcome]]
    full: int
    quick: int


FAULTS = (
    Fault("kill", "SIGKILL at random moments, 2 of 5 inside a save; 1 process and 2-process FSDP2 by turns",
          "resumed, weights, metrics and rows equal the undisturbed run's bit for bit; no step missing or twice",
          kills, 50, 5),
    Fault("rank", "one of two ranks killed, alone and below torchrun",
          f"the rest ends within {SECONDS_TO_END:.0f} s, non-zero, and says which", lost_ranks, 8, 2),
    Fault("damage", "each file of a checkpoint truncated, deleted, one bit flipped",
          "found, named, the checkpoint before it used, the end bit for bit the same", damages, EVERY, 3),
    Fault("disk", "disk full in the middle of a run's save",
          "one line, exit 1, checkpoints before it intact; with space again the end is bit for bit the same",
          full_disks, 8, 2),
    Fault("batch", "NaN, infinity, a spike put into a batch",
          "no tensor of model or optimizers moves; the step is recorded and counted", bad_batches, 12, 4),
    Fault("processes", "2 -> 1 -> 2 processes",
          f"same data order: every step within {EARLY_TOLERANCE} nats of one process up to step {EARLY}, the mean step "
          f"within {TOLERANCE} after", moves, 4, 1),
    Fault("hostile", "pickles, JSON bombs, path traversal, symlinks, folders that anyone may write",
          "nothing executed, nothing written outside; one line and exit 2, or passed over with the end the same",
          hostile_folders, EVERY, 4),
    Fault("input", "bad YAML, unknown key, tokenizer mismatch, token beyond the vocabulary, no space at the start",
          "one line, exit 2, before training", bad_inputs, EVERY, 4),
    Fault("controllers", "two controllers on one ladder, one killed (but in the first)",
          "each run done exactly once and as it is alone, bit for bit", controllers, 4, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What came of one fault."""

    name: str
    what: str
    must_hold: str
    injections: int
    held: int
    seconds: float
    outcomes: tuple[Outcome, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def chosen(names: Sequence[str]) -> list[Fault]:
    """The faults of these names, or all. Raises UserError for one that is none."""
    known = {f.name: f for f in FAULTS}
    for name in names:
        if name not in known:
            raise unknown("fault", name, known)
    return [known[name] for name in names] or list(FAULTS)


def run(
    faults: Sequence[Fault], seed: int, *, quick: bool = False, tell: Callable[[Fault, Outcome], None] | None = None
) -> list[Row]:
    """Inject `faults` at moments drawn from `seed`. The folder of runs stays where something did not hold."""
    root = Path(tempfile.mkdtemp(prefix="qies-faults-"))
    lab, rows = Lab(root), []
    for fault in faults:
        started, outcomes = time.monotonic(), []
        for outcome in fault.inject(lab, random.Random(f"{seed} {fault.name}"), fault.quick if quick else fault.full):
            outcomes.append(outcome)
            if tell:
                tell(fault, outcome)
        held = sum(not o.wrong for o in outcomes)
        seconds = round(time.monotonic() - started, 1)
        rows.append(Row(fault.name, fault.what, fault.must_hold, len(outcomes), held, seconds, tuple(outcomes)))
    if all(row.held == row.injections for row in rows):
        shutil.rmtree(root)
    return rows


def total(fault: Fault, quick: bool) -> int | None:
    """How many injections there will be, None where that is found out on the way."""
    count = fault.quick if quick else fault.full
    return count if count < EVERY else len(cases()) if fault.name == "input" else None


def joined(path: Path | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those of other faults that the JSON at `path` has, in the order of the table."""
    before = json.loads(path.read_text())["faults"] if path is not None and path.is_file() else []
    known = {row["name"]: row for row in [*before, *rows]}
    return [known[f.name] for f in FAULTS if f.name in known]


def table(rows: Sequence[Row], seed: int) -> Table:
    out = Table(title=f"faults, moments drawn from seed {seed}", box=box.SIMPLE_HEAD)
    out.add_column("fault")
    for column in ("injected", "held"):
        out.add_column(column, justify="right")
    out.add_column("must hold")
    out.add_column("s", justify="right")
    for row in rows:
        out.add_row(row.what, str(row.injections), str(row.held), row.must_hold, f"{row.seconds:.0f}")
    return out


def page(result: dict[str, Any]) -> str:
    """The result of `make faults` as the Markdown of docs/faults.md."""
    cells = [(r["what"], r["injections"], r["held"], r["must_hold"], f"{r['seconds']:.0f}") for r in result["faults"]]
    lines = ["| fault | injected | held | must hold | s |", "|---|---:|---:|---|---:|"]
    lines += [f"| {' | '.join(map(str, c))} |" for c in cells]
    seeds = ", ".join(map(str, sorted({r["seed"] for r in result["faults"]})))
    text = "\n\n".join([
        "# Faults",
        "Made by `make faults`; results/reference/bench/faults.json has "
        f"every injection and the commit of each row. {result['environment']['cores']} cores, "
        f"{result['environment']['machine']}, moments drawn from seed {seeds}.",
        "\n".join(lines),
        "Runs are of 50k parameters and 40 steps with a checkpoint every 4, real processes of `qies train` (forked "
        "from a parent that has imported torch; some fresh interpreters), of `torchrun` and of `qies ladder run`. Two "
        "processes are FSDP2 by gloo. A kill counts as inside a save if it leaves the half-written folder behind.",
        "**Not run:** GPUs, several machines, loss of power.",
    ])  # fmt: skip
    wrong = [f"- {r['what']}: {o['what']}: {o['wrong']}" for r in result["faults"] for o in r["outcomes"] if o["wrong"]]
    return "\n\n".join([text, *(["What did not hold:\n\n" + "\n".join(wrong)] if wrong else [])]) + "\n"
