"""The first finding: do layers give the same features at every denoising step of a frame?"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scd.analysis.interventions import (
    CLEAN_PASS,
    StepClock,
    block_outputs,
    step_blocks,
    step_clock,
)
from scd.analysis.probe_clips import ProbeClips, roll_out
from scd.flow.sampler import noise_levels
from scd.models import WorldModel

STEADY = 0.95  # similarity that counts as "the same features"; the paper's figure
STEADY_SHARE = 0.75  # of the steps; a middle layer of the paper has it at 40 of 50


@dataclass(frozen=True)
class Redundancy:
    """Cosine similarities of a token's features at two steps, mean over tokens and clips.

    Entry 0 of the layers is what enters the first block, entry l what leaves block l.
    """

    similarity: Tensor  # (1 + L, T, T)
    error: Tensor  # (1 + L, T), standard error over clips of the similarity to the last step
    centred: Tensor  # (1 + L, T, T), after taking off each layer's mean token
    floor: Tensor  # (1 + L,), of the same token in two different clips, at the same step


@dataclass(frozen=True)
class Plateau:
    """The steps with almost the same features in one layer."""

    share: float  # of the other steps, as similar as `bar` to the one that most are similar to
    first: int  # of these steps, counted from 1
    last: int
    bar: float

    @property
    def wide(self) -> bool:
        return self.share >= STEADY_SHARE


@dataclass(frozen=True)
class Trajectory:
    """The making of the first new frame of n clips."""

    features: Tensor  # (T, 1 + L, n, N, D), hidden tokens
    estimates: Tensor  # (T, n, C, h, w), the clean frame as the step sees it: x_t − σ·v


@torch.no_grad()
def watch_steps(model: WorldModel, clips: ProbeClips, steps: int, seed: int) -> Trajectory:
    """Under real history. Of a decoder that reads [context ‖ noisy], the noisy half."""
    clips = clips.cut(1)
    tokens = model.tokens_per_frame(*clips.latents.shape[-2:])
    levels = noise_levels(steps)
    features: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # (step, entry) -> parts
    estimates: dict[int, list[Tensor]] = defaultdict(list)

    def see(step: int, noisy: Tensor, velocity: Tensor) -> None:
        estimates[step].append(noisy[:, 0] - levels[step] * velocity[:, 0])

    for part in clips.parts():
        with step_clock(model, see) as clock:

            def keep(number: int, before: Tensor, out: Tensor, clock: StepClock = clock) -> None:
                if clock.step is None or clock.step == CLEAN_PASS:
                    return
                if number == 0:
                    features[clock.step, 0].append(before[:, 0, -tokens:].float().cpu())
                features[clock.step, number + 1].append(out[:, 0, -tokens:].float().cpu())

            with block_outputs(step_blocks(model), keep):
                roll_out(model, part, steps, seed)
    entries = range(len(step_blocks(model)) + 1)
    by_step = [
        torch.stack([torch.cat(features[step, entry]) for entry in entries])
        for step in range(steps)
    ]
    return Trajectory(
        torch.stack(by_step), torch.stack([torch.cat(estimates[step]) for step in range(steps)])
    )


def redundancy(features: Tensor) -> Redundancy:
    """From features (T, 1 + L, n, N, D)."""
    by_clip = _cosines(features)  # (1 + L, n, T, T)
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    unit = normalize(features, dim=-1)
    floor = (unit * unit.roll(1, dims=2)).sum(-1).mean(dim=(0, 2, 3))
    clips = features.shape[2]
    return Redundancy(
        similarity=by_clip.mean(dim=1),
        error=by_clip[..., -1].std(dim=1) / clips**0.5,
        centred=_cosines(features - mean).mean(dim=1),
        floor=floor,
    )


def plateaus(found: Redundancy) -> list[Plateau]:
    """Find the layers whose features stay the same, from what enters the first block on.

    Without the last step, whose noise level of 0.001 training hardly meets. Features count as the
    same at a similarity of `STEADY`; where two different clips are that similar themselves, half
    way from there to 1.
    """
    out = []
    for similarity, floor in zip(found.similarity[:, :-1, :-1], found.floor.tolist(), strict=True):
        bar = max(STEADY, (1 + floor) / 2)
        near = (similarity > bar).fill_diagonal_(True)
        reference = int(near.sum(dim=1).argmax())
        steps = near[reference].nonzero().flatten().tolist()
        share = (len(steps) - 1) / (len(near) - 1)
        out.append(Plateau(share, steps[0] + 1, steps[-1] + 1, bar))
    return out


def between_steps(similarity: Tensor) -> Tensor:
    """(1 + L, T, T) -> (1 + L,): mean over pairs of two different steps, without the last step."""
    inner = similarity[:, :-1, :-1]
    steps = inner.shape[-1]
    diagonal = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (inner.sum(dim=(1, 2)) - diagonal) / (steps * (steps - 1))


def principal_pictures(features: Tensor, clip: int) -> Tensor:
    """The three main directions of each layer's features as colours, (1 + L, T, N, 3) in [0, 1].

    One basis and one range a layer, over all steps and clips: colours of a row can be compared.
    """
    pictures = []
    for layer in features.unbind(dim=1):  # (T, n, N, D)
        centred = layer - layer.mean(dim=(0, 1, 2))  # (T, n, N, D)
        # The directions are those of largest variance: eigenvectors of D x D, ascending.
        _, vectors = torch.linalg.eigh(torch.einsum("tnkd,tnke->de", centred, centred).double())
        projected = centred @ vectors[:, -3:].flip(-1).float()
        low, high = projected.amin(dim=(0, 1, 2)), projected.amax(dim=(0, 1, 2))
        pictures.append((projected[:, clip] - low) / (high - low).clamp(min=1e-8))
    return torch.stack(pictures)


def _cosines(features: Tensor) -> Tensor:
    """(T, 1 + L, n, N, D) -> (1 + L, n, T, T), mean over tokens."""
    unit = normalize(features, dim=-1)
    return torch.einsum("tlnkd,slnkd->lnts", unit, unit) / features.shape[3]
