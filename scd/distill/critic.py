"""The critic: the score of what a student generates, and a head that tells it from real clips."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scd.models.layers import NORM_EPS
from scd.models.world_model import WorldModel


class Critic(nn.Module):
    """A model of the teacher's kind that learns to denoise generated clips (the fake score).

    With a head it is a discriminator too. The head reads the features of the frozen teacher (as in
    LADD, arXiv 2403.12015), so that the score's training is the same with it and without.

    Args:
        score: a copy of the teacher at first.
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

    def judge(self, features: Tensor) -> Tensor:
        """Compute the head's logits (B,) of features (B, F', N, D): the greater, the more real.

        A clip's logit is the mean over its tokens, each of which says next to nothing alone.
        """
        assert self.head is not None
        return self.head(features)[..., 0].mean(dim=(1, 2))


def early_features(
    model: WorldModel,
    latents: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Tensor | None,
    text: Tensor | None = None,
) -> Tensor:
    """Compute the noisy frames' features (B, F', N, D) after the block a third into the model.

    The arguments are those of `WorldModel.forward`, with one draw (K = 1).
    """
    found: list[Tensor] = []
    blocks = model.blocks
    model.blocks = blocks[: len(blocks) // 3 + 1]  # the others would be computed for nothing
    hook = model.blocks[-1].register_forward_hook(lambda block, inputs, out: found.append(out))
    try:
        model(latents, noisy, timesteps, conditions, text=text)
    finally:
        hook.remove()
        model.blocks = blocks
    return found[0][:, -noisy.shape[2] :]  # (B, F', N, D)


def relativistic_loss(higher: Tensor, lower: Tensor) -> Tensor:
    """Compute the mean of log(1 + exp(lower − higher)) over pairs of logits (B,).

    The discriminator pushes real logits up, the generator those of its own clips (arXiv
    1807.00734). The two clips of a pair have the same given frames and conditions, so only what
    sets them apart counts.
    """
    return softplus(lower.float() - higher.float()).mean()


def input_gradient(loss: Tensor, frames: Tensor) -> Tensor:
    """Compute the gradient of a loss with respect to frames alone, times their number of values.

    A mean over frames then has a gradient of the size of `matching_gradient`, which is of a mean
    too.
    """
    (gradient,) = torch.autograd.grad(loss, frames)
    return gradient.detach() * frames.numel()
