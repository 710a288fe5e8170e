"""Watch over a run: stop signals, the heartbeat file, and processes that are lost."""

import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

from accelerate import PartialState
from torch.distributed import TCPStore

from scd.errors import ScdError, Stopped, reason
from scd.utils.files import read_json, write_json
from scd.utils.processes import STOP_SIGNALS


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
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
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


NAME = "heartbeat.json"
SECONDS = 5.0  # between two beats of the same state


class Heartbeat:
    """Writes step, state, time and process, whole each time.

    A run that hangs or was killed is one whose `time` stands still in a state that is not final.

    Args:
        enabled: on the main process.
    """

    def __init__(self, output: Path, enabled: bool):
        self.path = output / NAME
        self.enabled = enabled
        self.state = ""
        self.written = 0.0

    def beat(self, state: str, step: int | None, message: str = "") -> None:
        """Write, unless the same state was written less than `SECONDS` ago."""
        now = time.monotonic()
        if not self.enabled or (state == self.state and now - self.written < SECONDS):
            return
        self.state, self.written = state, now
        beat = {
            "state": state,
            "step": step,
            "message": message,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        # A full disk is for the next checkpoint to tell; no run is lost to its heartbeat.
        with suppress(ScdError):
            write_json(self.path, beat)


@contextmanager
def last_word(output: Path, enabled: bool) -> Iterator[None]:
    """Write the state `starting`, and however the block is left a final one.

    `finished` and `stopped` are also told on stdout; a failure is its caller's to tell.
    """
    heartbeat = Heartbeat(output, enabled)
    heartbeat.beat("starting", None)

    def end(state: str, message: str) -> None:
        step = None
        with suppress(ScdError):
            step = read_json(heartbeat.path)["step"] if enabled else None
        heartbeat.beat(state, step, message)

    try:
        yield
    except Stopped as stopped:
        end("stopped", str(stopped))
        if enabled:
            print(stopped, flush=True)
        raise
    except KeyboardInterrupt:
        end("failed", "interrupted before it could save")
        raise
    except BaseException as error:
        end("failed", reason(error))
        raise
    end("finished", "")
    if enabled:
        print(f"{output}: finished", flush=True)


BEAT_SECONDS = 5.0
LOST_STATE = "lost"  # of the heartbeat
# Beats are counted, not seconds: a job that its scheduler suspends wakes up with nobody lost.
SILENT_BEATS = 24
DONE = "done"


@contextmanager
def lost_process_ends_run(state: PartialState, output: Path) -> Iterator[None]:
    """Watch over the other processes within the block; one that is lost ends this one as well.

    It ends by `os._exit`: the main thread may wait for the lost one, and cannot be reached. A
    process that leaves the block by an error is lost to the others, too.

    Args:
        output: the run's folder, whose heartbeat then says `lost`.
    """
    if state.num_processes == 1:
        yield
        return
    watch = _Watch(state.process_index, state.num_processes, output)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        watch.failure = reason(error)
        raise
    finally:
        watch.leave.set()
        thread.join()


class _Watch:
    """Beats and listens, in the key-value store that `torchrun` and accelerate's launcher start.

    A connection of its own, because the process group's may wait for minutes for a key.
    """

    def __init__(self, index: int, processes: int, output: Path):
        self.index = index
        self.output = output
        # The store of a launcher that starts processes anew holds what the last ones said.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.names = [f"scd/{attempt}/process-{i}" for i in range(processes)]
        self.lost = f"scd/{attempt}/lost"
        self.leave = threading.Event()
        self.failure: str | None = None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(
            *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.where = f"{socket.gethostname()}, process id {os.getpid()}"
        self.beats = 0
        self.last = [""] * processes  # what was heard of each
        self.silent = [0] * processes  # beats since then

    def run(self) -> None:
        unreached = 0
        while not self.leave.wait(BEAT_SECONDS):
            try:
                self._beat(f"{self.beats} {self.where}")
                self._listen()
                unreached = 0
            except RuntimeError:  # torch's errors of a store are of this kind
                unreached += 1
                if unreached == SILENT_BEATS:
                    self._end("the launcher on the first machine cannot be reached any more")
        with suppress(RuntimeError):  # nobody may be there to hear it
            if self.failure is not None:
                self.store.set(self.lost, f"process {self.index} failed ({self.failure})")
            self._beat(DONE)

    def _beat(self, text: str) -> None:
        self.beats += 1
        self.store.set(self.names[self.index], text)

    def _listen(self) -> None:
        if self.store.check([self.lost]):
            self._end(self.store.get(self.lost).decode())
        heard_of = range(len(self.names)) if self.index == 0 else [0]
        for process in heard_of:
            name = self.names[process]
            heard = self.store.get(name).decode() if self.store.check([name]) else ""
            changed = heard != self.last[process] or heard == DONE
            self.silent[process] = 0 if changed else self.silent[process] + 1
            self.last[process] = heard
            if self.silent[process] >= SILENT_BEATS:
                where = heard.partition(" ")[2] or "it never began"
                seconds = round(SILENT_BEATS * BEAT_SECONDS)
                self._end(f"process {process} ({where}) is lost: no sign of it for {seconds} s")

    def _end(self, message: str) -> None:
        if self.index == 0:
            with suppress(RuntimeError):
                self.store.set(self.lost, message)
            Heartbeat(self.output, True).beat(LOST_STATE, None, message)
        print(
            f"\nerror: {message}; this run ends here, and started again it goes on from its newest "
            f"checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
