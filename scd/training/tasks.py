"""Define what a trainer trains, and build the task that the options name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from scd.data.clips import Clips
from scd.options import Options
from scd.training.step_cost import ClipCost


class Task(Protocol):
    """The objective, data, validation and export of one kind of training."""

    pictures: dict[str, str]  # captions of the files that `validate` writes, by glob pattern

    @property
    def training_data(self) -> Clips: ...

    @property
    def network(self) -> nn.Module:
        """The network that is optimised, averaged and saved."""
        ...

    @property
    def objective(self) -> nn.Module:
        """forward(batch) -> {"loss": scalar, other scalars to log}; holds the network."""
        ...

    @property
    def critic(self) -> nn.Module | None:
        """The network that learns beside the task's, from the gradients of the same loss.

        A discriminator, or the fake score of a distillation. It has its own optimizer. It is saved,
        but neither averaged nor exported.
        """
        ...

    @property
    def held_out(self) -> Callable[[Any, str], dict[str, float]] | None:
        """The held-out loss of (network, precision); None unless `train.val_loss_every` is set."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group the network's parameters, see `scd.training.optimizer.make_optimizer`."""
        ...

    def critic_groups(self) -> list[dict[str, Any]]:
        """Group the critic's parameters likewise."""
        ...

    def trains_network(self, step: int) -> bool:
        """Check whether a step, from 1, updates the network; every step updates the critic."""
        ...

    def on_average_changed(self, average: dict[str, Tensor]) -> None:
        """Take notice of the network's moving average, at the start and whenever it changes."""
        ...

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess a batch on the device, outside the module that accelerate wraps.

        It has tensors, `sample`, the numbers of the clips, and `step`, the number of the step.
        """
        ...

    def clip_cost(self) -> ClipCost | None:
        """Count what a clip costs; None: unknown."""
        ...

    def validate(self, network: Any, folder: Path) -> dict[str, float]:
        """Write pictures made by a copy of the network into `folder`, and return metrics.

        Every process calls it; the metrics count on the main process only.
        """
        ...

    def export(self, network: Any, folder: Path) -> None:
        """Save a copy of the network for use outside training (diffusers format)."""
        ...


def build_task(options: Options, accelerator: Accelerator) -> Task:
    """Build the task that `task` names; its imports are those of this task alone."""
    if options.task == "autoencoder":
        from scd.training.autoencoder_task import AutoencoderTask

        return AutoencoderTask(options, accelerator.device)
    if options.distill.method != "none":
        from scd.training.distillation_task import DistillationTask, WanDistillationTask

        kind = WanDistillationTask if options.model.is_wan else DistillationTask
        return kind(options, accelerator.device)
    if options.model.is_wan:
        from scd.training.wan_task import WanTask

        return WanTask(options, accelerator.device)
    from scd.training.world_model_task import WorldModelTask

    return WorldModelTask(options, accelerator.device)
