"""Join the processes of a launch, share work among them, and fail together.

Results are exchanged in files: each process writes its share below one folder, which all of them
must see (on several machines: a shared file system).
"""

import atexit
import os
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
from scd.utils.precision import Precision, has_bf16

LONGEST_WAIT = timedelta(hours=12)  # for the slowest process, in a collective operation
LONGEST_START = timedelta(minutes=5)  # from the first process to the last
NOTE_AFTER_SECONDS = 10  # of waiting for the last
# The variables that every launcher sets, and those of MPI launchers, which accelerate reads on the
# CPU.
LAUNCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Accelerate's variables for the launch itself. Its others set how a run computes, which the options
# do here.
ACCELERATE_LAUNCH = (
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    *("ACCELERATE_CPU_AFFINITY", "ACCELERATE_CONFIG"),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL"),
)
T = TypeVar("T")


def processes() -> PartialState:
    """Return the state of the launch: this process's index, their number, the device.

    Raises:
        ScdError: see `join`.
    """
    state = join(LONGEST_WAIT)
    if state.num_processes > 1:
        _leave_at_exit()
    return state


def join(longest_wait: timedelta) -> PartialState:
    """Join the other processes of this launch; later calls return the same state.

    Args:
        longest_wait: the timeout of collective operations.

    Raises:
        ScdError: the environment is that of a launch of several processes, but variables are
            missing, or the others do not join within `LONGEST_START`.
    """
    pop_accelerate_settings()
    cpu = not torch.cuda.is_available()
    if PartialState._shared_state or is_initialized():
        return PartialState(cpu=cpu)
    launched_by = _launch_variables(cpu)
    if not launched_by:
        return PartialState(cpu=cpu, timeout=longest_wait)
    variables = ", ".join(f"{name}={os.environ[name]}" for name in launched_by)
    advice = f"left over from another launch? then: unset {' '.join(launched_by)}"
    missing = [name for name in LAUNCH if not os.environ.get(name)]
    if missing:
        raise ScdError(
            f"{variables}: set for a launch of several processes, but {', '.join(missing)} is not "
            f"set; {advice}"
        )
    note = f"note: waiting for the other processes ({variables}); {advice}"
    timer = threading.Timer(NOTE_AFTER_SECONDS, print, [note], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        store, rank, size = _rendezvous()
    except (DistError, RuntimeError, ValueError) as error:  # nobody there, or no numbers
        raise ScdError(f"{variables}: no launch to join ({reason(error)}); {advice}") from error
    finally:
        timer.cancel()
    store.set_timeout(longest_wait)
    return PartialState(cpu=cpu, timeout=longest_wait, store=store, rank=rank, world_size=size)


def _rendezvous() -> tuple[Store, int, int]:
    store, rank, size = next(rendezvous("env://", timeout=LONGEST_START))
    return PrefixStore("default_pg", store), rank, size


def _launch_variables(cpu: bool) -> list[str]:
    """Name the variables that would make accelerate join a launch; empty if none would."""
    sizes = ("WORLD_SIZE", *MPI_SIZES) if cpu else ()
    several = [name for name in sizes if os.environ.get(name, "1") not in ("", "0", "1")]
    if not several and os.environ.get("LOCAL_RANK", "-1") in ("", "-1"):
        return []
    names = [*LAUNCH, *(name for name in several if name not in LAUNCH)]
    return [name for name in names if os.environ.get(name)]


def pop_accelerate_settings() -> dict[str, str]:
    """Remove accelerate's variables that set how a run computes from the environment."""
    names = [
        name
        for name in os.environ
        if name.startswith("ACCELERATE_") and name not in ACCELERATE_LAUNCH
    ]
    return {name: os.environ.pop(name) for name in names}


@cache
def _leave_at_exit() -> None:
    # A process that exits as a member of the group tears down its threads in no fixed order, and
    # sometimes aborts after its work is done.
    atexit.register(lambda: processes().destroy_process_group())


def split_between_processes(work: Sequence[T]) -> Sequence[T]:
    """Select this process's share of the work: every n-th piece."""
    state = processes()
    return work[state.process_index :: state.num_processes]


def agree_on_precision(precision: Precision) -> Precision:
    """Return the precision that all processes resolved, or `fp32` if they differ; collective."""
    found = set(gather_object([precision])) if processes().num_processes > 1 else {precision}
    return precision if len(found) == 1 else "fp32"


def all_have_bf16(device: torch.device) -> bool:
    """Check whether every process of the run has fast bf16; collective."""
    return all(gather_object([has_bf16(device)]))


@contextmanager
def error_barrier() -> Iterator[None]:
    """Wait until all processes have finished the block, or raise in all of them; collective.

    A process that fails informs the others, so that none waits for it. One that dies without doing
    so ends its launcher, which ends the others.

    Raises:
        ScdError: another process failed, with its reason.
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
