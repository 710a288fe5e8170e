"""TensorBoard and wandb, for training and evaluation."""

import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.tracking import GeneralTracker, WandBTracker, on_main_process
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image

from scd.errors import ScdError
from scd.utils.files import read_json, write_json

if TYPE_CHECKING:
    from scd.options import Options

STEP = "step"  # the metric that wandb draws all others over
RUN_FILE = "wandb.json"  # in an experiment's folder, with the id of its wandb run


def trackers_of(options: "Options", job: str) -> list[str | GeneralTracker]:
    """What `Accelerator(log_with=...)` takes to log to `train.trackers`.

    Args:
        job: `train`: one wandb run for the whole of an experiment, however often it is restarted;
            `evaluation`: a run of its own each time.

    Raises:
        ScdError: one of them is not installed.
    """
    found: list[str | GeneralTracker] = []
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in options.train.trackers:
        if not installed[name]():
            raise ScdError(
                f"train.trackers: {name} is not installed; pip install 'scd[trackers]' brings it"
            )
        found.append(WandB(options, job) if name == "wandb" else name)
    return found


class WandB(WandBTracker):
    """Accelerate's tracker, with a run that a restarted training goes on with.

    The training step is a metric that the others are drawn over. Wandb's own step only grows, even
    from one process to the next: a training that goes on from a checkpoint would lose what it logs
    until it is past the last step of the killed one.
    """

    def __init__(self, options: "Options", job: str):
        super().__init__(options.train.wandb_project)
        self.options = options
        self.job = job

    @on_main_process
    def start(self) -> None:
        """Begin the run, or go on with it.

        Raises:
            ScdError: wandb cannot; its reason, and what to do.
        """
        import wandb

        output = self.options.output
        if "WANDB_DIR" not in os.environ:
            self.init_kwargs["dir"] = str(output / "trackers")
            (output / "trackers").mkdir(parents=True, exist_ok=True)
        if self.job == "train":
            self.init_kwargs |= {"id": _run_id(output / RUN_FILE), "resume": "allow"}
        name = self.options.name
        self.init_kwargs |= {"name": name, "group": name, "job_type": self.job}
        try:
            super().start()
        except wandb.errors.Error as error:
            raise ScdError(
                f"train.trackers: wandb does not start ({' '.join(str(error).split())}): log in "
                f"with `wandb login`, or set WANDB_MODE=offline and send the run with `wandb sync` "
                f"later"
            ) from error
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.run.log({**values, STEP: step}, **kwargs)

    @on_main_process
    def log_files(self, pictures: dict[Path, str], videos: dict[Path, str], step: int) -> None:
        """Log files with their captions: pictures by their names, videos side by side."""
        import wandb

        values: dict[str, Any] = {
            f"val/{path.stem}": wandb.Image(str(path), caption=caption)
            for path, caption in pictures.items()
        }
        if videos:
            values["val/videos"] = [wandb.Video(path, caption=c) for path, c in videos.items()]
        self.log(values, step=step)


def log_pictures(
    trackers: list[GeneralTracker], folder: Path, captions: dict[str, str], step: int
) -> None:
    """Log the pictures that a validation left in a folder, to wandb its videos as well.

    Args:
        captions: by glob pattern; PNG and mp4 files that match one are logged.
    """
    files = {path: text for glob, text in captions.items() for path in sorted(folder.glob(glob))}
    pictures = {path: text for path, text in files.items() if path.suffix == ".png"}
    videos = {p: f"{p.stem}: {text}" for p, text in files.items() if p.suffix == ".mp4"}
    for tracker in trackers:
        if isinstance(tracker, WandB):
            tracker.log_files(pictures, videos, step)
        elif tracker.name == "tensorboard":
            images = {f"val/{path.stem}": np.asarray(Image.open(path))[None] for path in pictures}
            tracker.log_images(images, step=step, dataformats="NHWC")


def _run_id(file: Path) -> str:
    """The wandb run of the experiment that a file belongs to, drawn when there is none yet."""
    if not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    kept = read_json(file)
    id_ = kept.get("id") if isinstance(kept, dict) else None
    if not isinstance(id_, str) or not re.fullmatch(r"[\w-]{1,64}", id_):
        raise ScdError(f"{file}: holds no id of a wandb run; remove it to begin another run")
    return id_
