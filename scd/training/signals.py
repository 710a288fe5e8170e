"""Being told to stop: by a scheduler (SIGTERM, SIGUSR1), at the keyboard (SIGINT), or by the end of
the terminal or the connection (SIGHUP)."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """The first signal that asked this process to stop, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. Ctrl-C once more no longer waits for the step and the checkpoint.

        SIGTERM and SIGUSR1 once more do: launchers pass on what the scheduler has already sent.
        """
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        self.signal = self.signal or signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note signals instead of dying of them, until the block is left."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may ask for signals
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    if before[signal.SIGHUP] == signal.SIG_IGN:  # by nohup: the run is to outlive its terminal
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Write no more to a terminal that is gone: it is an error, and would end the run unsaved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        with suppress(OSError):  # it is closed
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
    os.close(nowhere)


def leave_signals_to_the_trainer(worker: int) -> None:
    """For data workers, which get the signals sent to a whole job: the trainer needs their batches
    for the step that it finishes. They leave when it does, or dies."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
