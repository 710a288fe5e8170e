"""The paper's second finding: how much attention goes to past frames, by layer, head and step?

The attention mass on a frame is exact, and needs no attention matrix: with ℓ_f the log-sum-exp of a
query's scores over the keys of frame f, it is the softmax of ℓ over the frames.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from scd.analysis import figures
from scd.analysis.html_report import Section
from scd.analysis.interventions import (
    CLEAN_PASS,
    CurrentStep,
    causal_blocks,
    denoising_blocks,
    replace_attention,
    track_steps,
)
from scd.analysis.measurements import ProbeClips, roll_out
from scd.analysis.probed_model import ProbedModel
from scd.models import SCD, CausalWorldModel
from scd.models.layers import Attend

KEYS_AT_ONCE = 4096  # in one matrix product; bounds the memory to (queries of a frame, this)
CHANCE = 1.645  # of a rank correlation times √(layers − 1): one random order in 20 is beyond it
FEWEST_LAYERS = 4  # with fewer, every order is likely by chance


@dataclass(frozen=True)
class AttentionMass:
    """Fractions of the new frame's attention, mean over its queries and the clips.

    Entry m of `past` is new frame m: (passes, layers, heads, frames), oldest frame first, the
    frame's own tokens last. A dense model has T passes, one for each step. An encoder has one, over
    the newest clean frame, which is then the last entry.
    """

    past: list[Tensor]
    context: Tensor | None = None  # (T, layers, heads), of SCD's decoder on the context tokens

    @property
    def on_past(self) -> Tensor:
        """Sum over all past frames, for the first new frame: (passes, layers, heads)."""
        return self.past[0][..., :-1].sum(-1)


def probe_attention(probed: ProbedModel) -> Section:
    """Measure how much attention goes to past frames, by layer, head, step and distance."""
    model, n = probed.model, len(probed.clips)
    result = attention_mass(model, probed.clips, probed.steps, probed.seed)
    is_scd = isinstance(model, SCD)
    layers = len(causal_blocks(model))
    names = [f"{'encoder' if is_scd else 'layer'} {i}" for i in range(1, layers + 1)]
    pictures = {
        "attention": figures.attention_on_past(
            result.past[0], result.past[-1], names, not is_scd, n
        )
    }
    numbers = {"on_past": result.on_past, "by_new_frame": result.past}
    if result.context is not None:
        pictures["attention_context"] = figures.attention_on_context(result.context, n)
        numbers["decoder_on_context"] = result.context
    probed.progress.update()
    queries = "the newest clean frame, once per frame" if is_scd else "the noisy frame, every step"
    return Section(
        "attention",
        "Sparsity across frames",
        describe_attention(result, n, is_scd),
        f"Exact attention mass by key frame (softmax over the frames' log-sum-exp), mean over the "
        f"queries of {queries}, and over clips. The first new frame follows real frames, the last "
        f"of the {probed.clips.new_frames} follows generated ones.",
        pictures,
        numbers=numbers,
    )


@torch.no_grad()
def attention_mass(
    model: CausalWorldModel, clips: ProbeClips, steps: int, seed: int
) -> AttentionMass:
    """Record the attention mass during a rollout.

    The first new frame follows real frames, the later ones follow generated frames.
    """
    tokens = model.tokens_per_frame(*clips.latents.shape[-2:])
    is_scd = isinstance(model, SCD)
    sums: list[list[Tensor]] = []  # [part of the model][new frame · pass · layer]
    for part in clips.parts():
        with track_steps(model) as current, ExitStack() as stack:
            recorders = [
                _AttentionRecorder(
                    causal_blocks(model), tokens, current, history=True, clean=is_scd
                )
            ]
            if is_scd:
                recorders.append(
                    _AttentionRecorder(
                        denoising_blocks(model), tokens, current, history=False, clean=False
                    )
                )
            for recorder in recorders:
                stack.enter_context(replace_attention(recorder.blocks, recorder.recording))
            roll_out(model, part, steps, seed)
        masses = [recorder.masses for recorder in recorders]
        if sums:
            masses = [[*map(torch.add, a, b)] for a, b in zip(sums, masses, strict=True)]
        sums = masses
    of_past, *of_decoder = [[mass / len(clips) for mass in masses] for masses in sums]
    per_frame = len(of_past) // clips.new_frames
    layers = len(causal_blocks(model))
    past = [
        torch.stack(of_past[start : start + per_frame]).unflatten(0, (-1, layers))
        for start in range(0, len(of_past), per_frame)
    ]
    if not is_scd:
        return AttentionMass(past)
    first = torch.stack(of_decoder[0][: steps * len(denoising_blocks(model))])
    if first.shape[-1] == 1:  # the context is not joined along the sequence
        return AttentionMass(past)
    return AttentionMass(past, first[..., 0].unflatten(0, (steps, -1)))


def frame_mass(q: Tensor, keys: Tensor, tokens_per_frame: int) -> Tensor:
    """Compute the mean attention of each frame's queries on each frame, block-causal.

    Args:
        q: (B, heads, F·N, head_dim), of the newest F frames.
        keys: (B, heads, P·N + F·N, head_dim), of P earlier frames and those F.
        tokens_per_frame: N.

    Returns:
        (B, heads, F, P + F), float32; 0 for frames that are masked.
    """
    n = tokens_per_frame
    frames, total = q.shape[2] // n, keys.shape[2] // n
    at_once = max(1, KEYS_AT_ONCE // n)
    mass = torch.zeros(*q.shape[:2], frames, total, device=q.device)
    for frame in range(frames):
        queries = q[:, :, frame * n : (frame + 1) * n].float() * q.shape[-1] ** -0.5
        visible = total - frames + frame + 1
        sums = []
        for start in range(0, visible, at_once):
            part = keys[:, :, start * n : min(start + at_once, visible) * n].float()
            scores = queries @ part.transpose(-1, -2)
            sums.append(scores.unflatten(-1, (-1, n)).logsumexp(dim=-1))  # (B, heads, N, frames)
        mass[:, :, frame, :visible] = torch.cat(sums, dim=-1).softmax(dim=-1).mean(dim=2)
    return mass


class _AttentionRecorder:
    """Records some blocks' attention mass during a rollout: `masses`, (heads, frames) each, summed
    over clips.

    Args:
        history: the blocks see past frames, whose keys come with the passes over clean frames.
        clean: record the pass over the newest clean frame; else the passes of every step.
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        tokens: int,
        current: CurrentStep,
        history: bool,
        clean: bool,
    ):
        self.blocks = blocks
        self.tokens = tokens
        self.current = current
        self.history = history
        self.clean = clean
        self.keys: dict[int, Tensor] = {}
        self.masses: list[Tensor] = []

    def recording(self, number: int, attend: Attend) -> Attend:
        """Wrap the attention function of a block so that it is recorded."""

        def recorded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._record(number, q, k)
            return attend(q, k, v)

        return recorded

    def _record(self, number: int, q: Tensor, k: Tensor) -> None:
        step, keys = self.current.step, k
        if self.history:
            before = self.keys.get(number)
            keys = k if before is None else torch.cat([before, k], dim=2)
            if step is None or step == CLEAN_PASS:
                self.keys[number] = keys
        if step is not None and (step == CLEAN_PASS) == self.clean:
            mass = frame_mass(q[:, :, -self.tokens :], keys, self.tokens)[:, :, 0]
            self.masses.append(mass.sum(dim=0).cpu())


def describe_attention(result: AttentionMass, n: int, is_scd: bool) -> str:
    """Summarize the attention mass in sentences."""
    by_layer = result.on_past.mean(dim=(0, 2))
    past = result.past[0].shape[-1] - 1
    if is_scd:
        begin = "Of the newest clean frame's attention in the encoder"
    else:
        begin = (
            f"The paper's second finding (the deeper the layer, the less attention to past frames) "
            f"{_describe_trend(by_layer)}: of the new frame's attention"
        )
    shares = ", ".join(f"{100 * value:.0f}" for value in by_layer.tolist())
    newest = 100 * float(result.past[0][..., -2].mean())
    text = (
        f"{begin}, layer by layer {shares} % goes to the {past} past frames "
        f"({100 * past / (past + 1):.0f} % if it were uniform), on average {newest:.0f} % to the "
        f"newest of them (n = {n} clips)."
    )
    if result.context is not None:
        text += (
            f" The decoder spends {100 * float(result.context.mean()):.0f} % of its attention on "
            f"the context tokens ({100 * float(result.context[0].mean()):.0f} % at the first step, "
            f"{100 * float(result.context[-1].mean()):.0f} % at the last)."
        )
    return text


def _describe_trend(by_layer: Tensor) -> str:
    layers = len(by_layer)
    if layers < FEWEST_LAYERS:
        return f"cannot be judged from {layers} layers"
    trend = float(spearmanr(range(layers), by_layer.numpy()).statistic)
    verdict = "holds" if trend * (layers - 1) ** 0.5 <= -CHANCE else "does not hold"
    return f"{verdict} here (rank correlation with depth {trend:+.2f}, {layers} layers)"
