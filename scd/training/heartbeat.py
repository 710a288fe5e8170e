"""`heartbeat.json`: what a run does, for schedulers and people who watch it from outside."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from scd.errors import ScdError, Stopped, reason
from scd.files import read_json, write_json

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
