"""Unpacking tar archives of unknown origin: checked as a whole first, in place only when whole."""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from scd.errors import ScdError, reason

MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 16 * 2**30


def unpack(archive: Path, folder: Path, staging: Path) -> list[str]:
    """Unpack an uncompressed tar into `folder` and return the paths of its files, relative to it.

    Every member is checked before anything is written. The files then grow below `staging` (on the
    same disk) and are moved to their final names when all of them are there, so a killed process
    leaves whole files or none.

    Raises:
        ScdError: the archive is damaged or refused (see `check_members`), or the disk is full.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ScdError("unpacking archives safely needs Python 3.11.4 or newer")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed process left
        with tarfile.open(archive, "r:") as tar:
            members = check_members(tar, archive, reserved=staging.relative_to(folder).parts[0])
            staging.mkdir(parents=True)
            for member in members:
                tar.extract(member, staging, filter="data")
        return _put_in_place(staging, folder)
    except (tarfile.TarError, EOFError) as error:
        raise ScdError(
            f"{archive}: not a whole, uncompressed tar archive ({reason(error)})"
        ) from error
    except (OSError, ValueError, OverflowError) as error:
        told = getattr(error, "strerror", None) or reason(error)
        raise ScdError(f"{archive}: cannot be unpacked into {folder} ({told})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_members(tar: tarfile.TarFile, archive: Path, reserved: str) -> list[tarfile.TarInfo]:
    """The members of an open archive, if each is an ordinary file or folder below the target.

    Args:
        reserved: a folder name that belongs to the caller.

    Raises:
        ScdError: a link, device, path that leads elsewhere, or more data than the archive has.
    """
    size = archive.stat().st_size
    members: list[tarfile.TarInfo] = []
    total = 0
    for member in tar:
        problem = _problem(member, reserved)
        total += member.size
        if problem is None and total > size:
            problem = "claims more data than the archive holds"
        if problem is None and len(members) >= MAX_MEMBERS:
            problem = f"is one more than the {MAX_MEMBERS} allowed"
        if problem is not None:
            raise ScdError(
                f"{archive}: refused, member {member.name!r} {problem}; nothing unpacked"
            )
        members.append(member)
    # tarfile takes damage after the first member for the archive's end; only zeros end an archive.
    with open(archive, "rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ScdError(f"{archive}: damaged at byte {tar.offset}; nothing unpacked")
    return members


def check_name(name: str, reserved: str) -> str | None:
    """What is wrong with a relative path from an unknown origin, or None."""
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or "\0" in name or name[1:2] == ":":
        return "is not a relative path"
    if ".." in path.parts:
        return "leads outside the folder"
    if reserved.casefold() in (part.casefold() for part in path.parts):
        return f"lies in a reserved folder {reserved}"
    return None


def _problem(member: tarfile.TarInfo, reserved: str) -> str | None:
    if member.issym() or member.islnk():
        return f"is a link (to {member.linkname!r})"
    if not (member.isfile() or member.isdir()) or member.issparse():
        return "is a device or another special file"
    if not 0 <= member.size <= MAX_MEMBER_BYTES:
        return f"is larger than {MAX_MEMBER_BYTES // 2**30} GiB, or of negative size"
    return check_name(member.name, reserved)


def _put_in_place(staging: Path, folder: Path) -> list[str]:
    # The data before the names: after a power failure no final name may stand for an empty file.
    sync: Callable[[], None] = getattr(os, "sync", lambda: None)
    sync()
    names = []
    for parent, _, files in os.walk(staging):
        target = folder / Path(parent).relative_to(staging)
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(Path(parent) / file, target / file)
            names.append((target / file).relative_to(folder).as_posix())
    return sorted(names)
