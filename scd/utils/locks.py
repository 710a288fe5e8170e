"""Lock files, so that one process at a time works in a folder."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path

from scd.errors import ScdError, reason
from scd.utils.files import read_json


@contextmanager
def hold_lock(path: Path, busy: str, advice: str) -> Iterator[None]:
    """Hold a file's lock within the block; the file is made if missing, and names its holder.

    It is a POSIX record lock, which belongs to a process: the operating system frees it the moment
    that process is dead, however it died, and forked children (data workers) do not inherit it. A
    worker that outlives its run for a moment would keep the next run out under `flock`, which
    belongs to the open file. It does not exclude threads of one process.

    Where the file system knows no locks, one line says so, and nothing is locked.

    Args:
        path: of the lock. Nothing else in this process may open it meanwhile: closing it frees a
            record lock.
        busy: the message where another process holds it; who that is comes after it.
        advice: what to do then.

    Raises:
        ScdError: another process holds it, or the file cannot be written.
    """
    with _opened(path) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # either, says POSIX
            raise ScdError(f"{busy} ({_holder(path)}); {advice}") from error
        except OSError as error:
            print(
                f"{path}: this file system has no locks ({reason(error)}): "
                f"nothing keeps a second process out"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
        try:
            file.truncate(0)
            file.write(json.dumps(holder).encode())
        except OSError as error:
            raise ScdError(f"{path}: cannot be written ({error.strerror or error})") from error
        yield


@contextmanager
def claim(path: Path, name: str) -> Iterator[bool]:
    """Claim one of many pieces of work within the block; yields whether no other process has it.

    As `hold_lock`, but of a single byte, so that one file serves all pieces; it stays empty. Where
    the file system knows no locks, every process is told that it has the piece.

    Args:
        path: of the lock.
        name: of the piece, alike in all processes; its hash is the byte's place.

    Raises:
        ScdError: the file cannot be written.
    """
    with _opened(path) as file:
        mine = True
        try:
            place = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7])
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            mine = False
        except OSError:
            pass
        yield mine


def _opened(path: Path) -> FileIO:
    """Open a lock file, which is made if missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+b", buffering=0)
    except OSError as error:
        raise ScdError(f"{path.parent}: cannot be written ({error.strerror or error})") from error


def _holder(path: Path) -> str:
    try:
        holder = read_json(path)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ScdError, KeyError, TypeError):  # it has the lock, but has not written its name yet
        return "its process has just begun"
