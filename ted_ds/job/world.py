"""The process group and what a rank does with it: collectives, work on rank 0 only, logging on rank 0."""

from __future__ import annotations

import logging
import os
import random
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from transformers.utils import logging as transformers_logging

from ted_ds.batch import on_device
from ted_ds.errors import RankLost, TedError
from ted_ds.job.build_lock import build_under_a_lock
from ted_ds.job.lost_ranks import RankWatch
from ted_ds.job.slurm import slurm_environment
from ted_ds.job.stop import StopRequest

T = TypeVar("T")

logger = logging.getLogger("ted_ds")

TIMEOUT = timedelta(minutes=30)
"""Of collectives, if no recipe sets another one. It is DeepSpeed's default."""


@dataclass(frozen=True)
class World:
    """This process among all ranks: its rank, their number, its device.

    host: a gloo group of all ranks with a time-out of days: the others may wait for hours while rank 0 prepares a large
    corpus. control: a gloo group with the time-out of training; None for a single rank.
    stop: the request to end that this rank got from a signal or the clock. watch: None for a single rank.
    """

    rank: int
    size: int
    device: torch.device
    host: torch.distributed.ProcessGroup
    control: torch.distributed.ProcessGroup | None
    stop: StopRequest
    watch: RankWatch | None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, on every rank; a collective."""
        total = self._own_copy(values)
        torch.distributed.all_reduce(total)
        return total

    def min(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise minimum over all ranks, on every rank; a collective."""
        least = self._own_copy(values)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
        return least

    def _own_copy(self, values: torch.Tensor) -> torch.Tensor:
        moved = on_device(values, self.device)
        return moved.clone() if moved is values else moved

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The `values` [n, ..] of every rank (n is the same), concatenated in order of ranks; a collective."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def gather_objects(self, value: T) -> list[T]:
        """The `value` (small, picklable) of every rank, in order; a collective."""
        parts = [value] * self.size
        torch.distributed.all_gather_object(parts, value, group=self.host)
        return parts

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0; its result (small, picklable) or its error is that of every rank; a collective.

        An OSError (a full disk, no permission) becomes a TedError. Any other error is a bug: it keeps its trace on
        rank 0, and ends the other ranks too.
        """
        result: T | None = None
        fault: TedError | None = None
        bug: Exception | None = None
        if self.is_main:
            try:
                result = work()
            except TedError as error:
                fault = error
            except OSError as error:
                fault = TedError(f"{error}: make room, or see to the permissions, and start again")
            except Exception as error:
                bug, fault = error, TedError(f"rank 0 failed: {type(error).__name__}: {error}")
        outcome = [result, fault]
        torch.distributed.broadcast_object_list(outcome, src=0, group=self.host)
        result, fault = cast(tuple[T, TedError | None], outcome)
        if bug is not None:
            raise bug
        if fault is not None:
            fault.said_by_main = not self.is_main
            raise fault
        return result

    def barrier(self) -> None:
        """Waits for every rank; a collective."""
        torch.distributed.barrier(group=self.host)


def init_world(timeout: timedelta = TIMEOUT, stop: StopRequest | None = None) -> World:
    """Joins the process group that the launcher or SLURM described; without either makes a group of one rank.

    timeout: how long a collective waits for the other ranks. stop: None: nothing can ask this run to end.
    DeepSpeed chooses the accelerator and its back end (NCCL on CUDA, gloo on CPU). The folder of the Python interpreter
    goes on PATH: DeepSpeed compiles an op at the first start and looks for ninja there.
    Raises RankLost if the ranks do not all come within `timeout`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.update(slurm_environment(os.environ))
    if "RANK" not in os.environ:
        # port 0: the system chooses a free one
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator.set_device(local_rank)
    backend = accelerator.communication_backend_name()
    _allow_open_files()
    build_under_a_lock()
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        watch = RankWatch(rank, size, timeout, *_master()) if size > 1 else None
    except torch.distributed.DistError as error:
        place, why = ":".join(map(str, _master())), str(error).splitlines()[0]
        if "EADDRINUSE" in why:
            raise RankLost(
                f"the port of {place} is in use, perhaps by another job on this machine: choose another "
                "(deepspeed --master_port N, or MASTER_PORT=N before bash launchers/...)"
            ) from error
        raise RankLost(
            f"the {os.environ['WORLD_SIZE']} ranks did not meet at {place} ({why}): see whether all of them were "
            "started, and see that node and port"
        ) from error
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # the ranks of a node share its cores, but each would start as many threads as there are cores
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    _quiet(rank)
    stop = stop or StopRequest()
    with _named(watch, stop):  # making a group waits for all ranks, as long as the group's time-out
        host = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        control = torch.distributed.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        # for ZeRO's collectives: the group that DeepSpeed would make has the back end's default time-out
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)
    return World(rank, size, device, host, control, stop, watch)


def _allow_open_files() -> None:
    """Raises the limit to the hard one: in each gloo group a rank has a socket to each other rank."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _master() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def shut_down(world: World) -> None:
    """Leaves the process group, all ranks together: otherwise those that are still there would log errors."""
    world.stop.leave()
    torch.distributed.barrier()
    if world.watch is not None:
        world.watch.close()
    torch.distributed.destroy_process_group()


def lost_ranks_named(world: World) -> AbstractContextManager[None]:
    """A context: if another rank caused an error in it, names that rank and ends the process; else raises the error.

    It leaves the process group first: at exit, the group's threads may abort the interpreter and change its exit code.
    """
    return _named(world.watch, world.stop)


@contextmanager
def _named(watch: RankWatch | None, stop: StopRequest) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        stop.leave()
        if watch is not None:
            watch.failed(error)
        if not torch.cuda.is_available():  # NCCL would wait for other ranks that have gone; see `cli.common.guarded`
            torch.distributed.destroy_process_group()
        raise


def seed_everything(seed: int) -> None:
    """Seeds every rank alike: new parameters must be equal on all ranks."""
    random.seed(seed)
    torch.manual_seed(seed)


def _quiet(rank: int) -> None:
    """Logging on rank 0 only, without DeepSpeed's progress and torch's warnings about DeepSpeed's collectives."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[ted_ds] %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
