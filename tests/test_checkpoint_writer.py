"""Checkpoints that are written while training goes on."""

import threading
from pathlib import Path

import pytest
import torch

from scd.errors import ScdError
from scd.options import load_options
from scd.training import checkpoint, launch, trainer
from scd.training.checkpoint import (
    CheckpointWriter,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from tests.test_processes import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


def state(step: int) -> TrainingState:
    tensors = {"w": torch.full((3,), float(step))}
    return TrainingState(step, {"options": {}, "clips_per_step": 1}, tensors, tensors, {})


def test_training_goes_on_while_a_checkpoint_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*arguments: object) -> Path:
        begun.set()
        assert may_end.wait(60)
        return save_checkpoint(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    with CheckpointWriter(tmp_path, keep=2, main=True, background=True) as writer:
        writer.write(state(1))
        assert begun.wait(60) and not writer.failed
        assert not list(tmp_path.glob("step-*"))
        may_end.set()
        writer.finish()  # the next save waits for the one before
        assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000001"]
        writer.write(state(2))
    assert load_checkpoint(tmp_path / "step-00000002").step == 2  # there when the block is left


def test_the_same_files_as_in_the_foreground(
    monkeypatch: pytest.MonkeyPatch, doom_root: Path, tmp_path: Path
) -> None:
    """Weights that are trained on while they are written are not those that are written."""
    for name in ("foreground", "background"):
        if name == "background":
            monkeypatch.setattr(trainer, "saves_in_background", lambda device: True)
        launch.run_experiment(tiny(doom_root, tmp_path, name))
    for step in ("step-00000002", "step-00000004"):
        one, other = (
            load_checkpoint(tmp_path / name / "checkpoints" / step)
            for name in ("foreground", "background")
        )
        assert one.model.keys() == other.model.keys()
        assert all(torch.equal(other.model[name], tensor) for name, tensor in one.model.items())


def test_what_fails_in_the_background_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, doom_root: Path, tmp_path: Path
) -> None:
    """Within steps, not at the next save."""

    def full(folder: Path, state: TrainingState, keep: int) -> Path:
        raise ScdError(f"{folder}: the checkpoint cannot be written (No space left on device)")

    monkeypatch.setattr(trainer, "saves_in_background", lambda device: True)
    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(ScdError, match="cannot be written"):
        steps = ("train.save_every=10", "train.steps=20")
        launch.run_experiment(tiny(doom_root, tmp_path, "full", *steps))
    assert 10 <= (tmp_path / "full/log.jsonl").read_text().count("loss") < 20


def tiny(doom_root: Path, root: Path, name: str, *more: str):
    return load_options(
        OPTIONS,
        [
            *(f"data.root={doom_root}", f"output_root={root}", f"name={name}"),
            *("data.source=video", "autoencoder.path=null", "data.frames=3", "model.patch_size=16"),
            *("model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"),
            *("train.steps=4", "train.save_every=2", "train.workers=0", "train.batch_size=1"),
            *("train.log_every=1", "train.mixed_precision=fp32", "eval.videos=1"),
            *("eval.context_frames=1", "eval.new_frames=2", "optim.warmup_steps=0"),
            *more,
        ],
    )
