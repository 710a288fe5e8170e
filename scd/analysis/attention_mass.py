"""The second finding: how much attention goes to past frames, by layer, head, step and distance?

Exact, and without an attention matrix: with ℓ_f the log-sum-exp of a query's scores over the keys
of frame f, the mass on frame f is the softmax of ℓ over the frames.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scd.analysis.interventions import (
    CLEAN_PASS,
    StepClock,
    attention_of,
    past_blocks,
    step_blocks,
    step_clock,
)
from scd.analysis.probe_clips import ProbeClips, roll_out
from scd.models import SCD, WorldModel
from scd.models.layers import Attend

KEYS_AT_ONCE = 4096  # scored in one product; bounds the memory to (queries of a frame, this)


@dataclass(frozen=True)
class AttentionMass:
    """Share of the new frame's attention, mean over its queries and the clips.

    Entry m of `past` is new frame m: (passes, layers, heads, frames), oldest frame first, the
    frame's own tokens last. The passes of a dense model are the T steps; an encoder has one, over
    the newest clean frame, which is then the last entry.
    """

    past: list[Tensor]
    context: Tensor | None = None  # (T, layers, heads): of SCD's decoder, on the context half

    @property
    def on_past(self) -> Tensor:
        """On all past frames together, for the first new frame: (passes, layers, heads)."""
        return self.past[0][..., :-1].sum(-1)


def frame_mass(q: Tensor, keys: Tensor, tokens_per_frame: int) -> Tensor:
    """Mean attention of each frame's queries on each frame, block-causal.

    Args:
        q: (B, heads, F·N, head_dim), of the newest F frames.
        keys: (B, heads, P·N + F·N, head_dim), of P earlier frames and those.
        tokens_per_frame: N.

    Returns:
        (B, heads, F, P + F), float32; 0 where nothing is visible.
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


@torch.no_grad()
def attention_mass(model: WorldModel, clips: ProbeClips, steps: int, seed: int) -> AttentionMass:
    """Watch a rollout. Its first new frame has a real history, the later ones a generated one."""
    tokens = model.tokens_per_frame(*clips.latents.shape[-2:])
    separate = isinstance(model, SCD)
    sums: list[list[Tensor]] = []  # [part of the model][new frame · pass · layer]
    for part in clips.parts():
        with step_clock(model) as clock, ExitStack() as stack:
            watches = [_Watch(past_blocks(model), tokens, clock, history=True, clean=separate)]
            if separate:
                watches.append(_Watch(step_blocks(model), tokens, clock, False, clean=False))
            for watch in watches:
                stack.enter_context(attention_of(watch.blocks, watch.attend))
            roll_out(model, part, steps, seed)
        found = [watch.found for watch in watches]
        if sums:
            found = [[*map(torch.add, a, b)] for a, b in zip(sums, found, strict=True)]
        sums = found
    of_past, *of_decoder = [[mass / len(clips) for mass in found] for found in sums]
    per_frame = len(of_past) // clips.new_frames
    past = [
        torch.stack(of_past[start : start + per_frame]).unflatten(0, (-1, len(past_blocks(model))))
        for start in range(0, len(of_past), per_frame)
    ]
    if not separate:
        return AttentionMass(past)
    first = torch.stack(of_decoder[0][: steps * len(step_blocks(model))])
    if first.shape[-1] == 1:  # the context is not joined along the sequence
        return AttentionMass(past)
    return AttentionMass(past, first[..., 0].unflatten(0, (steps, -1)))


class _Watch:
    """The attention of some blocks over a rollout; `found` has (heads, frames) sums over clips.

    Args:
        history: the blocks see past frames, whose keys come with the passes of clean frames.
        clean: they run over the newest clean frame only, else what they do at every step counts.
    """

    def __init__(
        self, blocks: list[nn.Module], tokens: int, clock: StepClock, history: bool, clean: bool
    ):
        self.blocks = blocks
        self.tokens = tokens
        self.clock = clock
        self.history = history
        self.clean = clean
        self.keys: dict[int, Tensor] = {}
        self.found: list[Tensor] = []

    def attend(self, number: int, attend: Attend) -> Attend:
        def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._see(number, q, k)
            return attend(q, k, v)

        return watched

    def _see(self, number: int, q: Tensor, k: Tensor) -> None:
        step, keys = self.clock.step, k
        if self.history:
            before = self.keys.get(number)
            keys = k if before is None else torch.cat([before, k], dim=2)
            if step is None or step == CLEAN_PASS:
                self.keys[number] = keys
        if step is not None and (step == CLEAN_PASS) == self.clean:
            mass = frame_mass(q[:, :, -self.tokens :], keys, self.tokens)[:, :, 0]
            self.found.append(mass.sum(dim=0).cpu())
