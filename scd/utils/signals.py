"""Turn stop signals into a request, so that a process can finish what it is doing."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """The first stop signal that this process received, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C no longer waits for the step and the checkpoint.

        A second SIGTERM or SIGUSR1 does: launchers pass on what the scheduler has already sent.
        """
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        self.signal = self.signal or signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Record stop signals within the block instead of dying of them."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can handle signals
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if before[signal.SIGHUP] == signal.SIG_IGN:  # by nohup: the run is to outlive its terminal
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a data worker (`DataLoader(worker_init_fn=...)`).

    Signals sent to a whole job reach the workers too, but the trainer needs their batches for the
    step that it finishes. They leave when it does, or dies.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave_terminal() -> None:
    """Stop writing to a terminal that is gone: an error there would end the run unsaved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        with suppress(OSError):  # it is closed
            if stat.S_ISCHR(os.fstat(output).st_mode):
                os.dup2(nowhere, output)
    os.close(nowhere)
