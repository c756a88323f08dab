"""Two controllers on one ladder, one of which may be killed: every run is done exactly once."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from collections.abc import Iterator

from faults.lab import Lab, Outcome, differs
from qies import config as configs
from qies import presets, records
from qies.config import StudyConfig
from qies.ladder import run_folder
from qies.ladder.lease import attempts

SEEDS = (0, 1, 2)


def controllers(lab: Lab, rng: random.Random, count: int) -> Iterator[Outcome]:
    """The first undisturbed, then each with a controller killed at a random moment."""
    study = _study(lab)
    for i in range(count):
        yield race(lab, rng, study, killed=i > 0)


def race(lab: Lab, rng: random.Random, study: StudyConfig, killed: bool) -> Outcome:
    """Two `qies ladder run` on one new folder. Each run of it ends as it does alone, by one attempt."""
    folder = lab.folder()
    path = folder.with_suffix(".yaml")
    configs.save(study, path)
    both = [lab.start("ladder", "run", str(path), "--out", str(folder), "--workers", "1", "--json") for _ in range(2)]
    what, planned = f"two controllers, {len(study.runs())} runs", study.runs()
    if killed:
        both[0].until(lambda: any(folder.glob("runs/*/metrics.jsonl")))
        delay = rng.uniform(0.0, 5.0)
        time.sleep(delay)
        victim = rng.randrange(2)
        both[victim].signal(signal.SIGKILL)
        what += f", one killed {delay:.1f} s after the first step"
    codes = [launch.codes()[0] for launch in both]
    wrong = "" if codes[1 - victim if killed else 0] == 0 else f"the controllers ended with {codes}"
    for config in planned:
        run = run_folder(folder / "runs", config)
        done = [a.number for a in attempts(run) if a.outcome == "done"]
        record = records.read(run)
        if killed and not done and attempts(run)[-1].outcome is None and record and record.status == "done":
            done = [attempts(run)[-1].number]  # it ended after its controller was killed
        if len(done) != 1:
            wrong = wrong or f"seed {config.seed}: attempts {done} say that they did the run"
        wrong = wrong or differs(run, _alone(lab, config), config.steps)
    tries = sum(len(attempts(run_folder(folder / "runs", c))) for c in planned)
    return Outcome(f"{what}: {tries} attempts", wrong)


def _study(lab: Lab) -> StudyConfig:
    model = presets.settings(lab.config.arm, lab.config.size, lab.data.vocab_size)
    budget = lab.config.tokens / presets.count_parameters(model)["non_embedding"]
    return StudyConfig(arms=("qies",), sizes=("50k",), seeds=SEEDS, tokens_per_parameter=budget, data=lab.data,
                       train=dataclasses.replace(lab.config.train, muon_precision="bf16"))  # fmt: skip


def _alone(lab: Lab, config: configs.RunConfig):
    """The folder of the same run, trained by itself."""
    path = lab.root / f"alone-{configs.content_hash(config)}"
    if not path.exists():
        configs.save(config, path.with_suffix(".yaml"))
        launch = lab.start("train", "--config", str(path.with_suffix(".yaml")), "--out", str(path), "--json")
        if launch.codes() != [0]:
            raise RuntimeError(f"the undisturbed run failed: {launch.errors}")
    return path
