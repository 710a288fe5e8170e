"""The critic: the score of what a student generates, and a head that tells it from real clips."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scd.models.layers import NORM_EPS
from scd.models.world_model import WorldModel


class Critic(nn.Module):
    """A bidirectional model that learns to denoise generated clips (the fake score).

    With a head, a discriminator reads the features of its middle block, at the noise level of the
    score (as in DMD2, arXiv 2405.14867, section 4.3). Only the head learns from the discriminator's
    loss: the features stay those of a score.

    Args:
        score: a bidirectional model, mostly a copy of the teacher.
        adversarial: whether there is a head.
    """

    def __init__(self, score: WorldModel, adversarial: bool):
        super().__init__()
        self.score = score
        width = score.width
        self.head: nn.Sequential | None = None
        if adversarial:
            self.head = nn.Sequential(
                nn.LayerNorm(width, eps=NORM_EPS),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 1),
            )

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Tensor | None,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict velocities, see `WorldModel.forward`; and, with a head, the features.

        Returns:
            (B, 1, F', C, H, W), and (B, F', N, D) or None.
        """
        features: list[Tensor] = []
        blocks: Any = self.score.blocks
        tapped = blocks[len(blocks) // 2]
        hook = tapped.register_forward_hook(lambda block, inputs, output: features.append(output))
        try:
            velocity = self.score(
                latents, noisy, timesteps, conditions, text=text
            )  # (B, 1, F', C, H, W)
        finally:
            hook.remove()
        if self.head is None:
            return velocity, None
        return velocity, features[0][:, -noisy.shape[2] :]  # (B, F', N, D)

    def judge(self, features: Tensor) -> Tensor:
        """Compute the head's logits (B, F', N) of features (B, F', N, D): real is positive."""
        assert self.head is not None
        return self.head(features)[..., 0]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the mean of log(1 + exp(−D(x))) over real and log(1 + exp(D(x̂))) over fake logits."""
    return softplus(-real.float()).mean() + softplus(fake.float()).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Compute the mean of log(1 + exp(−D(x̂))): non-saturating (arXiv 1406.2661, section 3)."""
    return softplus(-fake.float()).mean()


def input_gradient(loss: Tensor, frames: Tensor) -> Tensor:
    """Compute the gradient of a loss at frames, times their number of values, and at nothing else.

    A mean over frames then has a gradient of the size of `matching_gradient`, which is of a mean
    too.
    """
    (gradient,) = torch.autograd.grad(loss, frames)
    return gradient.detach() * frames.numel()
