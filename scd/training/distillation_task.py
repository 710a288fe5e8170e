"""Distil a world model: consistency distillation, or distribution matching on its own rollouts.

The house's own models and Wans alike: the tasks differ in their data, and in where teachers lie.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from scd.distill.consistency import ConsistencyObjective
from scd.distill.critic import Critic
from scd.distill.dmd import DMDObjective, trains_student
from scd.distill.teacher import load_teacher
from scd.errors import ScdError
from scd.models.world_model import CausalWorldModel, WorldModel
from scd.options import ModelOptions, Options, RolloutOptions
from scd.training.distillation_cost import distillation_cost, teacher_options
from scd.training.step_cost import ClipCost
from scd.training.wan_task import WanTask
from scd.training.world_model_task import WorldModelTask
from scd.wan.from_options import teacher_wan

HEAD_LR_SCALE = 30  # the head is fresh, the features that it reads are trained


class Distillation(WorldModelTask):
    """What the tasks of post-training a student that starts from `init_from` share; see `Task`."""

    network: CausalWorldModel

    def _learn_from(
        self, load: Callable[[str], tuple[WorldModel, ModelOptions]], device: torch.device
    ) -> None:
        """Take the objective of `distill.method` in place of the task's own.

        Args:
            load: the teacher that an option names, and its kind and sizes.
        """
        options = self.options
        _warn_of_a_wasted_step(options.rollout)
        (teacher, self.teacher_kind), weak = load("distill.teacher"), None
        if options.distill.weak_teacher is not None:
            weak, _ = load("distill.weak_teacher")
            _refuse_other_kind(teacher, weak)
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

    def on_average_changed(self, average: dict[str, Tensor]) -> None:
        if isinstance(self.objective, ConsistencyObjective):
            self.objective.set_target(average)

    def clip_cost(self) -> ClipCost:
        """Count what a clip costs in all networks, with the student's share of an average step."""
        train = replace(self.options.train, batch_size=1, gradient_checkpointing=False)
        options = replace(self.options, train=train)
        cost = distillation_cost(options, self.codec, self.teacher_kind)
        return ClipCost(cost.tokens, cost.flops)


def _refuse_other_kind(teacher: WorldModel, weak: WorldModel) -> None:
    """Refuse guidance whose direction would be from frames seen before to all frames seen."""
    kinds = [isinstance(model, CausalWorldModel) for model in (teacher, weak)]
    if kinds[0] != kinds[1]:
        names = " and a ".join("causal" if causal else "bidirectional" for causal in kinds)
        raise ScdError(
            f"distill.teacher and distill.weak_teacher: a {names} model, but the weak one must be "
            f"of the teacher's kind; take an early checkpoint of the teacher's own training"
        )


def _warn_of_a_wasted_step(rollout: RolloutOptions) -> None:
    if rollout.spacing == "diffusers" and rollout.steps > 1 and PartialState().is_main_process:
        print(
            f"note: rollout.spacing=diffusers: the last of rollout.steps={rollout.steps} begins "
            "with hardly any noise and does next to nothing; few steps want rollout.spacing=even",
            file=sys.stderr,
        )


class DistillationTask(Distillation):
    """The task of post-training one of the house's own models; see `Task`."""

    def __init__(self, options: Options, device: torch.device):
        super().__init__(options, device)

        def load(option: str) -> tuple[WorldModel, ModelOptions]:
            loaded = load_teacher(options, self.network, self.codec, device, option)
            return loaded.model, loaded.options.model

        self._learn_from(load, device)


class WanDistillationTask(Distillation, WanTask):
    """The task of post-training a causal Wan; see `Task`."""

    def __init__(self, options: Options, device: torch.device):
        WanTask.__init__(self, options, device)

        def load(option: str) -> tuple[WorldModel, ModelOptions]:
            teacher, kind = teacher_wan(options, self.network, option).to(device), options.model
            if options.distill.method == "dmd":
                kind = replace(teacher_options(kind), layers=len(teacher.blocks))
            return teacher, kind

        self._learn_from(load, device)
