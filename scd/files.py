"""Writing files whole or not at all, and naming a file's content by its hash."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scd.errors import ScdError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then put it in place at once.

    Raises:
        ScdError: the disk is full, the folder read-only, or the like.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise ScdError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ScdError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ScdError(f"{path}: no such file") from error
    except OSError as error:
        raise ScdError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ScdError(f"{path}: not valid JSON ({error})") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
