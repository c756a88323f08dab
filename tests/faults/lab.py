"""Where faults are injected: a small corpus, runs of a second that are real processes, and how each should end."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from faults import victim
from qies import config as configs
from qies import records
from qies.config import DataConfig, RunConfig, TrainConfig
from qies.data.builder.pipeline import build_shards
from qies.data.locate import locate
from qies.train.run_directory import CHECKPOINTS

TESTS = Path(__file__).parents[1]  # the fork server imports this package from there
SETTINGS = TrainConfig(
    seq_len=32, batch_size=4, eval_tokens=512, save_every=4, warmup=0.1, precision="fp32", muon_precision="fp32"
)
STEPS = 40
PATIENCE = 180.0  # seconds for a run that takes one or two


@dataclass(frozen=True)
class Outcome:
    """One injection: what was done, and what did not hold ("" if everything did)."""

    what: str
    wrong: str = ""


def write_corpus(folder: Path) -> None:
    """Forty small documents with enough structure to be learned."""
    rng = random.Random(0)
    names = ["Ada", "Bell", "Curie", "Dirac", "Euler"]
    verbs = ["measured", "entangled", "rotated", "forgot", "wrote"]
    things = ["the state", "a distant pair", "the phase", "an old letter", "the long sequence"]
    for i in range(40):
        lines = [f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)} {rng.randint(0, 99)} times."
                 for _ in range(40)]  # fmt: skip
        (folder / f"doc{i:02d}.txt").write_text(f"Document {i}.\n\n" + " ".join(lines) + "\n")


class Launch:
    """One command in one process, or in `size` processes with torchrun's environment but without its agent, so that
    one may be killed and what the others do is their own doing. It starts at once."""

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        *,
        module: str = "qies",
        size: int = 1,
        fresh: bool = False,
        before: Callable[[], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([victim.__name__])
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if str(TESTS) not in paths:
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), *paths]))
        before_all = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C as it imports is ours to tell
        ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before_all)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        self.logs = [log.with_name(f"{log.name}-{rank}") for rank in range(size)]
        self.all: list[Any] = []
        for rank in range(size):
            many = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {"OMP_NUM_THREADS": "1", **(many if size > 1 else {})}
            told = (["-m", module, *words], env, self.logs[rank], fresh, before)
            process = context.Process(target=victim.main, args=told, daemon=True)
            process.start()
            self.all.append(process)

    @property
    def running(self) -> bool:
        return all(p.exitcode is None for p in self.all)

    def until(self, seen: Callable[[], bool]) -> Launch:
        """Wait until `seen()`, or until a process has ended."""
        end = time.monotonic() + PATIENCE
        while not seen() and self.running:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"nothing happened in {PATIENCE:.0f} s; see {self.logs[0]}.err")
            time.sleep(0.0005)
        return self

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to the processes of these ranks (default: all) that still run."""
        for rank in range(len(self.all)) if ranks is None else ranks:
            if self.all[rank].exitcode is None:
                os.kill(self.all[rank].pid, number)

    def codes(self, seconds: float = PATIENCE) -> list[int | None]:
        """Exit codes, -n after signal n; None for a process that had to be killed after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.all:
            process.join(max(0.0, end - time.monotonic()))
        found = [p.exitcode for p in self.all]
        for process in self.all:
            if process.exitcode is None:
                process.kill()
                process.join()
        return found

    @property
    def errors(self) -> list[str]:
        """What each process wrote to stderr."""
        return [log.with_suffix(".err").read_text(errors="replace") for log in self.logs]


class Lab:
    """Runs below `root`, all of one configuration, and the undisturbed run that each must end as."""

    def __init__(self, root: Path, data: DataConfig | None = None, steps: int = STEPS) -> None:
        self.root, self.steps = root, steps
        self.numbers = itertools.count()
        self.known: dict[tuple[str, int], Path] = {}
        root.mkdir(parents=True, exist_ok=True)
        self.given = data

    @cached_property
    def data(self) -> DataConfig:
        """A folder of shards of the small corpus."""
        if self.given is not None:
            return locate(RunConfig(data=self.given)).data
        texts = self.root / "texts"
        texts.mkdir()
        write_corpus(texts)
        data = DataConfig(source=str(texts), vocab_size=400, val_fraction=0.2)
        build_shards(data, self.root / "shards")
        return locate(RunConfig(), str(self.root / "shards")).data

    @cached_property
    def config(self) -> RunConfig:
        tokens = self.steps * SETTINGS.seq_len * SETTINGS.batch_size
        return RunConfig(arm="qies", size="50k", tokens=tokens, data=self.data, train=SETTINGS)

    def folder(self) -> Path:
        """A name below `root` that nothing has yet."""
        return self.root / f"{next(self.numbers):04d}"

    def train(self, out: Path, *words: str, **how: Any) -> Launch:
        """`qies train` of the configuration into `out`, with more `words`."""
        path = self.root / "run.yaml"
        if not path.exists():
            configs.save(self.config, path)
        return self.start("train", "--config", str(path), "--out", str(out), "--json", *words, **how)

    def start(self, *words: str, **how: Any) -> Launch:
        return Launch(words, self.root / f"log-{next(self.numbers):04d}", **how)

    def undisturbed(self, size: int = 1) -> Path:
        """The folder of a run in `size` processes that nothing happened to."""
        return self._once("undisturbed", size, lambda out: self.train(out, size=size).codes() == [0] * size)

    def interrupted(self, size: int = 1) -> Path:
        """The folder of a run that SIGTERM stopped half-way, with the two newest checkpoints in it; copy it."""

        def make(out: Path) -> bool:
            launch = self.train(out, size=size)
            launch.until(lambda: rows_written(out) > self.steps // 2).signal(signal.SIGTERM)
            return launch.codes() == [143] * size

        return self._once("interrupted", size, make)

    def copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.folder(), symlinks=True))

    def _once(self, name: str, size: int, make: Callable[[Path], bool]) -> Path:
        if (name, size) not in self.known:
            out = self.folder()
            if not make(out):
                raise RuntimeError(f"the {name} run itself failed; see {self.root}")
            self.known[name, size] = out
        return self.known[name, size]

    def resumed(self, out: Path, size: int = 1, fresh: bool = False) -> str:
        """Run the same command again; what of the end is not the undisturbed run's, bit for bit, or ""."""
        launch = self.train(out, size=size, fresh=fresh)
        if (codes := launch.codes()) != [0] * size:
            return f"resuming ended with {codes}: {' '.join(launch.errors[0].split())[-300:]}"
        return differs(out, self.undisturbed(size), self.steps)


def rows_written(out: Path) -> int:
    """Whole rows of metrics.jsonl."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def differs(out: Path, reference: Path, steps: int) -> str:
    """What of the run in `out` is not that of `reference` (rows but for their times, metrics, weights), or ""."""
    record, expected = records.read(out), records.read(reference)
    if record is None or expected is None or record.status != "done":
        return f"its status is {record and record.status}"
    ours, theirs = ([{**row, "seconds": 0} for row in records.steps(f)] for f in (out, reference))
    if [row["step"] for row in ours] != list(range(steps)):
        return f"a step is missing or there twice: {[row['step'] for row in ours]}"
    if ours != theirs:
        first = next(a["step"] for a, b in zip(ours, theirs, strict=True) if a != b)
        return f"metrics differ from step {first}"
    if record.metrics != expected.metrics:
        return "the held-out metrics differ"
    name = "model/model.safetensors"
    if hashlib.sha256((out / name).read_bytes()).digest() != hashlib.sha256((reference / name).read_bytes()).digest():
        return "the weights differ"
    return ""


def one_line(text: str) -> bool:
    """Whether a process said exactly one line."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == 1 and lines[0].startswith("qies: ")


def saving(out: Path) -> set[str]:
    """Names of the checkpoints that are being written, or that a kill left half-written."""
    folder = out / CHECKPOINTS
    return {name for name in os.listdir(folder) if name.endswith(".partial")} if folder.is_dir() else set()
