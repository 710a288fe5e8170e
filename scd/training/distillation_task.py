"""Distil a world model: consistency distillation, or distribution matching on its own rollouts.

The house's own models and Wans alike: the tasks differ in their data, and in where teachers lie.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from scd.distill.consistency import ConsistencyObjective
from scd.distill.critic import Critic
from scd.distill.dmd import DMDObjective, trains_student
from scd.distill.teacher import load_teacher
from scd.models.world_model import CausalWorldModel, WorldModel
from scd.options import Options
from scd.training.wan_task import WanTask
from scd.training.world_model_task import WorldModelTask
from scd.wan.from_options import teacher_wan

HEAD_LR_SCALE = 30  # the head is fresh, the features that it reads are trained


class Distillation(WorldModelTask):
    """What the tasks of post-training a student that starts from `init_from` share; see `Task`."""

    network: CausalWorldModel

    def _learn_from(self, load: Callable[[str], WorldModel], device: torch.device) -> None:
        """Take the objective of `distill.method` in place of the task's own.

        Args:
            load: the teacher that an option names.
        """
        options = self.options
        teacher, weak = load("distill.teacher"), None
        if options.distill.weak_teacher is not None:
            weak = load("distill.weak_teacher")
        if options.distill.method == "consistency":
            assert isinstance(teacher, CausalWorldModel)
            self.objective = ConsistencyObjective(self.network, teacher, options, weak)
        else:
            # One family, one data domain: a critic of another kind tells student and teacher apart
            # by what has nothing to do with the student.
            score = deepcopy(teacher).requires_grad_(True)
            score.set_gradient_checkpointing(options.train.gradient_checkpointing)
            critic = Critic(score, options.distill.adversarial_weight > 0).to(device)
            self.critic = critic
            self.objective = DMDObjective(self.network, teacher, critic, options, weak)

    def critic_groups(self) -> list[dict[str, Any]]:
        assert isinstance(self.critic, Critic)
        lr = self.options.distill.critic_lr
        groups = [{"params": list(self.critic.score.parameters()), "lr": lr}]
        if self.critic.head is not None:
            groups.append({"params": list(self.critic.head.parameters()), "lr": HEAD_LR_SCALE * lr})
        return groups

    def trains_network(self, step: int) -> bool:
        return self.critic is None or trains_student(self.options, step)

    def averaged(self, average: dict[str, Tensor]) -> None:
        if isinstance(self.objective, ConsistencyObjective):
            self.objective.set_target(average)

    def clip_cost(self) -> None:  # type: ignore[override]
        return None


class DistillationTask(Distillation):
    """The task of post-training one of the house's own models; see `Task`."""

    def __init__(self, options: Options, device: torch.device):
        super().__init__(options, device)

        def load(option: str) -> WorldModel:
            return load_teacher(options, self.network, self.codec, device, option)

        self._learn_from(load, device)


class WanDistillationTask(Distillation, WanTask):
    """The task of post-training a causal Wan; see `Task`."""

    def __init__(self, options: Options, device: torch.device):
        WanTask.__init__(self, options, device)
        self._learn_from(lambda name: teacher_wan(options, self.network, name).to(device), device)
