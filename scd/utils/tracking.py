"""Log to TensorBoard and wandb, from training and evaluation."""

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

STEP = "step"  # the metric that wandb plots all others over
RUN_FILE = "wandb.json"  # in an experiment's folder, with the ID of its wandb run


def trackers_of(options: "Options", job: str) -> list[str | GeneralTracker]:
    """Make the trackers of `train.trackers` for `Accelerator(log_with=...)`.

    Args:
        job: `train`: one wandb run for the whole experiment, however often it is restarted;
            `evaluation`: a new run each time.

    Raises:
        ScdError: one of them is not installed.
    """
    found: list[str | GeneralTracker] = []
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in options.train.trackers:
        if not installed[name]():
            raise ScdError(
                f"train.trackers: {name} is not installed; run pip install -e '.[trackers]'"
            )
        found.append(WandB(options, job) if name == "wandb" else name)
    return found


class WandB(WandBTracker):
    """Accelerate's wandb tracker, with a run that a resumed training continues.

    The training step is a metric that the others are plotted over. Wandb's own step only grows,
    even from one process to the next: a training that resumes from a checkpoint would lose what it
    logs until it is past the last step of the killed one.
    """

    def __init__(self, options: "Options", job: str):
        super().__init__(options.train.wandb_project)
        self.options = options
        self.job = job

    @on_main_process
    def start(self) -> None:
        """Start the run, or continue it.

        Raises:
            ScdError: wandb does not start, with its reason and what to do.
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
                f"with `wandb login`, or set WANDB_MODE=offline and upload the run later with "
                f"`wandb sync`"
            ) from error
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.run.log({**values, STEP: step}, **kwargs)

    @on_main_process
    def log_files(self, pictures: dict[Path, str], videos: dict[Path, str], step: int) -> None:
        """Log files with their captions: a panel for each picture, one for all videos."""
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
    """Log the pictures of a validation's folder, and to wandb its videos as well.

    Args:
        captions: by glob pattern; the PNG and mp4 files that match are logged.
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
    """Read the ID of an experiment's wandb run from its file, or draw one and write it there."""
    if not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    kept = read_json(file)
    id_ = kept.get("id") if isinstance(kept, dict) else None
    if not isinstance(id_, str) or not re.fullmatch(r"[\w-]{1,64}", id_):
        raise ScdError(f"{file}: holds no ID of a wandb run; remove it to start a new run")
    return id_
