"""Show that a run is alive (heartbeat file, final state), and end it when a process is lost."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from accelerate import PartialState
from torch.distributed import TCPStore

from scd.errors import ScdError, Stopped, reason
from scd.utils.files import read_json, write_json

HEARTBEAT = "heartbeat.json"  # in the run's folder
HEARTBEAT_SECONDS = 5.0  # between two writes of the same state

BEAT_SECONDS = 5.0  # between two signs of life of a process
# Beats are counted, not seconds: a job that its scheduler suspends wakes up with nobody lost.
SILENT_BEATS = 24
DONE = "done"  # the last sign of a process that left in order


class Heartbeat:
    """The file that says what a run is doing: state, step, time and process.

    A run that hangs or was killed is one whose `time` stands still in a state that is not final.

    Args:
        enabled: on the main process.
    """

    def __init__(self, output: Path, enabled: bool):
        self.path = output / HEARTBEAT
        self.enabled = enabled
        self.state = ""
        self.written = 0.0

    def beat(self, state: str, step: int | None, message: str = "") -> None:
        """Write the file, unless it was written with the same state moments ago."""
        now = time.monotonic()
        if not self.enabled or (state == self.state and now - self.written < HEARTBEAT_SECONDS):
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
        # A full disk is reported by the next checkpoint; no run ends because of its heartbeat.
        with suppress(ScdError):
            write_json(self.path, beat)


@contextmanager
def report_outcome(output: Path, enabled: bool) -> Iterator[None]:
    """Write the state `starting`, and a final one however the block is left.

    `finished` and `stopped` are printed as well; reporting a failure is up to the caller.
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
        print(f"{output}: finished; its model is in exported/", flush=True)


@contextmanager
def lost_process_ends_run(state: PartialState, output: Path) -> Iterator[None]:
    """Watch the other processes within the block, and end this one when one of them is lost.

    It ends by `os._exit`: the main thread may be waiting for the lost process, and cannot be
    reached. A process that leaves the block by an error counts as lost.

    Args:
        output: the run's folder, whose heartbeat then says `lost`.
    """
    if state.num_processes == 1:
        yield
        return
    watchdog = _Watchdog(state.process_index, state.num_processes, output)
    thread = threading.Thread(target=watchdog.run, daemon=True)
    thread.start()
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        watchdog.failure = reason(error)
        raise
    finally:
        watchdog.leave.set()
        thread.join()


class _Watchdog:
    """Signs of life of all processes, in the key-value store of torchrun or accelerate's launcher.

    The connection is its own, because the process group's may wait for minutes for a key. The first
    process watches all others, and they watch the first.
    """

    def __init__(self, index: int, processes: int, output: Path):
        self.index = index
        self.output = output
        # A launcher that restarts its processes keeps the store, with the keys of the last attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.keys = [f"scd/{attempt}/process-{i}" for i in range(processes)]
        self.lost_key = f"scd/{attempt}/lost"
        self.leave = threading.Event()
        self.failure: str | None = None
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = TCPStore(
            *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.place = f"{socket.gethostname()}, process id {os.getpid()}"
        self.beats = 0
        self.last_sign = [""] * processes
        self.silent_beats = [0] * processes  # since the last sign

    def run(self) -> None:
        unreached = 0
        while not self.leave.wait(BEAT_SECONDS):
            try:
                self._beat(f"{self.beats} {self.place}")
                self._check()
                unreached = 0
            except RuntimeError:  # torch's errors of a store are of this kind
                unreached += 1
                if unreached == SILENT_BEATS:
                    self._end("the launcher on the first machine cannot be reached any more")
        with suppress(RuntimeError):  # the others may have left
            if self.failure is not None:
                self.store.set(self.lost_key, f"process {self.index} failed ({self.failure})")
            self._beat(DONE)

    def _beat(self, sign: str) -> None:
        self.beats += 1
        self.store.set(self.keys[self.index], sign)

    def _check(self) -> None:
        if self.store.check([self.lost_key]):
            self._end(self.store.get(self.lost_key).decode())
        for process in range(len(self.keys)) if self.index == 0 else [0]:
            key = self.keys[process]
            sign = self.store.get(key).decode() if self.store.check([key]) else ""
            alive = sign != self.last_sign[process] or sign == DONE
            self.silent_beats[process] = 0 if alive else self.silent_beats[process] + 1
            self.last_sign[process] = sign
            if self.silent_beats[process] >= SILENT_BEATS:
                place = sign.partition(" ")[2] or "it never began"
                seconds = round(SILENT_BEATS * BEAT_SECONDS)
                self._end(f"process {process} ({place}) is lost: no sign of it for {seconds} s")

    def _end(self, message: str) -> None:
        if self.index == 0:
            with suppress(RuntimeError):
                self.store.set(self.lost_key, message)
            Heartbeat(self.output, True).beat("lost", None, message)
        print(
            f"\nerror: {message}; this run ends here; started again, it resumes from its newest "
            f"checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
