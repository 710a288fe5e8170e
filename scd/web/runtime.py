"""onnxruntime-web: the pinned package, fetched by npm and checked before anything is copied."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from scd.errors import ScdError, reason

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
# As the registry and npm's lock files write it.
INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02V"
    "b7QmRMDs1SigqR4CXAfKYQ=="
)
BINARIES = ("ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify")  # WASM; WebGPU
FILES = (
    "ort.wasm.min.mjs",
    "ort.webgpu.min.mjs",
    *(f"{name}.{ending}" for name in BINARIES for ending in ("mjs", "wasm")),
)
NPM_SECONDS = 600


def copy_runtime(folder: Path, archive: Path | None) -> None:
    """Copy the runtime's files to a folder.

    Args:
        archive: what `npm pack` wrote; None: npm fetches it.

    Raises:
        ScdError: npm is missing or fails, or the archive is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        archive = archive or fetch_runtime(Path(scratch))
        _check(archive)
        folder.mkdir(parents=True)
        with tarfile.open(archive) as package:
            for name in FILES:
                member = package.extractfile(f"package/dist/{name}")
                assert member is not None  # the hash says so
                with member, open(folder / name, "wb") as file:
                    shutil.copyfileobj(member, file)


def fetch_runtime(folder: Path) -> Path:
    """Let npm fetch the package's archive into a folder; return its path.

    Raises:
        ScdError: npm is missing or fails.
    """
    if shutil.which("npm") is None:
        raise ScdError(
            f"web: npm is not installed, which fetches {PACKAGE}: install Node.js, or run npm pack "
            f"{PACKAGE}@{VERSION} elsewhere and give its file with --runtime"
        )
    command = ["npm", "pack", "--prefer-offline", f"{PACKAGE}@{VERSION}"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ScdError(f"web: {' '.join(command)} took more than {NPM_SECONDS} s") from error
    archive = folder / f"{PACKAGE}-{VERSION}.tgz"
    if done.returncode or not archive.is_file():
        raise ScdError(f"web: {' '.join(command)} failed ({reason(Exception(done.stderr))})")
    return archive


def _check(archive: Path) -> None:
    try:
        with open(archive, "rb") as file:
            digest = hashlib.file_digest(file, "sha512").digest()
    except OSError as error:
        raise ScdError(f"{archive}: cannot be read ({error.strerror or error})") from error
    if f"sha512-{base64.b64encode(digest).decode()}" != INTEGRITY:
        raise ScdError(f"{archive}: not {PACKAGE} {VERSION}: its hash is not the pinned one")
