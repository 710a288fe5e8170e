"""Being told to stop: by a scheduler (SIGTERM, SIGUSR1) or at the keyboard (SIGINT)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


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
        self.signal = self.signal or signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note signals instead of dying of them, until the block is left."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may ask for signals
        return
    before = {number: signal.signal(number, request.note) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_trainer(worker: int) -> None:
    """For data workers, which get the signals sent to a whole job: the trainer needs their batches
    for the step that it finishes. They leave when it does, or dies."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
