"""Reading files or saying why not, writing them whole or not at all, and their hashes."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from scd.errors import ScdError, reason


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then put it in place at once.

    Whatever `write` raises, the old file stays and nothing half-written is left.

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
    except (FileExistsError, NotADirectoryError) as error:
        raise ScdError(f"{path}: cannot be written ({error.filename} is not a folder)") from error
    except OSError as error:
        raise ScdError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            aside.unlink()


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
    except (ValueError, RecursionError) as error:
        raise ScdError(f"{path}: not valid JSON ({reason(error)})") from error


def read_npz(path: Path, key: str) -> np.ndarray:
    """One array of an npz file; pickled objects are refused.

    Raises:
        ScdError: the file is missing, damaged or has no such key.
    """
    if not path.exists():
        raise ScdError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ScdError(f"{path}: not an npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[key]
    except Exception as error:  # damaged archives raise many kinds, zlib.error among them
        raise ScdError(f"{path}: no npz file with a key {key!r} ({reason(error)})") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
