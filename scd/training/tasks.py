"""What a task gives the training loop."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from scd.data.clips import ClipFolder
from scd.training.estimate import ClipCost
from scd.training.world_model_task import HeldOutLoss


class Task(Protocol):
    """One thing that can be trained."""

    training_data: ClipFolder
    pictures: dict[str, str]  # that `validate` writes, by glob pattern, and their captions

    @property
    def held_out(self) -> HeldOutLoss | None:
        """The loss on held-out clips; None where `train.val_loss_every` does not ask for it."""
        ...

    @property
    def objective(self) -> nn.Module:
        """forward(batch) -> {"loss": scalar, other scalars to log}; holds the network."""
        ...

    @property
    def discriminator(self) -> nn.Module | None:
        """A second part of the objective, which learns against the network: its own optimiser
        steps on the gradients of the same loss. It is saved, but neither averaged nor exported."""
        ...

    @property
    def network(self) -> nn.Module:
        """The part that is optimised, averaged and saved."""
        ...

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Preprocess a batch on the device, outside the module that accelerate wraps."""
        ...

    def clip_cost(self) -> ClipCost | None:
        """Work out what a clip costs; None: it cannot be."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `scd.training.optimizer.make_optimizer`."""
        ...

    def validate(self, network: Any, folder: Path) -> dict[str, float]:
        """Write pictures of a copy of the network into `folder`; return metrics.

        Every process calls it; what it returns counts on the main process only.
        """
        ...

    def export(self, network: Any, folder: Path) -> None:
        """Save a copy of the network for use outside training (diffusers format)."""
        ...
