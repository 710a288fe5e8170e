"""Files and archives from the Hugging Face hub: checked, whole or not at all, with clear errors."""

import errno
import glob
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

from scd.errors import ScdError, reason
from scd.utils.files import sha256
from scd.utils.locks import hold_lock

STATE = ".hub"  # folder inside a target folder: notes, the lock, and what is not finished
RETRY_AFTER = (1, 5, 25)  # seconds; in addition to the retries of huggingface_hub
MAX_MEMBERS = 2_000_000  # of an archive
RESERVE_BYTES = 2**30  # left free on the disk


class HubFile(NamedTuple):
    """A file of a repository. `identity` changes with its content, but need not be a SHA-256."""

    name: str
    size: int
    identity: str
    sha256: str | None


@dataclass
class Repository:
    """A repository at its newest commit.

    Attributes:
        type: dataset or model.
        downloads: folder for downloads, which only one process uses at a time.
        endpoint: address of the hub; None: $HF_ENDPOINT or huggingface.co.
    """

    id: str
    type: str
    downloads: Path
    endpoint: str | None = None

    def __post_init__(self) -> None:
        # A killed process leaves files under random names, which no download continues.
        for path in self.downloads.glob(".cache/huggingface/download/**/*.incomplete"):
            if re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
                path.unlink()

    def __str__(self) -> str:
        return f"{self.type} {self.id}"

    def files(self) -> tuple[str, list[HubFile]]:
        """Ask for the newest commit and its files.

        Raises:
            ScdError: no network, no access, or no such repository.
        """
        with self._one_clear_error():
            info: Any = HfApi(endpoint=self.endpoint).repo_info(
                self.id, repo_type=self.type, files_metadata=True, timeout=30
            )
        files = []
        for entry in info.siblings or []:
            hash_ = entry.lfs.sha256 if entry.lfs is not None else None
            identity = hash_ or entry.blob_id or info.sha
            files.append(HubFile(entry.rfilename, entry.size or 0, identity, hash_))
        return info.sha, sorted(files)

    def download(self, files: list[HubFile], commit: str) -> list[Path]:
        """Download files in parallel, skipping those that are complete already.

        Raises:
            ScdError: no network, no access, a full disk, or other content than the hub announces.
        """
        with self._one_clear_error():
            self._download([file.name for file in files], commit)
        paths = [self.downloads / file.name for file in files]
        for file, path in zip(files, paths, strict=True):
            # huggingface_hub compares sizes alone, and downloads nothing without a list of files.
            if not path.is_file():
                raise ScdError(f"{self}: {file.name} did not arrive; run it again")
            if file.sha256 is not None and sha256(path) != file.sha256:
                path.unlink()
                raise ScdError(f"{self}: {file.name} arrived damaged and was deleted; run it again")
        return paths

    def _download(self, names: list[str], commit: str) -> None:
        for wait in (*RETRY_AFTER, None):
            try:
                snapshot_download(
                    self.id,
                    repo_type=self.type,
                    revision=commit,
                    allow_patterns=[glob.escape(name) for name in names],
                    local_dir=self.downloads,
                    endpoint=self.endpoint,
                    max_workers=len(names),
                )
                # Where the list of files cannot be had, it only warns, and fetches nothing.
                if wait is None or all((self.downloads / name).is_file() for name in names):
                    return
                time.sleep(wait)
            except Exception as error:
                # huggingface_hub itself resumes after a closed connection, not after a reset one.
                if wait is None or not _is_transient(_cause(error)):
                    raise
                time.sleep(wait)

    @contextmanager
    def _one_clear_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of HTTP, of the hub, of its storage back ends: many kinds
            raise ScdError(f"{self}: {self._explain(_cause(error))}") from error

    def _explain(self, error: Exception) -> str:
        hub = self.endpoint or huggingface_hub.constants.ENDPOINT
        token = "your token" if huggingface_hub.get_token() else "a request without token"
        status = _status(error)
        if isinstance(error, GatedRepoError):
            page = f"{hub}/{'datasets/' if self.type == 'dataset' else ''}{self.id}"
            return f"is gated and refuses {token}: accept its terms at {page}, then set HF_TOKEN"
        if status in (401, 403):
            return f"{hub} refuses {token} ({status}): set HF_TOKEN to a token that may read it"
        if status == 404:
            return (
                f"not found on {hub}, or hidden from {token} (404): if it is private, set HF_TOKEN"
            )
        if isinstance(error, OfflineModeIsEnabled):
            return "not downloaded yet, and HF_HUB_OFFLINE forbids downloads: unset it"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.downloads} is full: make room, then run it again"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            return f"{self.downloads} cannot be written ({error.strerror})"
        kind = status or type(error).__name__
        return (
            f"cannot be fetched from {hub} ({kind}: {reason(error)}): check the network, or set "
            f"HF_ENDPOINT to a mirror; the next run continues where this one stopped"
        )


def _cause(error: Exception) -> Exception:
    """Return the error behind huggingface_hub's "no network and nothing in the cache"."""
    behind = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(behind, Exception):
        return behind
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: Exception) -> bool:
    """Tell failures of the network, which may pass, from those of the disk and from refusals."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return getattr(error, "errno", None) is None and not isinstance(error, OfflineModeIsEnabled)


def unpack(archive: Path, folder: Path, staging: Path) -> list[str]:
    """Unpack an uncompressed tar into `folder`, and return the paths of its files below it.

    Files are unpacked below `staging`, on the same disk, and moved to their final names when all of
    them are there: a killed process, or a refused archive, leaves no file half-written.

    Raises:
        ScdError: the archive is damaged, holds anything but files and folders below the target, or
            the disk is full.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ScdError("unpacking archives safely needs Python 3.11.4 or newer")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
        with tarfile.open(archive, "r:") as tar, open(archive, "rb") as file:
            members = []
            for member in tar:
                if member.size < 0:  # reading on would never end
                    raise tarfile.ReadError(f"member {member.name!r} has a negative size")
                members.append(member)
                if len(members) > MAX_MEMBERS:  # each takes memory, and an inode
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS} members")
            # To tarfile, damage behind the first member is the end of the archive. Zeros end it.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
            staging.mkdir(parents=True)
            tar.extractall(staging, members, filter=_files_alone)
        return _put_in_place(staging, folder)
    except tarfile.FilterError as error:
        raise ScdError(f"{archive}: refused, {reason(error)}; nothing unpacked") from error
    except (tarfile.TarError, EOFError) as error:
        raise ScdError(
            f"{archive}: not a whole, uncompressed tar archive ({reason(error)})"
        ) from error
    except (OSError, ValueError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or reason(error)
        raise ScdError(f"{archive}: cannot be unpacked into {folder} ({problem})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _files_alone(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """Refuse more than tarfile's filter for data does: links of any kind, and sparse files.

    The filter judges a link by the folder that is unpacked into, and the files are moved from there
    to join those of other archives. A sparse file takes any size.
    """
    if member.issym() or member.islnk():
        problem: str | None = f"is a link (to {member.linkname!r})"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        problem = "is a device or another special file"
    else:
        problem = check_name(member.name)
    if problem is not None:
        raise tarfile.FilterError(f"member {member.name!r} {problem}")
    return tarfile.data_filter(member, path)


def check_name(name: str) -> str | None:
    """Return what is wrong with a relative path of unknown origin; None if nothing is."""
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or "\0" in name or name[1:2] == ":":
        return "is not a relative path"
    if ".." in path.parts:
        return "leads outside the folder"
    if STATE in (part.casefold() for part in path.parts):
        return f"lies in a reserved folder {STATE}"
    return None


def _put_in_place(staging: Path, folder: Path) -> list[str]:
    os.sync()  # contents before names: after a power failure no final name has an empty file
    names = []
    for parent, _, files in os.walk(staging):
        target = folder / Path(parent).relative_to(staging)
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            os.replace(Path(parent) / file, target / file)
            names.append((target / file).relative_to(folder).as_posix())
    return sorted(names)


@contextmanager
def exclusive_use(folder: Path) -> Iterator[Path]:
    """Keep other processes from fetching into a folder, and yield its state folder.

    Raises:
        ScdError: another process fetches into it, or it cannot be written.
    """
    state = folder / STATE
    try:
        busy = f"{folder}: another process is fetching into it"
        with hold_lock(state / "lock", busy, "wait for it"):
            yield state
    except OSError as error:
        raise ScdError(f"{folder}: cannot be written ({error.strerror or error})") from error


def check_space(folder: Path, needed: int, what: object) -> None:
    """Refuse to start what the disk has no room for.

    Raises:
        ScdError: naming the bytes that are needed and free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE_BYTES:
        raise ScdError(
            f"{what}: needs {size_text(needed)} and {size_text(RESERVE_BYTES)} to spare on the "
            f"disk of {folder}, but only {size_text(free)} are free"
        )


def size_text(count: int) -> str:
    """Write a number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
