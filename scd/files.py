"""Reading files or saying why not, writing them whole or not at all, and their hashes."""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from scd.errors import ScdError, reason

MAX_JSON_BYTES = 2**28  # a list of a million clips
MAX_ARRAY_BYTES = 2**30  # of one array in an npz file; a DMLab clip has 3.7 MB


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
        ScdError: the file is missing, unreadable, not JSON or larger than `MAX_JSON_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES // 2**20} MiB")
        return json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise ScdError(f"{path}: no such file") from error
    except OSError as error:
        raise ScdError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ScdError(f"{path}: not valid JSON ({reason(error)})") from error


def npz_keys(path: Path) -> set[str]:
    """The names of the arrays of an npz file.

    Raises:
        ScdError: the file is missing or damaged.
    """
    with _open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def npz_header(
    path: Path, key: str, most: int = MAX_ARRAY_BYTES
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of one array of an npz file, without reading the array.

    Raises:
        ScdError: the file is missing, damaged, has no such key or announces an array of more than
            `most` bytes: a few compressed bytes may stand for any amount of memory.
    """
    with _npz_member(path, key) as member:
        return _array_header(path, key, member, most)


def read_npz(path: Path, key: str, most: int = MAX_ARRAY_BYTES) -> np.ndarray:
    """One array of an npz file; pickled objects are refused.

    Raises:
        ScdError: see `npz_header`.
    """
    npz_header(path, key, most)
    with _npz_member(path, key) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _open_npz(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise ScdError(f"{path}: no such file")
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # damaged archives raise many kinds
        raise ScdError(f"{path}: not an npz file") from error


@contextmanager
def _npz_member(path: Path, key: str) -> Iterator[IO[bytes]]:
    with _open_npz(path) as archive:
        try:
            with archive.open(f"{key}.npy") as member:
                yield member
        except ScdError:
            raise
        except Exception as error:  # many kinds again, zlib.error among them
            raise ScdError(f"{path}: no npz file with a key {key!r} ({reason(error)})") from error


def _array_header(
    path: Path, key: str, member: IO[bytes], most: int
) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = read[version](member)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > most:
        raise ScdError(
            f"{path}: {key!r} has {size / 2**30:.1f} GiB, more than the "
            f"{most / 2**30:g} GiB that are read at once"
        )
    return shape, dtype


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
