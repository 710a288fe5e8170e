"""Causal consistency distillation: few-step students of a causal teacher, without its samples.

Every frame, under its history, is noised to one of N levels. One Euler step of the teacher
takes it to the next level; what the student predicts as its clean frame at the first must be what
an average of the student predicts at the second (arXiv 2303.01469, algorithm 2; for causal video
models, under the teacher-forcing mask, arXiv 2605.15141). At the last level the target is the
teacher's own clean frame, from which the equality spreads to all others.

Histories are real, or in a share of steps (`flow.self_forcing_prob`) made by the student's average:
see `scd.rollout.resampling`.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from scd.distill.teacher import GuidedTeacher, clean_frames
from scd.flow.noise import FlowDraws, draw_noise
from scd.flow.objective import drop_conditions, dropped_text
from scd.flow.sampler import noise_levels
from scd.models.world_model import MAX_TIMESTEP, CausalWorldModel, WorldModel
from scd.options import Options
from scd.rollout.resampling import own_history
from scd.utils.seeding import uniform_per_sample


class ConsistencyObjective(nn.Module):
    """The consistency loss of a batch, for the training loop.

    Args:
        model: the student.
        teacher: frozen; the student's initial weights are best the teacher's.
        weak_teacher: see `GuidedTeacher`.
    """

    def __init__(
        self,
        model: CausalWorldModel,
        teacher: CausalWorldModel,
        options: Options,
        weak_teacher: WorldModel | None = None,
    ):
        super().__init__()
        self.model = model
        self.teacher = GuidedTeacher(teacher, options.distill.guidance_scale, weak_teacher)
        self.target = deepcopy(model).requires_grad_(False)  # see `set_target`
        self.options = options
        d = options.distill
        self.levels = noise_levels(d.levels, "even", d.shift)

    @torch.no_grad()
    def set_target(self, average: dict[str, Tensor]) -> None:
        """Copy the student's moving average into the network that makes the targets."""
        for name, parameter in self.target.named_parameters():
            parameter.copy_(average[name])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of clips; see `FlowObjective.forward`."""
        latents, samples = batch["latents"], [int(number) for number in batch["sample"]]
        flow, seed = self.options.flow, self.options.seed
        looks = self.model.takes_first_look or self.teacher.takes_first_look
        draws = draw_noise(flow, seed, samples, latents, None, looks)
        shape = tuple(draws.level.shape[1:])
        place = uniform_per_sample(shape, samples, latents.device, seed, "consistency")
        conditions = self.model.frame_conditions(
            latents.shape[:2], batch.get("actions"), batch.get("label")
        )
        text = dropped_text(batch, draws.drop_condition), batch.get("null_text")
        history = own_history(self.target, flow, seed, batch, steps=1)
        return {"loss": self.loss(latents, conditions, draws, place, *text, history)}

    def loss(
        self,
        latents: Tensor,
        conditions: Tensor | None,
        draws: FlowDraws,
        place: Tensor,
        text: Tensor | None = None,
        null_text: Tensor | None = None,
        history: Tensor | None = None,
    ) -> Tensor:
        """Compute ‖x̂(x_t, t) − sg x̂⁻(x_t′, t′)‖², averaged over everything.

        Args:
            latents: (B, F, C, H, W), clean.
            conditions: (B, F) or (B, F, V + 1).
            draws: the noise and the dropped conditions.
            place: (B, K, F), in [0, 1): which of the N levels.
            text, null_text: see `GuidedTeacher.forward`.
            history: as `latents`, which the frames come after instead.
        """
        first = self.model.first_predicted
        levels = torch.tensor(self.levels, device=latents.device)
        number = (place[:, :, first:] * (len(levels) - 1)).long()  # (B, K, F')
        times, next_times = MAX_TIMESTEP * levels[number], MAX_TIMESTEP * levels[number + 1]
        sigma, next_sigma = (levels[n][..., None, None, None] for n in (number, number + 1))
        conditions = drop_conditions(self.model, conditions, draws.drop_condition)
        noise, clean = draws.noise[:, :, first:], latents[:, None, first:]
        noisy = sigma * noise + (1 - sigma) * clean  # (B, K, F', C, H, W)
        look = draws.pure_look(first)  # the encoder learns for rollouts
        own_look = look if self.model.takes_first_look else None
        history = latents if history is None else history
        with torch.no_grad():
            velocity = self.teacher(
                history, noisy, times, conditions, first_look=look, text=text, null_text=null_text
            )
            stepped = noisy - (sigma - next_sigma) * velocity  # (B, K, F', C, H, W)
            ahead = self.target(
                history, stepped, next_times, conditions, first_look=own_look, text=text
            )
            target = clean_frames(stepped, ahead, next_times)  # (B, K, F', C, H, W)
        velocity = self.model(history, noisy, times, conditions, first_look=own_look, text=text)
        predicted = clean_frames(noisy, velocity, times)
        return (predicted - target).square().mean()
