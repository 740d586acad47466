"""Ranks, reductions and rank-0 logging: the only owner of the process group."""

from __future__ import annotations

import logging
import os
import random
import resource
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets.utils import logging as datasets_logging
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
"""Of collectives, where no recipe says otherwise: DeepSpeed's own."""


@dataclass(frozen=True)
class World:
    """This process among all: its rank, the number of ranks, its device.

    host: a gloo group of all ranks that waits for days: preparing a large corpus on rank 0 takes hours,
    where a collective of the training must fail within minutes.
    control: another one, that waits no longer than the training's; None where there is one rank.
    stop: what this rank was asked by a signal or the clock.
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
        """True on the one rank that writes files and talks."""
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

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's `values` ([n, ..], as many on each), one after another in one tensor; a collective."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's `value` (small, picklable), in order; a collective."""
        parts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(parts, value, group=self.host)
        return parts

    def _own_copy(self, values: torch.Tensor) -> torch.Tensor:
        moved = on_device(values, self.device)
        return moved.clone() if moved is values else moved

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0's result (small, picklable) of `work` on every rank, or its error; a collective.

        An OSError (a full disk, no permission) becomes a TedError. Any other error is a bug: it keeps its
        trace on rank 0, and ends the other ranks too.
        """
        outcome: list[Any] = [None, None]
        bug: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = work()
            except TedError as error:
                outcome[1] = error
            except OSError as error:
                outcome[1] = TedError(f"{error}: make room, or see to the permissions, and start again")
            except Exception as error:
                bug, outcome[1] = error, TedError(f"rank 0 failed: {type(error).__name__}: {error}")
        torch.distributed.broadcast_object_list(outcome, src=0, group=self.host)
        if bug is not None:
            raise bug
        if outcome[1] is not None:
            outcome[1].said_by_main = not self.is_main
            raise outcome[1]
        return outcome[0]

    def barrier(self) -> None:
        """Waits for every rank; a collective."""
        torch.distributed.barrier(group=self.host)


def init_world(timeout: timedelta = TIMEOUT, stop: StopRequest | None = None) -> World:
    """Joins the process group that the launcher or SLURM described, or makes a group of one without them.

    timeout: how long a collective waits for the other ranks. stop: None: nothing asks this run to end.
    The accelerator and its back end (NCCL on CUDA, gloo on CPU) are DeepSpeed's choice. The interpreter's
    own folder goes on PATH because DeepSpeed compiles an op at the first start and looks for ninja there.
    Raises RankLost where the ranks do not all come within `timeout`.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.update(slurm_environment(os.environ))
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
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
        raise RankLost(
            f"the {os.environ['WORLD_SIZE']} ranks did not meet at {place} ({why}): see whether all of them were "
            "started, and see that node and port"
        ) from error
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # the ranks of a node share its cores; every one of them would start a thread a core
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    _quiet(rank)
    stop = stop or StopRequest()
    with _named(watch, stop):  # a group's members wait for each other as long as it will
        host = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        control = torch.distributed.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        # ZeRO's collectives: the clone of the world that DeepSpeed would make waits as long as the back end's default
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)
    return World(rank, size, device, host, control, stop, watch)


def _allow_open_files() -> None:
    """Up to the hard limit: in each of gloo's groups every rank holds a socket to every other."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _master() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def shut_down(world: World) -> None:
    """Leaves the process group; ranks that leave at different times would log errors otherwise."""
    world.stop.leave()
    torch.distributed.barrier()
    if world.watch is not None:
        world.watch.close()
    torch.distributed.destroy_process_group()


def lost_ranks_named(world: World) -> AbstractContextManager[None]:
    """Where an error is another rank's doing, names that rank and ends the process; else leaves without the others.

    At exit the threads of a process group that is still there may abort the interpreter, and its exit code is lost.
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
        if not torch.cuda.is_available():  # NCCL's waits for what others no longer send; see `cli.common.guarded`
            torch.distributed.destroy_process_group()
        raise


def seed_everything(seed: int) -> None:
    """The same seed on every rank: parameters that are created, not loaded, must be equal everywhere."""
    random.seed(seed)
    torch.manual_seed(seed)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet(rank: int) -> None:
    """Rank 0 speaks; DeepSpeed's progress, and torch's remarks on the collectives that it calls, do not."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    for library in (transformers_logging, datasets_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[ted_ds] %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
