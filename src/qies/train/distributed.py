"""Single-process and multi-process runs: FSDP2 over the processes started by torchrun.

Each process takes its slice of the same global batch, so the data of a step do not depend on the number of processes.
Only rank 0 writes records.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qies import storage
from qies.config import TrainConfig
from qies.errors import RANK_ENDED, Stopped, UserError
from qies.model import QiesForCausalLM
from qies.train.sharded_init import fill, weights_on_meta

T = TypeVar("T")
# Timeout of collectives: ranks wait while rank 0 builds data or verifies a checkpoint. `_PeerWatch` detects dead
# processes much earlier.
TIMEOUT = timedelta(hours=2)
POLL_SECONDS = 0.5
START_SECONDS = 45.0  # for the rendezvous, without torchrun
GRACE_SECONDS = 5.0  # for the main thread to exit after a process was lost
RANKS = ".ranks"


@dataclass(frozen=True)
class Group:
    """The processes of one run, from the view of this process. With one process, every method is the identity."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def rows(self, batch: int) -> slice:
        """This process's slice of `batch` sequences, a multiple of the number of processes (see `check_batch`)."""
        each = batch // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, values: list[float]) -> Tensor:
        """The values of all processes, float64 `[size, len(values)]`."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size == 1:
            return own[None]
        out = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(out, own)
        return torch.stack(out).cpu()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on all ranks. A UserError or Stopped is raised on all ranks."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = work()
            except (UserError, Stopped) as e:
                answer[1] = e
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def shard(self, build: Callable[[], QiesForCausalLM]) -> QiesForCausalLM:
        """Build the model; with several processes, shard it with FSDP2. The initial weights are the same.

        Every block, and the rest of the model, is sharded: parameters, gradients and optimizer state. On GPUs,
        parameters are communicated and used in bf16 and gradients are reduced in fp32; on CPUs only the run's autocast
        applies.
        """
        if self.size == 1:
            return build().to(self.device)
        with weights_on_meta():
            model = build()
        mesh = init_device_mesh(self.device.type, (self.size,))
        cuda = self.device.type == "cuda"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cuda else MixedPrecisionPolicy()
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        fill(model)
        return model

    def reduce_gradients(self, model: Any, on: bool) -> None:
        """Switch the reduction of gradients in the next backward pass; only the last micro-batch needs it."""
        if self.size > 1:
            model.set_requires_gradient_sync(on)

    def whole_state(self, model: QiesForCausalLM) -> dict[str, Any]:
        """The tensors of the whole model on rank 0; an empty dictionary on the other ranks."""
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@contextmanager
def start(folder: Path) -> Iterator[Group]:
    """Join the group described by torchrun's environment variables: gloo on CPUs, nccl on GPUs.

    Without torchrun the group is this process. Raises UserError as `rank_and_size` does, and Stopped with the rank if
    another process of the group has died.
    """
    rank, size = rank_and_size()
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", _integer("LOCAL_RANK", 0, 0, torch.cuda.device_count())) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        yield Group(device=device)
        return
    watch = _PeerWatch(folder / RANKS, rank, size)
    try:
        with watch.meeting():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
            dist.barrier()
        watch.thread.start()
        yield Group(rank, size, device)
        dist.barrier()
    except (UserError, Stopped):
        raise
    except Exception as e:  # a collective that failed because a peer died
        if lost := watch.lost(GRACE_SECONDS):
            raise Stopped(lost) from e
        raise
    finally:
        watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes, from torchrun's environment variables
    (https://docs.pytorch.org/docs/stable/elastic/run.html); (0, 1) if they are not set.

    Raises UserError if they are inconsistent.
    """
    size = _integer("WORLD_SIZE", 1, 1)
    if "WORLD_SIZE" not in os.environ and "RANK" in os.environ:
        raise UserError(f"RANK is set, but WORLD_SIZE is not; {_START}.")
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"WORLD_SIZE is {size}, but {name} is not set; {_START}.")
        _integer("MASTER_PORT", 0, 0, 2**16)
    return _integer("RANK", 0, 0, size), size


def check_batch(settings: TrainConfig, size: int) -> None:
    """Raise UserError unless the batch divides into equal micro-batches on each of `size` processes."""
    if settings.batch_size % (size * settings.accumulate):
        raise UserError(
            f"train.batch_size is {settings.batch_size}; it must be a multiple of {size} processes x "
            f"{settings.accumulate} micro-batches (train.accumulate)."
        )


_START = "start the processes with torchrun, or unset the variable for a single process"


def _integer(name: str, default: int, least: int, below: int | None = None) -> int:
    """The environment variable as an integer of at least `least` and less than `below`."""
    text = os.environ.get(name, str(default))
    number = int(text) if re.fullmatch(r"\d{1,9}", text) else -1
    if number < least or (below is not None and number >= below):
        wanted = f"an integer from {least} to {below - 1}" if below is not None else f"an integer of at least {least}"
        raise UserError(f"The environment variable {name} is '{text}'; it must be {wanted}; {_START}.")
    return number


class _PeerWatch:
    """Detects dead processes of the group.

    Each process holds a lock on its own file. The operating system releases it when the process ends for any reason;
    the other processes try the lock twice a second. With several hosts, the run directory must be on a file system with
    locks across hosts.
    """

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        storage.make_writable_folder(folder)
        self.locks, self.rank = [storage.file_lock(folder / str(r)) for r in range(size)], rank
        self.locks[rank].acquire()  # waits until a process of an earlier attempt has exited
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Limit the time of the rendezvous: a process that died before it cannot be distinguished from a slow one.

        torchrun detects such processes itself and stops the others.
        """
        timer = threading.Timer(START_SECONDS, self._give_up)
        timer.daemon = True
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def lost(self, seconds: float = 0.0) -> str | None:
        """Wait up to `seconds` for a process to be lost. Returns a message with the ranks, or None."""
        end = time.monotonic() + seconds
        while True:
            gone = [r for r, lock in enumerate(self.locks) if r != self.rank and _is_free(lock)]
            if gone:
                which = ", ".join(map(str, gone))
                return (
                    f"rank {which} of {len(self.locks)} {RANK_ENDED}, so rank {self.rank} stops; "
                    "run the same command again to resume."
                )
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)

    def close(self) -> None:
        self.closing.set()
        self.locks[self.rank].release()

    def _watch(self) -> None:
        while not self.closing.wait(POLL_SECONDS):
            if self.lost() and not self.closing.wait(GRACE_SECONDS):
                self._give_up()

    def _give_up(self) -> None:
        """Exit: the main thread is blocked in a collective that will not complete."""
        lost = self.lost() or f"another of {len(self.locks)} ranks does not answer; run the same command again."
        print(f"qies: {lost}", file=sys.stderr, flush=True)
        os._exit(1)


def _is_free(lock: FileLock) -> bool:
    """Whether no process holds the lock. This acquires it briefly, so a concurrent call may return False."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    lock.release()
    return True
