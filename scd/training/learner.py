"""One network under training: its optimiser, its learning rate schedule, its gradient norm."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from scd.errors import ScdError
from scd.options import OptimOptions, Options
from scd.training.optimizer import kept_of_parameters, make_optimizer
from scd.training.sharding import sharded_optimizer_state, whole


class Learner:
    """The task's network, or the adversary that learns against it.

    Args:
        groups, bf16: see `scd.training.optimizer.make_optimizer`.
    """

    def __init__(
        self, network: nn.Module, groups: list[dict[str, Any]], options: Options, bf16: bool
    ):
        self.network = network
        self.options = options
        self.optimizer = make_optimizer(groups, options.optim, bf16)

    def start(
        self, prepared: torch.optim.Optimizer, step: int, moments: dict[str, Any] | None
    ) -> None:
        """Get ready for the step after `step`.

        Args:
            prepared: the optimiser as accelerate gave it back.
            moments: its state so far, as `whole_on_cpu` made it.
        """
        self.optimizer = prepared
        if moments is not None:
            # Rates, betas and weight decay are those of the options; only the moments are state.
            groups = prepared.state_dict()["param_groups"]
            _refuse_other_moments(moments, prepared, step)
            state = sharded_optimizer_state(moments, prepared)
            prepared.load_state_dict({**state, "param_groups": groups})
            for group in prepared.param_groups:
                group["initial_lr"] = group["lr"]  # the schedule goes on from there
        o, steps = self.options.optim, self.options.train.steps
        # Left out of accelerate's hands, which would advance it once for every process.
        self.schedule = LambdaLR(prepared, lambda done: share_of_rate(done, o, steps), step - 1)

    def clip(self, accelerator: Accelerator) -> Tensor:
        """Limit the gradient's norm; returns what it was."""
        limit = self.options.optim.max_grad_norm
        return whole(accelerator.clip_grad_norm_(self.network.parameters(), limit))

    def step(self, apply: bool) -> None:
        """Go on to the next step; `apply` this one's gradients, or drop them."""
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()


def share_of_rate(done: int, options: OptimOptions, steps: int) -> float:
    """The share of its learning rate that a step takes; a function of the steps `done` before it.

    A linear warm-up, whose last step is the first at the full rate. Then `constant`, half a
    `cosine` (arXiv 1608.03983), or for `wsd` (warm-up, stable, decay) constant up to the last
    `decay_steps`, where it falls as 1 - √x: the shape that beat a straight line in
    arXiv 2405.18392. After `steps` both have come down to `min_lr_ratio`.
    """
    o = options
    if done < o.warmup_steps:
        return (done + 1) / o.warmup_steps
    if o.schedule == "constant":
        return 1.0
    falling = steps - o.warmup_steps if o.schedule == "cosine" else o.decay_steps
    fallen = min(max((done - (steps - falling)) / max(falling, 1), 0.0), 1.0)
    if o.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * fallen))
    else:
        left = 1 - math.sqrt(fallen)
    return o.min_lr_ratio + (1 - o.min_lr_ratio) * left


def _refuse_other_moments(
    moments: dict[str, Any], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Raises ScdError for a saved state that is not one of this optimiser on these parameters."""
    parameters = kept_of_parameters(optimizer)

    def fits(index: int, values: dict[str, Tensor]) -> bool:
        parameter, names = parameters[index]
        return (
            values.keys() == names
            and all(v.is_floating_point() and v.isfinite().all() for v in values.values())
            and all(v.shape == (() if n == "step" else parameter.shape) for n, v in values.items())
            and ("step" not in names or 0 <= float(values["step"]) <= step)
        )

    try:
        good = all(
            index in range(len(parameters)) and fits(index, values)
            for index, values in moments["state"].items()
        )
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ScdError(
            "the optimiser's state in the newest checkpoint does not fit the network: move that "
            "checkpoint away to go on from the one before"
        )
