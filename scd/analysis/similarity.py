"""The paper's first finding: are a layer's features the same at every denoising step of a frame?"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.interventions import (
    CLEAN_PASS,
    CurrentStep,
    denoising_blocks,
    hook_block_outputs,
    track_steps,
)
from scd.analysis.measurements import ProbeClips, roll_out
from scd.analysis.probed_model import ProbedModel
from scd.flow.sampler import noise_levels
from scd.models import SCD, CausalWorldModel

SAME_FEATURES = 0.95  # cosine similarity that counts as "the same features"; the paper's figure
MOST_STEPS = 0.75  # of the steps; the paper's middle layer reaches it at 40 of 50
SHOWN_STEPS = 16  # at most, in the pictures of features


@dataclass(frozen=True)
class Trajectory:
    """Features and clean-frame estimates while the first new frame of n clips is denoised."""

    features: Tensor  # (T, 1 + L, n, N, D), hidden states: block 1's input, then every output
    estimates: Tensor  # (T, n, C, h, w), the clean frame as a step estimates it: x_t − σ·v


@dataclass(frozen=True)
class StepSimilarity:
    """Cosine similarities of a token's features at two steps, mean over tokens and clips.

    Entry 0 of the layers is the first block's input, entry l the output of block l.
    """

    similarity: Tensor  # (1 + L, T, T)
    error: Tensor  # (1 + L, T), standard error over clips of the similarity to the last step
    centered: Tensor  # (1 + L, T, T), after subtracting each layer's mean token
    between_clips: Tensor  # (1 + L,), of the same token in two different clips at the same step


@dataclass(frozen=True)
class Plateau:
    """The steps at which a layer has almost the same features."""

    share: float  # of the other steps, that are similar enough to the plateau's central step
    first: int  # of these steps, counted from 1
    last: int
    threshold: float  # similarity that is enough

    @property
    def wide(self) -> bool:
        return self.share >= MOST_STEPS


def probe_similarity(probed: ProbedModel) -> Section:
    """Compare the features of every layer across denoising steps, and show them as pictures."""
    model, n, steps = probed.model, len(probed.clips), probed.steps
    trajectory = record_features(model, probed.clips, steps, probed.seed)
    result = step_similarity(trajectory.features)
    part = "decoder" if isinstance(model, SCD) else "layer"
    names = ["embedding", *(f"{part} {i}" for i in range(1, len(denoising_blocks(model)) + 1))]
    rows = probed.clips.latents.shape[-2] // model.config.patch_size
    # Without the last step, whose estimate is all but the frame that goes into it.
    shown = torch.linspace(0, steps - 2, min(steps - 1, SHOWN_STEPS)).round().long()
    levels = noise_levels(steps)
    figure = figures.feature_pictures(
        principal_pictures(trajectory.features, 0)[:, shown],
        probed.loaded.codec.decode(trajectory.estimates[None, shown, 0])[0].cpu(),
        probed.clips.video[0, probed.clips.known].cpu(),
        names,
        [f"{step + 1}\nσ {levels[step]:.2f}" for step in shown.tolist()],
        (rows, trajectory.features.shape[3] // rows),
    )
    probed.progress.update()
    return Section(
        "redundancy",
        "Redundancy across denoising steps",
        describe_similarity(result, names, n, isinstance(model, SCD)),
        f"Hidden states of the first new frame after every block, in {steps} Euler steps given "
        f"{probed.clips.known} real frames; cosine similarity per token, mean over tokens and "
        f"clips. Features count as the same above {SAME_FEATURES}, and at least halfway from the "
        f"similarity of two different clips to 1. The result leaves out the last step, whose noise "
        f"level of 0.001 hardly occurs in training. A part of every feature is the same for all "
        f"frames: the right panel of the curves subtracts the layer's mean token. Pictures: clip "
        f"{probed.clips.numbers[0]}, the three principal components as colors, one basis per "
        f"layer.",
        {
            "similarity": figures.similarity_matrices(result.similarity, names, n),
            "similarity_to_last": figures.similarity_to_last(
                result.similarity, result.error, result.centered, result.between_clips, names, n
            ),
            "features": figure,
        },
        numbers={
            "layers": names,
            "similarity": result.similarity,
            "similarity_without_mean": result.centered,
            "standard_error_to_last": result.error,
            "two_steps": between_steps(result.similarity),
            "two_clips": result.between_clips,
            "plateaus": [
                {"share": p.share, "first": p.first, "last": p.last, "bar": p.threshold}
                for p in plateaus(result)
            ],
            "steady_layers": deepest_steady_layer(result),
        },
    )


@torch.no_grad()
def record_features(
    model: CausalWorldModel, clips: ProbeClips, steps: int, seed: int
) -> Trajectory:
    """Record every denoising block's features while the first new frame is generated.

    Of a decoder that reads [context ‖ noisy tokens], only the noisy half is recorded.
    """
    clips = clips.cut(1)
    tokens = model.tokens_per_frame(*clips.latents.shape[-2:])
    levels = noise_levels(steps)
    features: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # (step, entry) -> parts
    estimates: dict[int, list[Tensor]] = defaultdict(list)

    def estimate(step: int, noisy: Tensor, velocity: Tensor) -> None:
        estimates[step].append(noisy[:, 0] - levels[step] * velocity[:, 0])

    for part in clips.parts():
        with track_steps(model, estimate) as current:

            def keep(
                number: int, before: Tensor, out: Tensor, current: CurrentStep = current
            ) -> None:
                if current.step is None or current.step == CLEAN_PASS:
                    return
                if number == 0:
                    features[current.step, 0].append(before[:, 0, -tokens:].float().cpu())
                features[current.step, number + 1].append(out[:, 0, -tokens:].float().cpu())

            with hook_block_outputs(denoising_blocks(model), keep):
                roll_out(model, part, steps, seed)
    entries = range(len(denoising_blocks(model)) + 1)
    by_step = [
        torch.stack([torch.cat(features[step, entry]) for entry in entries])
        for step in range(steps)
    ]
    return Trajectory(
        torch.stack(by_step), torch.stack([torch.cat(estimates[step]) for step in range(steps)])
    )


def step_similarity(features: Tensor) -> StepSimilarity:
    """Compare features (T, 1 + L, n, N, D) of every two steps."""
    by_clip = _cosines(features)  # (1 + L, n, T, T)
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    unit = normalize(features, dim=-1)
    between_clips = (unit * unit.roll(1, dims=2)).sum(-1).mean(dim=(0, 2, 3))
    clips = features.shape[2]
    return StepSimilarity(
        similarity=by_clip.mean(dim=1),
        error=by_clip[..., -1].std(dim=1) / clips**0.5,
        centered=_cosines(features - mean).mean(dim=1),
        between_clips=between_clips,
    )


def plateaus(result: StepSimilarity) -> list[Plateau]:
    """Find each layer's largest set of steps with the same features, for all 1 + L entries.

    The last step is left out: its noise level of 0.001 hardly occurs in training. Features count as
    the same above a similarity of `SAME_FEATURES`; where two different clips are that similar
    themselves, above the midpoint between their similarity and 1.
    """
    out = []
    inner = result.similarity[:, :-1, :-1]
    for similarity, between_clips in zip(inner, result.between_clips.tolist(), strict=True):
        threshold = max(SAME_FEATURES, (1 + between_clips) / 2)
        near = (similarity > threshold).fill_diagonal_(True)
        central = int(near.sum(dim=1).argmax())
        steps = near[central].nonzero().flatten().tolist()
        share = (len(steps) - 1) / (len(near) - 1)
        out.append(Plateau(share, steps[0] + 1, steps[-1] + 1, threshold))
    return out


def deepest_steady_layer(result: StepSimilarity) -> int:
    """Find the deepest layer, from 1, with the same features at most steps; 0: there is none."""
    wide = [plateau.wide for plateau in plateaus(result)[1:]]
    return max((layer for layer, is_wide in enumerate(wide, 1) if is_wide), default=0)


def between_steps(similarity: Tensor) -> Tensor:
    """Average over pairs of two different steps, without the last: (1 + L, T, T) -> (1 + L,)."""
    inner = similarity[:, :-1, :-1]
    steps = inner.shape[-1]
    diagonal = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (inner.sum(dim=(1, 2)) - diagonal) / (steps * (steps - 1))


def principal_pictures(features: Tensor, clip: int) -> Tensor:
    """Map each layer's three principal components to colors, (1 + L, T, N, 3) in [0, 1].

    A layer has one basis and one range over all steps and clips, so that a row's colors compare.
    """
    pictures = []
    for layer in features.unbind(dim=1):  # (T, n, N, D)
        centered = layer - layer.mean(dim=(0, 1, 2))  # (T, n, N, D)
        # The eigenvectors of the D x D covariance, by ascending variance.
        _, vectors = torch.linalg.eigh(torch.einsum("tnkd,tnke->de", centered, centered).double())
        projected = centered @ vectors[:, -3:].flip(-1).float()
        low, high = projected.amin(dim=(0, 1, 2)), projected.amax(dim=(0, 1, 2))
        pictures.append((projected[:, clip] - low) / (high - low).clamp(min=1e-8))
    return torch.stack(pictures)


def describe_similarity(result: StepSimilarity, names: list[str], n: int, is_scd: bool) -> str:
    """Summarize the similarity of features across steps in sentences."""
    layers = plateaus(result)[1:]
    widest = max(range(len(layers)), key=lambda layer: layers[layer].share)
    best, name = layers[widest], names[widest + 1]
    if is_scd:
        begin = "What the decoder repeats at every step: "
    else:
        begin = (
            f"The paper's first finding (a layer with the same features at most steps) "
            f"{'holds' if best.wide else 'does not hold'} here: "
        )
    steps = result.similarity.shape[-1]
    plateau = (
        f"{name} stays above a similarity of {best.threshold:.2f} at {100 * best.share:.0f} % of "
        f"the steps ({best.first} to {best.last} of {steps}; needed: {100 * MOST_STEPS:.0f} %)"
        if best.share
        else f"no two steps of any layer are more similar than {best.threshold:.2f}"
    )
    pairs = between_steps(result.similarity)[1:].tolist()
    means = ", ".join(f"{name} {value:.2f}" for name, value in zip(names[1:], pairs, strict=True))
    return (
        f"{begin}{plateau}. Mean similarity of two different steps: {means}; of two different "
        f"clips at one step: {float(result.between_clips[1:].mean()):.2f} (n = {n} clips)."
    )


def _cosines(features: Tensor) -> Tensor:
    """Compare every two steps, mean over tokens: (T, 1 + L, n, N, D) -> (1 + L, n, T, T)."""
    unit = normalize(features, dim=-1)
    return torch.einsum("tlnkd,slnkd->lnts", unit, unit) / features.shape[3]
