"""A ladder on a cluster: each Slurm job is one more controller, which shares the runs by their leases.

So the jobs need not know of each other, of a controller on the login node, or of how many there are: a job takes runs
until none is left, and one that is preempted or out of time lets its runs save, and is queued again by submitit.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qies.config import RunConfig
from qies.errors import UserError, require
from qies.ladder import lease
from qies.ladder.controller import execute, run_folder

WARNING_SECONDS = 120  # between Slurm's warning and the end of a job: what a step and a checkpoint may take


@dataclass(frozen=True)
class Controller:
    """The work of one job. submitit pickles it; `checkpoint` is what it calls before the job is queued again."""

    configs: tuple[RunConfig, ...]
    root: Path
    data: Path
    how: dict[str, Any] = field(default_factory=dict)  # keywords of `execute`

    def __call__(self) -> list[str]:
        """Run what nobody else runs; the status of every run."""
        return [r.status for r in execute(self.configs, self.root, self.data, **self.how)]

    def checkpoint(self) -> Any:
        """Nothing is carried over: runs resume from their folders."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    configs: Sequence[RunConfig],
    root: Path,
    data: Path,
    logs: Path,
    *,
    cluster: str,
    jobs: int,
    minutes: int,
    sbatch: str = "",
    retry_failed: bool = False,
    **how: Any,
) -> list[str]:
    """Start `jobs` controllers of at most `minutes` each, and return their ids; submitit's files go into `logs`.

    cluster: "slurm", or "local" for processes of this host that outlive the caller. sbatch: more of sbatch's own
    options, "partition=gpu account=mine". how: keywords of `execute`; a job asks for workers x gpus devices, and for
    `threads` processors for each, or for each worker. Raises UserError when submitit or Slurm is missing or refuses.
    """
    extra = check(cluster, sbatch, jobs, how["gpus"])
    import submitit

    wanted: dict[str, Any] = {
        "name": "qies-ladder",
        "timeout_min": minutes,
        "cpus_per_task": how["workers"] * max(1, how["gpus"]) * how["threads"],
        "slurm_signal_delay_s": WARNING_SECONDS,
        "slurm_additional_parameters": extra,
    }
    if how["gpus"]:
        wanted["gpus_per_node"] = how["workers"] * how["gpus"]
    for config in configs if retry_failed else ():  # once, not by each job
        lease.reset(run_folder(root, config), "submit", how["retries"])
    controller = Controller(tuple(configs), root.resolve(), data.resolve(), how)
    try:
        executor = submitit.AutoExecutor(logs, cluster=cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(**wanted)
        return [executor.submit(controller).job_id for _ in range(jobs)]
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as e:
        raise UserError(f"{cluster} took no job: {' '.join(str(e).split())}") from None


def check(cluster: str, sbatch: str, jobs: int, gpus: int) -> dict[str, str]:
    """sbatch's options by name. Raises UserError for what can be known to be missing or wrong before work is spent."""
    require("submitit", "--submit", "slurm")
    extra = _options(sbatch)
    if extra and cluster != "slurm":
        raise UserError("--sbatch holds options of Slurm; leave it out with --submit local.")
    if cluster == "local" and gpus and jobs > 1:  # submitit gives each of them the first ones
        raise UserError("--submit local gives every job the same GPUs; use --jobs 1 and more --workers.")
    return extra


def _options(text: str) -> dict[str, str]:
    """`partition=gpu time=1:00:00` as a dictionary."""
    found = {}
    for word in shlex.split(text):
        key, equals, value = word.removeprefix("--").partition("=")
        if not (key and equals and value):
            raise UserError(f"--sbatch wants KEY=VALUE words, such as 'partition=gpu account=mine'; got '{word}'.")
        found[key] = value
    return found
