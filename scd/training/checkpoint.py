"""Write and read checkpoints: folders that are whole or absent, with all that resuming needs.

`step-00001000/` holds `model.safetensors`, `ema.safetensors`, `optimizer.pt`, with a critic (a
discriminator or a fake score) `adversary.pt`, with snapshots `averages.safetensors`, and
`manifest.json`.
Weights carry the experiment's options in their metadata, so one file is enough to use a model.
Nothing else is state: data order and noise are functions of the step (`scd.utils.seeding`).

A name that begins with a dot is a folder that is being written or deleted. Only the holder of the
experiment's lock writes here (`scd.utils.locks`), so any such folder at start is from a dead run.
"""

import io
import json
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd.errors import ScdError, reason
from scd.options import Options, with_present_names
from scd.utils.environment import git_commit
from scd.utils.files import flush, read_json, set_usual_mode, sha256, write_json
from scd.utils.processes import error_barrier
from scd.utils.tensor_files import read_pt

FORMAT = 2
MODEL, EMA, OPTIMIZER = FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt")
CRITIC = "adversary.pt"
AVERAGES = "averages.safetensors"
MANIFEST = "manifest.json"


@dataclass
class TrainingState:
    """Everything that changes during training, on the CPU."""

    step: int
    run: dict[str, Any]  # see `scd.training.resume.run_identity`
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    critic: dict[str, Any] | None = None  # its `model` and `optimizer`
    averages: dict[str, Tensor] = field(default_factory=dict)  # see `PostHocEMA`
    bad_steps: int = 0  # in a row, up to this step


def saves_in_background(device: torch.device) -> bool:
    """Check whether training on this device leaves the CPU free to write checkpoints."""
    return device.type == "cuda"


class CheckpointWriter:
    """The writer of a run's checkpoints, in the foreground or in a background thread.

    In the background, `write` returns at once: the state shares no memory with what is trained. At
    most one checkpoint is being written at a time. A context, which is left when it is on disk.

    Args:
        folder, keep: see `save_checkpoint`.
        main: whether this is the main process; the others only take part in collective calls.
        background: whether to write in a thread.
    """

    def __init__(self, folder: Path, keep: int, main: bool, background: bool):
        self.folder = folder
        self.keep = keep
        self.main = main
        self.threads = ThreadPoolExecutor(1, "checkpoint") if main and background else None
        self.pending: Future[Path] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.threads is not None:
            self.threads.shutdown()

    @property
    def failed(self) -> bool:
        """Whether the pending checkpoint cannot be written; `finish` then raises the reason."""
        pending = self.pending
        return pending is not None and pending.done() and pending.exception() is not None

    def write(self, state: TrainingState) -> None:
        """Write a checkpoint; collective. Call `finish` first, which frees the last one's memory.

        Raises:
            ScdError: see `save_checkpoint`; in the background, `finish` raises it.
        """
        with error_barrier():
            if self.threads is not None:
                self.pending = self.threads.submit(save_checkpoint, self.folder, state, self.keep)
            elif self.main:
                save_checkpoint(self.folder, state, self.keep)

    def finish(self) -> None:
        """Wait until the pending checkpoint is on disk; collective.

        Raises:
            ScdError: see `save_checkpoint`.
        """
        with error_barrier():
            if self.pending is not None:
                pending, self.pending = self.pending, None
                pending.result()


def save_checkpoint(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write a checkpoint aside, flush it, verify it, rename it into place, then delete the oldest.

    To verify it, every tensor is read back from disk and compared to the bit with memory.

    Args:
        keep: the number of checkpoints to keep, this one included.

    Raises:
        ScdError: the disk is full, the folder is read-only, or what was read back differs; earlier
            checkpoints are untouched.
    """
    target = folder / f"step-{state.step:08d}"
    aside = folder / f".{target.name}.{os.getpid()}"
    contents: dict[str, Any] = {MODEL: state.model, EMA: state.ema, OPTIMIZER: state.optimizer}
    if state.critic is not None:
        contents[CRITIC] = state.critic
    if state.averages:
        contents[AVERAGES] = state.averages
    metadata = {"options": json.dumps(state.run["options"]), "step": str(state.step)}
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a dead process with the same ID
        aside.mkdir(parents=True)
        for name, content in contents.items():
            _write(aside / name, content, metadata)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "git_commit": git_commit(),
            "run": state.run,
            "bad_steps": state.bad_steps,
            "files": {name: _fingerprint(aside / name) for name in contents},
        }
        write_json(aside / MANIFEST, manifest)  # last: it flushes the folder
        for name, content in contents.items():
            if not _reads_back(aside / name, content):
                raise OSError(f"{name} reads back differently")
        os.replace(aside, target)
        flush(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ScdError(f"{target}: the checkpoint cannot be written ({reason(error)})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    older = [path for path in _checkpoints(folder) if path.name < target.name]
    for old in older[: max(len(older) - (keep - 1), 0)]:
        _remove(old)
    return target


def start_is_lost(options: Options) -> bool:
    """Check whether `init_from` is gone and no longer needed, since there are checkpoints.

    They may well have been a checkpoint of another run, which keeps the newest alone.
    """
    path = options.init_from
    lost = path is not None and not Path(path).exists()
    return lost and bool(_checkpoints(options.output / "checkpoints"))


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest whole checkpoint; print a line about each that is skipped.

    Raises:
        ScdError: there are checkpoints, but none is whole: starting anew is the user's decision.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            return path
        print(f"{path}: skipped, {problem}")
    if found:
        raise ScdError(
            f"{folder}: none of the {len(found)} checkpoints is whole; move them away to start anew"
        )
    return None


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint, which `latest_checkpoint` has checked."""
    try:
        manifest = read_json(path / MANIFEST)
        run = manifest["run"]
        return TrainingState(
            step=int(manifest["step"]),
            run={**run, "options": with_present_names(run["options"], str(path))},
            model=_read(path / MODEL),
            ema=_read(path / EMA),
            optimizer=_read(path / OPTIMIZER),
            critic=_read(path / CRITIC) if CRITIC in manifest["files"] else None,
            averages=_read(path / AVERAGES) if AVERAGES in manifest["files"] else {},
            bad_steps=int(manifest["bad_steps"]),
        )
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ScdError(f"{path}: the checkpoint cannot be read ({error})") from error


def set_newer_checkpoints_aside(path: Path) -> None:
    """Rename the checkpoints newer than `path`, which were skipped, to `passed-over-step-…`.

    They would count among those to keep, and be in the way of those that the run writes next.
    """
    for newer in _checkpoints(path.parent):
        if newer.name > path.name:
            aside = newer.with_name(f"passed-over-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            print(f"{newer}: renamed to {aside.name}; inspect it or delete it")


def remove_leftovers(folder: Path) -> None:
    """Delete checkpoints that killed runs left half written or half deleted."""
    for path in folder.glob(".step-*"):
        _delete(path)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def _remove(path: Path) -> None:
    """Delete a checkpoint; a kill half way leaves nothing that could pass for one."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.rename(hidden)
        _delete(hidden)


def _delete(hidden: Path) -> None:
    """Delete a folder, or leave it to the next start of the run.

    NFS keeps the files that another process has open. The run must not end for that.
    """
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        print(f"note: {hidden} cannot be deleted yet ({reason(error)})", file=sys.stderr)


def _write(path: Path, content: dict[str, Any], metadata: dict[str, str]) -> None:
    if path.suffix == ".safetensors":
        save_file(content, path, metadata)
        set_usual_mode(path)
    else:
        with _File(io.FileIO(path, "wb")) as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                raise file.failure or error from error


class _File(io.BufferedWriter):
    """A file that remembers why it could not be written: `torch.save` hides a full disk."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return read_pt(path)


def _reads_back(path: Path, content: dict[str, Any]) -> bool:
    try:
        return _equal(_read(path), content)
    except Exception:  # damaged files raise many kinds
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    """Return size and hash of a file, read from the disk rather than from the page cache."""
    flush(path)
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _equal(one: Any, other: Any) -> bool:
    """Check whether two nested states are equal; tensors to the bit."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_equal(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _damage(path: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None: nothing."""
    try:
        manifest = read_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        run = manifest["run"]
        if not isinstance(run["options"], dict) or type(run["clips_per_step"]) is not int:
            return "its manifest is damaged"
        if path.name != f"step-{manifest['step']:08d}":
            return f"its manifest is that of step {manifest['step']}"
        if not {*FILES} <= {*manifest["files"]} <= {*FILES, CRITIC, AVERAGES}:
            return "its manifest names other files"
        for name, wanted in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} is damaged ({size} bytes instead of {wanted['bytes']})"
            if sha256(path / name) != wanted["sha256"]:
                return f"{name} is damaged"
    except (ScdError, OSError, KeyError, TypeError, ValueError) as error:
        return f"incomplete ({error})"
    return None
