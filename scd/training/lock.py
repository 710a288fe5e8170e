"""One run at a time in an experiment's folder."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from scd.errors import ScdError, reason
from scd.files import read_json

NAME = "run.lock"


@contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Hold the lock of an experiment's folder: `run.lock`, which names who holds it.

    It is the operating system's (POSIX record lock), so it is free the moment its process is dead,
    however it died. Forked data workers do not inherit it: one that outlives its run for a moment
    does not keep the next run out. Where the file system knows no locks, one line says so.

    Raises:
        ScdError: another run holds it, or the folder cannot be written to.
    """
    path = output / NAME
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - open as long as it is locked
    except OSError as error:
        raise ScdError(f"{output}: cannot be written ({error.strerror or error})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # either, says POSIX
            raise ScdError(
                f"{output}: a run is going on here ({_holder(path)}); "
                f"wait for it, stop it, or choose another name=..."
            ) from error
        except OSError as error:
            print(
                f"{path}: this file system has no locks ({reason(error)}): "
                f"nothing keeps a second run out"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
        try:
            file.truncate(0)
            file.write(json.dumps(holder).encode())
        except OSError as error:
            raise ScdError(f"{path}: cannot be written ({error.strerror or error})") from error
        yield


def _holder(path: Path) -> str:
    try:
        holder = read_json(path)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ScdError, KeyError, TypeError):  # it has the lock, but has not told its name yet
        return "its process has just begun"
