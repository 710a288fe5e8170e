"""Read files with clear errors, write them atomically, and hash them."""

import errno
import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError

from scd.errors import ScdError, reason
from scd.utils.paths import why_missing

MAX_JSON_BYTES = 2**28  # a list of a million clips
MAX_NAME_BYTES = 255  # of a file name, on every common file system
MAX_ARRAY_BYTES = 2**30  # of one array in an npz file; a DMLab clip has 3.7 MB


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then rename it to `path`.

    The folder is flushed as well, so that the file survives a power cut. If `write` raises, the old
    file stays, and nothing half-written is left. A link is replaced, not what it leads to, which
    others may share; into a device or a pipe `write` writes at once.

    Raises:
        ScdError: the disk is full, the folder is read-only, or the like.
    """
    aside = path.with_name(_aside_name(path))
    try:
        if _is_stream(path):
            write(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        set_usual_mode(aside)
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise ScdError(f"{path}: cannot be written ({error.filename} is not a folder)") from error
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or reason(error)
        raise ScdError(f"{path}: cannot be written ({problem})") from error
    finally:
        with suppress(OSError):
            aside.unlink()


def _is_stream(path: Path) -> bool:
    """Tell whether a path is a device or a pipe, or as /dev/stdout a file that is open already."""
    end = path.absolute()
    for _ in range(40):  # links, as many as Linux follows
        if end.parts[1:2] == ("proc",) or not end.is_symlink():
            break
        end = end.parent / os.readlink(end)
    if end.parts[1:2] == ("proc",):
        return path.exists()
    return path.exists() and not path.is_file() and not path.is_dir()


def _aside_name(path: Path) -> str:
    """Name the file to be renamed to `path`, so that `remove_unfinished` matches it."""
    end = f".{os.getpid()}{path.suffix}".encode(errors="surrogateescape")
    stem = path.stem.encode(errors="surrogateescape")[: MAX_NAME_BYTES - len(end) - 1]
    return f".{stem.decode(errors='ignore')}{end.decode(errors='surrogateescape')}"


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `path`, flush it, then rename it to `path`.

    A folder that was there is replaced; through a link, the folder that it leads to. A kill at the
    worst moment leaves no folder at `path`, but never half of one.

    Raises:
        ScdError: the disk is full, the parent is read-only, or the like.
    """
    if path.is_symlink():
        path = path.resolve()
    aside, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        for left in (aside, old):  # by a dead process with the same ID
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        for part in [*aside.rglob("*"), aside]:
            set_usual_mode(part)
            flush(part)
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or reason(error)
        raise ScdError(f"{path}: cannot be written ({problem})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Delete the half-written files and folders of killed processes, if there is such a folder.

    No other process may be writing to the folder.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"\..+\.\d+\.\w+", path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def set_usual_mode(path: Path) -> None:
    """Let those read a safetensors file who may read other new files in its folder.

    Its library makes it readable for the owner alone (safetensors' issue 782), so that colleagues
    could not use a checkpoint.
    """
    if path.suffix == ".safetensors" and not path.is_symlink():
        other = path.with_suffix(".mode")
        with suppress(OSError):  # where there are no modes to be set
            other.touch()
            path.chmod(other.stat().st_mode)
        with suppress(OSError):
            other.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some file systems cannot flush a folder, and report it.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(number)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, see `write_atomically`."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


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
        raise ScdError(f"{path}: {why_missing(path)}") from error
    except OSError as error:
        raise ScdError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ScdError(f"{path}: not valid JSON ({reason(error)})") from error


def npz_keys(path: Path) -> set[str]:
    """List the names of the arrays in an npz file.

    Raises:
        ScdError: the file is missing or damaged.
    """
    with _open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def npz_header(
    path: Path, key: str, most: int = MAX_ARRAY_BYTES
) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and type of one array of an npz file, but not the array.

    Raises:
        ScdError: the file is missing, damaged, has no such key, or declares an array of more than
            `most` bytes: a few compressed bytes may expand to any amount of memory.
    """
    with _npz_member(path, key) as member:
        return _array_header(path, key, member, most)


def read_npz(path: Path, key: str, most: int = MAX_ARRAY_BYTES) -> np.ndarray:
    """Read one array of an npz file; pickled objects are refused.

    Raises:
        ScdError: see `npz_header`.
    """
    with _npz_member(path, key) as member:
        _array_header(path, key, member, most)
        member.seek(0)
        return np.lib.format.read_array(member, allow_pickle=False)


def _open_npz(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise ScdError(f"{path}: {why_missing(path)}")
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # damaged archives raise many kinds
        raise ScdError(f"{path}: not an npz file") from error


@contextmanager
def _npz_member(path: Path, key: str) -> Iterator[IO[bytes]]:
    with _open_npz(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            keys = reprlib.repr(sorted(name.removesuffix(".npy") for name in archive.namelist()))
            raise ScdError(f"{path}: has no key {key!r}, but {keys}")
        try:
            with archive.open(f"{key}.npy") as member:
                yield member
        except ScdError:
            raise
        except Exception as error:  # of many kinds, zlib.error among them
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
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
