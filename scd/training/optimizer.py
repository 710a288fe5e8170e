"""The optimiser: AdamW, or with `optim.muon_lr` Muon for large matrices and AdamW for the rest."""

from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from scd.options import OptimOptions

Groups = list[dict[str, Any]]


def make_optimizer(groups: Groups, options: OptimOptions) -> Optimizer:
    """
    Args:
        groups: parameters with `lr` each, and `muon`: True where Muon is to train them.
    """
    matrices = [group for group in groups if is_muon(group)]
    adamw = AdamW(
        [group for group in groups if not is_muon(group)],
        betas=(options.betas[0], options.betas[1]),
        weight_decay=options.weight_decay,
        fused=True,  # one pass over the weights
    )
    if not matrices:
        return adamw
    return AdamWithMuon(adamw, Muon(matrices, weight_decay=options.weight_decay))


class AdamWithMuon(Optimizer):
    """Two optimisers of different parameters as one, for what schedules, shards and saves them."""

    def __init__(self, adamw: AdamW, muon: Muon):
        self.adamw, self.muon = adamw, muon
        super().__init__(adamw.param_groups + muon.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state of this one."""
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


def is_muon(group: dict[str, Any]) -> bool:
    return group.get("muon", False)


def kept_of_parameters(optimizer: Optimizer) -> list[tuple[torch.Tensor, set[str]]]:
    """Each parameter, in the order of the saved state, and the names of what is kept of it."""
    return [
        (p, {"momentum_buffer"} if is_muon(group) else {"step", "exp_avg", "exp_avg_sq"})
        for group in optimizer.param_groups
        for p in group["params"]
    ]
