"""Checkpoints: a folder that is whole or absent, with everything a run needs to go on.

`step-00001000/` holds `model.safetensors`, `ema.safetensors`, `optimizer.pt`, with an adversary
`adversary.pt`, and `manifest.json`.
Weights carry the experiment's options in their metadata, so one file is enough to use a model.
Nothing else is state: data order and noise are functions of the step (`scd.seeding`).
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd.errors import ScdError
from scd.files import read_json, sha256, write_json
from scd.tensor_files import read_pt

FORMAT = 1
FILES = ("model.safetensors", "ema.safetensors", "optimizer.pt")
ADVERSARY = "adversary.pt"


@dataclass
class TrainingState:
    """All that changes while training, on the CPU."""

    step: int
    run: dict[str, Any]  # see `scd.training.resume.run_identity`
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    adversary: dict[str, Any] | None = None  # its `model` and `optimizer`


def save_checkpoint(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write a checkpoint beside the others, put it in place, then remove the oldest beyond `keep`.

    Raises:
        ScdError: the disk is full or the folder read-only; earlier checkpoints are untouched.
    """
    target = folder / f"step-{state.step:08d}"
    aside = folder / f".{target.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        metadata = {"options": json.dumps(state.run["options"]), "step": str(state.step)}
        save_file(state.model, aside / FILES[0], metadata)
        save_file(state.ema, aside / FILES[1], metadata)
        torch.save(state.optimizer, aside / FILES[2])
        names: tuple[str, ...] = FILES
        if state.adversary is not None:
            torch.save(state.adversary, aside / ADVERSARY)
            names += (ADVERSARY,)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "run": state.run,
            "files": {name: sha256(aside / name) for name in names},
        }
        write_json(aside / "manifest.json", manifest)
        for name in names:
            with open(aside / name, "rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ScdError(f"{target}: the checkpoint cannot be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    older = [path for path in _checkpoints(folder) if path.name < target.name]
    for old in older[: max(len(older) - (keep - 1), 0)]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one line on stdout for each that is passed over."""
    for path in reversed(_checkpoints(folder)):
        problem = _damage(path)
        if problem is None:
            return path
        print(f"{path}: passed over, {problem}")
    return None


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint that `latest_checkpoint` found whole."""
    try:
        manifest = read_json(path / "manifest.json")
        return TrainingState(
            step=int(manifest["step"]),
            run=manifest["run"],
            model=load_file(path / FILES[0]),
            ema=load_file(path / FILES[1]),
            optimizer=read_pt(path / FILES[2]),
            adversary=read_pt(path / ADVERSARY) if ADVERSARY in manifest["files"] else None,
        )
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise ScdError(f"{path}: the checkpoint cannot be read ({error})") from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def _damage(path: Path) -> str | None:
    try:
        manifest = read_json(path / "manifest.json")
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        run = manifest["run"]
        if not isinstance(run["options"], dict) or type(run["clips_per_step"]) is not int:
            return "its manifest is damaged"
        if path.name != f"step-{manifest['step']:08d}":
            return f"its manifest is that of step {manifest['step']}"
        if not {*FILES} <= {*manifest["files"]} <= {*FILES, ADVERSARY}:
            return "its manifest names other files"
        for name in manifest["files"]:
            if sha256(path / name) != manifest["files"][name]:
                return f"{name} is damaged"
    except (ScdError, OSError, KeyError, TypeError, ValueError) as error:
        return f"incomplete ({error})"
    return None
