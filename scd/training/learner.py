"""One network under training: its AdamW, its learning rate schedule, its gradient norm."""

from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from scd.options import Options


class Learner:
    """The task's network, or the adversary that learns against it.

    Args:
        groups: parameters with `lr` each.
    """

    def __init__(self, network: nn.Module, groups: list[dict[str, Any]], options: Options):
        o = options.optim
        self.network = network
        self.options = options
        self.optimizer = torch.optim.AdamW(
            groups, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay
        )

    def load_optimizer(self, state: dict[str, Any]) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate  # the schedule is a function of options and step alone

    def start(self, accelerator: Accelerator, step: int) -> None:
        """Get ready for the step after `step`."""
        o = self.options.optim
        # Left out of accelerate's hands, which would advance it once for every process.
        self.schedule = get_scheduler(
            "cosine" if o.schedule == "cosine" else "constant_with_warmup",
            self.optimizer,
            num_warmup_steps=o.warmup_steps,
            num_training_steps=self.options.train.steps,
            last_epoch=step - 1,
        )
        self.optimizer = accelerator.prepare(self.optimizer)

    def clip(self, accelerator: Accelerator) -> Tensor:
        """Limit the gradient's norm; returns what it was."""
        limit = self.options.optim.max_grad_norm
        return accelerator.clip_grad_norm_(self.network.parameters(), limit)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
