"""Optimize a network with AdamW, or with Muon for its matrices and AdamW for the rest."""

import math
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from scd.errors import ScdError
from scd.options import OptimOptions, Options
from scd.utils.sharding import full_tensor, gather_on_cpu, shard_like, shard_optimizer_state

Groups = list[dict[str, Any]]


def make_optimizer(groups: Groups, options: OptimOptions, bf16: bool) -> Optimizer:
    """Build AdamW, or AdamW and Muon as one optimizer if there are groups for Muon.

    Args:
        groups: `params` and their `lr`; for Muon also `muon`, the number of matrices that each
            parameter is a stack of, one above the other; empty or absent for AdamW.
        bf16: whether Muon orthogonalizes in bf16; the same on every process.
    """
    matrices = [group for group in groups if uses_muon(group)]
    adamw = AdamW(
        [group for group in groups if not uses_muon(group)],
        betas=(options.betas[0], options.betas[1]),
        weight_decay=options.weight_decay,
        fused=True,
    )
    if not matrices:
        return adamw
    dtype = torch.bfloat16 if bf16 else torch.float32
    return AdamWithMuon(adamw, Muon(matrices, dtype, weight_decay=options.weight_decay))


class Muon(torch.optim.Muon):
    """Torch's Muon, with stacks of matrices and a choice of type to orthogonalize in.

    Queries, keys and values are one parameter, but three maps: orthogonalized as one, the map with
    the largest gradient takes most of the update. Each by itself, they move equally far, and
    together as far as the one would: three updates of Frobenius norm √D, each with a rate of
    √(D/D) = 1, are as long as one of √D with Muon's rate of √(3D/D) for tall matrices.

    Torch's own always takes bf16. On a device that only emulates it, that costs ten times the rest
    of a training step.
    """

    def __init__(self, params: Groups | list[Tensor], dtype: torch.dtype, **settings: Any):
        super().__init__(params, **settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p, count in zip(group["params"], group["muon"], strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - momentum)
                # With Nesterov momentum. Singular values are those of full matrices: gathered
                # once, not in each of the products.
                update = full_tensor(p.grad.lerp(buffer, momentum))
                if count > 1:
                    update = update.unflatten(0, (count, -1))
                rows, columns = update.shape[-2:]
                update = orthogonalize(update, self.dtype).reshape(p.shape)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(shard_like(update, p), alpha=-lr * math.sqrt(max(1.0, rows / columns)))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Move the singular values of a matrix, or of each of (n, rows, columns), to about 1.

    Takes five Newton-Schulz steps of the fifth order, with the coefficients of Keller Jordan's
    Muon, as in `torch.optim.Muon`.
    """
    # In bf16 on the CPU, a batch of one takes 1.1 to 1.3 times as long as a matrix.
    add_product = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    wide = matrices.shape[-2] <= matrices.shape[-1]  # the smaller Gram matrix
    x = matrices.to(dtype) if wide else matrices.to(dtype).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        fifth = add_product(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = add_product(x, fifth, x, beta=3.4445)
    return x if wide else x.mT


class AdamWithMuon(Optimizer):
    """AdamW and Muon, each with its own parameters, as one optimizer to schedule and save."""

    def __init__(self, adamw: AdamW, muon: Muon):
        self.adamw, self.muon = adamw, muon
        super().__init__(adamw.param_groups + muon.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Make both use the groups and the state of this optimizer."""
        count = len(self.adamw.param_groups)
        self.adamw.param_groups = self.param_groups[:count]
        self.muon.param_groups = self.param_groups[count:]
        self.adamw.state = self.muon.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.step()
        self.muon.step()


def uses_muon(group: dict[str, Any]) -> bool:
    return bool(group.get("muon"))


class OptimizedModel:
    """A network with its optimizer and learning rate schedule.

    Args:
        network: the task's, or its critic.
        groups, bf16: see `make_optimizer`.
    """

    def __init__(self, network: nn.Module, groups: Groups, options: Options, bf16: bool):
        self.network = network
        self.options = options
        self.optimizer = make_optimizer(groups, options.optim, bf16)

    def start(self, prepared: Optimizer, step: int, saved: dict[str, Any] | None) -> None:
        """Load the optimizer's state and set the schedule, for the step after `step`.

        Args:
            prepared: the optimizer, prepared by accelerate.
            saved: its state dict from the checkpoint, with full tensors; None: there is none.

        Raises:
            ScdError: the state does not fit this optimizer.
        """
        self.optimizer = prepared
        if saved is not None:
            # Rates, betas and weight decay are those of the options; only the moments are state.
            groups = prepared.state_dict()["param_groups"]
            _refuse_other_state(saved, prepared, step)
            state = shard_optimizer_state(saved, prepared)
            prepared.load_state_dict({**state, "param_groups": groups})
            for group in prepared.param_groups:
                group["initial_lr"] = group["lr"]  # which the schedule multiplies
        o, steps = self.options.optim, self.options.train.steps
        # Not prepared by accelerate, which would advance it once for every process.
        self.schedule = LambdaLR(prepared, lambda done: lr_multiplier(done, o, steps), step - 1)

    @property
    def lr(self) -> float:
        """The learning rate of the first group in the next step."""
        return float(self.schedule.get_last_lr()[0])

    def clip_gradient(self, accelerator: Accelerator) -> Tensor:
        """Clip the gradient to `optim.max_grad_norm`; return its norm before that."""
        limit = self.options.optim.max_grad_norm
        norm = full_tensor(accelerator.clip_grad_norm_(self.network.parameters(), limit))
        return norm.to(accelerator.device)  # without any gradient it would be on the CPU

    def step(self, apply: bool) -> None:
        """Apply the gradients, or drop them, and advance the schedule."""
        if apply:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():  # of a schedule that is ahead of an optimizer that waits
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()

    def state(self, keep: bool) -> dict[str, Any]:
        """Gather `model` and `optimizer` state dicts on the CPU; collective.

        Args:
            keep: see `gather_on_cpu`.
        """
        return {
            "model": gather_on_cpu(self.network.state_dict(), keep),
            "optimizer": gather_on_cpu(self.optimizer.state_dict(), keep),
        }


def lr_multiplier(done: int, options: OptimOptions, steps: int) -> float:
    """Compute what the learning rate is multiplied by in the step after `done` steps.

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


def _refuse_other_state(saved: dict[str, Any], optimizer: Optimizer, step: int) -> None:
    """Refuse a saved state that is not one of this optimizer on these parameters.

    Raises:
        ScdError: it has other names, shapes, types or steps, or values that are not finite.
    """
    parameters = [  # in the order of the saved state
        (p, {"momentum_buffer"} if uses_muon(group) else {"step", "exp_avg", "exp_avg_sq"})
        for group in optimizer.param_groups
        for p in group["params"]
    ]

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
            for index, values in saved["state"].items()
        )
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ScdError(
            "the optimizer's state in the newest checkpoint does not fit the network: move that "
            "checkpoint away to go on from the one before"
        )
