"""One repository of the Hugging Face hub: its files, and every failure told in one line."""

import errno
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

from scd.errors import ScdError, reason
from scd.utils.files import sha256

RETRY_AFTER = (1, 5, 25)  # seconds; beyond the retries huggingface_hub makes itself


@dataclass(frozen=True)
class HubFile:
    """A file in a repository; `identity` changes with its content, and may be no SHA-256."""

    name: str
    size: int
    identity: str
    sha256: str | None


@dataclass
class Repository:
    """A repository at its newest commit.

    Attributes:
        type: dataset or model.
        downloads: folder for what is being fetched; used by one process at a time.
        endpoint: address of the hub; None for $HF_ENDPOINT or huggingface.co.
        told: the repository as errors and messages name it.
    """

    id: str
    type: str
    downloads: Path
    endpoint: str | None = None
    told: str = field(init=False)

    def __post_init__(self) -> None:
        self.told = f"{self.type} {self.id}"
        # Left by a killed process under names that nothing would ever look for again.
        for path in self.downloads.glob(".cache/huggingface/download/**/*.incomplete"):
            if re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
                path.unlink()

    def files(self) -> tuple[str, list[HubFile]]:
        """The newest commit and its files.

        Raises:
            ScdError: no network, no access, or no such repository.
        """
        with self._telling():
            info: Any = HfApi(endpoint=self.endpoint).repo_info(
                self.id, repo_type=self.type, files_metadata=True, timeout=30
            )
            files = []
            for entry in info.siblings or []:
                hash_ = entry.lfs.sha256 if entry.lfs is not None else None
                identity = hash_ or entry.blob_id or info.sha
                files.append(HubFile(entry.rfilename, entry.size or 0, identity, hash_))
            return info.sha, sorted(files, key=lambda file: file.name)

    def download(self, file: HubFile, commit: str) -> Path:
        """Fetch a file, or find it whole among the downloads.

        Raises:
            ScdError: no network, no access, a full disk, or not the content the hub announced.
        """
        with self._telling():
            path = self._download(file, commit)
        if file.sha256 is not None and sha256(path) != file.sha256:
            path.unlink()
            raise ScdError(
                f"{self.told}: {file.name} arrived damaged and was deleted; run it again"
            )
        return path

    def _download(self, file: HubFile, commit: str) -> Path:
        waits = iter(RETRY_AFTER)
        while True:
            try:
                path = hf_hub_download(
                    self.id,
                    file.name,
                    repo_type=self.type,
                    revision=commit,
                    local_dir=self.downloads,
                    endpoint=self.endpoint,
                )
                return Path(path)
            except Exception as error:
                # Itself it resumes after a quietly closed connection, but not after a reset one.
                wait = next(waits, None)
                if wait is None or not _may_pass(_cause(error)):
                    raise
                time.sleep(wait)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of HTTP, of the hub, of its storage back ends: many kinds
            raise ScdError(f"{self.told}: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        error = _cause(error)
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
            return "not here yet, and HF_HUB_OFFLINE forbids to fetch it: unset that"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.downloads} is full: make room, then run it again"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            return f"{self.downloads} cannot be written ({error.strerror})"
        kind = status or type(error).__name__
        return (
            f"cannot be fetched from {hub} ({kind}: {reason(error)}): check the network, or set "
            f"HF_ENDPOINT to a mirror; run again, it goes on where it stopped"
        )


def _cause(error: Exception) -> Exception:
    """What lies behind the hub library's "no network and nothing in the cache"."""
    behind = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(behind, Exception):
        return behind
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """Whether a failure may soon be over: the network's, not the disk's and no refusal."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return getattr(error, "errno", None) is None and not isinstance(error, OfflineModeIsEnabled)
