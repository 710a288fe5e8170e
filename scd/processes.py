"""Sharing the work of one command among the processes that were launched.

Processes meet in files: each writes its share below one folder, which all of them must see (on
several machines: a shared file system).
"""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from scd.errors import ScdError, reason

LONGEST_WAIT = timedelta(hours=12)  # for the slowest process
T = TypeVar("T")


def processes() -> PartialState:
    """This process among those of the launcher, or the only one."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    if state.num_processes > 1:
        _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    # A process that ends as a member of the group tears down its threads in no certain order, and
    # now and then aborts after its work is done.
    atexit.register(lambda: processes().destroy_process_group())


def share(work: Sequence[T]) -> Sequence[T]:
    """The part of the work that this process does: every n-th piece."""
    state = processes()
    return work[state.process_index :: state.num_processes]


@contextmanager
def together() -> Iterator[None]:
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
