"""A ladder on a cluster: each Slurm job is a controller, and controllers share the runs by leases.

The jobs are independent of each other and of a controller on the login node. A job takes runs until none is left; if it
is preempted or reaches its time limit, its runs save and submitit requeues it.
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

WARNING_SECONDS = 120  # between Slurm's warning and the end of a job, for a step and a checkpoint


@dataclass(frozen=True)
class Controller:
    """The work of one job. submitit pickles it, and calls `checkpoint` before it requeues the job."""

    configs: tuple[RunConfig, ...]
    root: Path
    data: Path
    how: dict[str, Any] = field(default_factory=dict)  # keywords of `execute`

    def __call__(self) -> list[str]:
        """Execute the runs that no other controller holds. Returns the status of every run."""
        return [r.status for r in execute(self.configs, self.root, self.data, **self.how)]

    def checkpoint(self) -> Any:
        """Requeue the same work; runs resume from their directories."""
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
    """Submit `jobs` controllers of at most `minutes` each, and return their ids.

    Args:
        logs: The folder of submitit's files.
        cluster: "slurm", or "local" for background processes of this host.
        sbatch: Further options of sbatch, "partition=gpu account=mine".
        how: Keyword arguments of `execute`. A job requests workers x gpus devices, with `threads` cores for each device
            (for each worker without GPUs).

    Raises UserError if submitit or Slurm is missing or rejects the job.
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
    for config in configs if retry_failed else ():  # once, not in each job
        lease.reset(run_folder(root, config), "submit", how["retries"])
    controller = Controller(tuple(configs), root.resolve(), data.resolve(), how)
    try:
        executor = submitit.AutoExecutor(logs, cluster=cluster, slurm_max_num_timeout=1000)
        executor.update_parameters(**wanted)
        return [executor.submit(controller).job_id for _ in range(jobs)]
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as e:
        raise UserError(f"{cluster} took no job: {' '.join(str(e).split())}") from None


def check(cluster: str, sbatch: str, jobs: int, gpus: int) -> dict[str, str]:
    """Validate the arguments of `submit` and return sbatch's options by name. Raises UserError."""
    require("submitit", "--submit", "slurm")
    extra = _options(sbatch)
    if extra and cluster != "slurm":
        raise UserError("--sbatch is for --submit slurm; omit it with --submit local.")
    if cluster == "local" and gpus and jobs > 1:  # submitit assigns the same devices to each
        raise UserError("--submit local gives every job the same GPUs; use --jobs 1 and more --workers.")
    return extra


def _options(text: str) -> dict[str, str]:
    """Parse options such as `partition=gpu time=1:00:00`."""
    found = {}
    for word in shlex.split(text):
        key, equals, value = word.removeprefix("--").partition("=")
        if not (key and equals and value):
            raise UserError(f"--sbatch needs KEY=VALUE words, such as 'partition=gpu account=mine'; got '{word}'.")
        found[key] = value
    return found
