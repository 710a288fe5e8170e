"""An evaluation's table in TensorBoard and wandb."""

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from scd.evaluation.table import Table
from scd.options import Options
from scd.tracking import trackers_of


def track_table(options: Options, step: int, table: Table, scalars: dict[str, float]) -> None:
    """Log a table, and numbers by name, to the trackers of `train.trackers` (main process only).

    Raises:
        ScdError: see `scd.tracking.WandB.start`.
    """
    accelerator = Accelerator(
        log_with=trackers_of(options, "evaluation"),
        project_config=ProjectConfiguration(str(options.output), str(options.output / "trackers")),
        cpu=not torch.cuda.is_available(),
    )
    accelerator.init_trackers(options.name)
    accelerator.log(scalars, step=step)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("evaluation", table.markdown(), step)
        elif tracker.name == "wandb":
            tracker.log_table("evaluation", columns=table.heads, data=table.lines, step=step)
    accelerator.end_training()
