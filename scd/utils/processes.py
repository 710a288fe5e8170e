"""Sharing the work of one command among the processes that were launched.

Processes meet in files: each writes its share below one folder, which all of them must see (on
several machines: a shared file system).
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import DistError, PrefixStore, Store, is_initialized
from torch.distributed.rendezvous import rendezvous

from scd.errors import ScdError, reason
from scd.utils.precision import has_bf16

# What a scheduler, a launcher, a user or a lost terminal sends to stop a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LONGEST_WAIT = timedelta(hours=12)  # for the slowest process
LONGEST_START = timedelta(minutes=5)  # of the last process after the first
TOLD_AFTER = 10  # seconds of waiting for it
# What every launcher sets, and what those of MPI do, which accelerate goes by on the CPU.
LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Variables of accelerate that say how a run is launched. Its others say how it is computed, which
# the options do here.
OF_LAUNCH = (
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    *("ACCELERATE_CPU_AFFINITY", "ACCELERATE_CONFIG"),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL"),
)
T = TypeVar("T")


def processes() -> PartialState:
    """This process among those of the launcher, or the only one.

    Raises:
        ScdError: see `join`.
    """
    state = join(LONGEST_WAIT)
    if state.num_processes > 1:
        _leave_at_exit()
    return state


def join(longest_wait: timedelta) -> PartialState:
    """Find the other processes of this launch; again, it is the state that there is.

    Args:
        longest_wait: for each other later on.

    Raises:
        ScdError: variables announce other processes, but not all that a launcher sets are there, or
            the others do not come within `LONGEST_START`.
    """
    take_accelerate_settings()
    cpu = not torch.cuda.is_available()
    if PartialState._shared_state or is_initialized():
        return PartialState(cpu=cpu)
    announced = _announced(cpu)
    if not announced:
        return PartialState(cpu=cpu, timeout=longest_wait)
    told = ", ".join(f"{name}={os.environ[name]}" for name in announced)
    advice = f"left over from another launch? then: unset {' '.join(announced)}"
    missing = [name for name in LAUNCH if not os.environ.get(name)]
    if missing:
        raise ScdError(
            f"{told}: announce a launch of several processes, but there is no "
            f"{', '.join(missing)}; {advice}"
        )
    note = f"note: waiting for the other processes ({told}); {advice}"
    timer = threading.Timer(TOLD_AFTER, print, [note], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        store, rank, size = _meet()
    except (DistError, RuntimeError, ValueError) as error:  # nobody there, or no numbers
        raise ScdError(f"{told}: no launch to join ({reason(error)}); {advice}") from error
    finally:
        timer.cancel()
    store.set_timeout(longest_wait)
    return PartialState(cpu=cpu, timeout=longest_wait, store=store, rank=rank, world_size=size)


def _meet() -> tuple[Store, int, int]:
    store, rank, size = next(rendezvous("env://", timeout=LONGEST_START))
    return PrefixStore("default_pg", store), rank, size


def _announced(cpu: bool) -> list[str]:
    """Name the variables by which accelerate would look for other processes."""
    sizes = ("WORLD_SIZE", *MPI_SIZES) if cpu else ()
    several = [name for name in sizes if os.environ.get(name, "1") not in ("", "0", "1")]
    if not several and os.environ.get("LOCAL_RANK", "-1") in ("", "-1"):
        return []
    names = [*LAUNCH, *(name for name in several if name not in LAUNCH)]
    return [name for name in names if os.environ.get(name)]


def take_accelerate_settings() -> dict[str, str]:
    """Take accelerate's variables that change how a run is computed out of the environment."""
    names = [
        name for name in os.environ if name.startswith("ACCELERATE_") and name not in OF_LAUNCH
    ]
    return {name: os.environ.pop(name) for name in names}


@cache
def _leave_at_exit() -> None:
    # A process that ends as a member of the group tears down its threads in no certain order, and
    # now and then aborts after its work is done.
    atexit.register(lambda: processes().destroy_process_group())


def split_between_processes(work: Sequence[T]) -> Sequence[T]:
    """The part of the work that this process does: every n-th piece."""
    state = processes()
    return work[state.process_index :: state.num_processes]


def agree_on_precision(precision: str) -> str:
    """Agree on what all processes resolved a precision to, or on `fp32`; collective."""
    found = set(gather_object([precision])) if processes().num_processes > 1 else {precision}
    return precision if len(found) == 1 else "fp32"


def all_have_bf16(device: torch.device) -> bool:
    """Whether every process of the run has fast bf16; collective."""
    return all(gather_object([has_bf16(device)]))


@contextmanager
def error_barrier() -> Iterator[None]:
    """Leave the block when all processes have done its work, or raise in all of them.

    A process that fails tells the others, so that none waits for it. One that dies without a word
    ends its launcher, which ends the others.

    Raises:
        ScdError: another process failed; its reason is told.
    """
    state = processes()
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    mine = [] if failure is None else [(state.process_index, reason(failure))]
    failures = gather_object(mine)
    if failure is not None:
        raise failure
    for process, message in failures:
        raise ScdError(f"process {process} failed: {message}")
