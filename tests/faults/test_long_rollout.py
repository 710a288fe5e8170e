"""Ten thousand streamed frames: constant memory, no drift of positions, nothing but finite numbers.

Short form: a few hundred frames, and the positions of frames far beyond.
"""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scd.flow.sampler import noise_levels
from scd.models.rotary import ROTARY_DIMS, ROTARY_THETA, rotary_positions
from scd.models.scd import SCD
from scd.options import RolloutOptions
from scd.rollout import Rollout
from tests.faults.trials import FULL
from tests.test_model import make_model

FRAMES = 10_000 if FULL else 300
WINDOW, LAYERS, STEPS = 6, 2, 2
B, C, H, W = 1, 4, 4, 6
TOLERANCE = 5e-5  # absolute, against double precision; measured: see README.md
MOST_GROWTH = 4 * 2**20  # bytes of memory over the last five sixths of the frames


class Stream:
    """A rollout through a sliding window, its noise and its actions drawn from a seed."""

    def __init__(self, model: SCD, seed: int, guidance_scale: float = 1.0, **options: int):
        self.generator = torch.Generator().manual_seed(seed)
        settings = RolloutOptions(STEPS, guidance_scale=guidance_scale, window=WINDOW, **options)
        self.rollout = Rollout(model, settings)
        self.seen: list[tuple[Tensor, Tensor]] = []  # the newest frames and their actions
        context, actions = torch.randn(B, 2, C, H, W, generator=self.generator), self._draw(2)
        self.rollout.reset(context, actions, generator=self.generator)
        for frame in range(2):
            self._keep(context[:, frame], actions[:, frame])

    def step(self) -> Tensor:
        self.action, self.noise = self._draw(1)[:, 0], self._randn()
        frame = self.rollout.step(self.action, self.noise)
        assert torch.isfinite(frame).all()
        self._keep(frame, self.action)
        return frame

    def _draw(self, count: int) -> Tensor:
        return torch.randint(0, 3, (B, count), generator=self.generator)

    def _randn(self) -> Tensor:
        return torch.randn(B, C, H, W, generator=self.generator)

    def _keep(self, frame: Tensor, action: Tensor) -> None:
        self.seen = [*self.seen, (frame, action)][-(LAYERS * WINDOW + 1) :]


class Band:
    """In a cache's place: no memory of keys, a mask that shows the newest frames of the window."""

    def __init__(self, frames: int, tokens: int):
        self.frames = frames  # before the ones that are computed
        self.tokens = tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index = torch.arange(q.shape[2]) // self.tokens
        behind = index[:, None] - index[None]
        return scaled_dot_product_attention(q, k, v, (behind >= 0) & (behind < WINDOW))

    def advance(self, frames: int) -> None:
        pass


@torch.no_grad()
def uncached(stream: Stream, number: int, exact: SCD) -> Tensor:
    """The newest frame, `number` in the video, computed anew in double precision."""
    frames, actions = (torch.stack(part, dim=1) for part in zip(*stream.seen, strict=True))
    history = frames[:, :-1].double()
    band = Band(number - history.shape[1], (H // 2) * (W // 2))
    table = exact.encoder.precompute_modulation(torch.arange(exact.null_condition + 1))
    modulation = table[actions[:, 1:]]
    tokens = exact.encoder.prefill(history, modulation, band)
    context = exact.encoder.context(tokens, modulation)[:, -1:]
    x = stream.noise[:, None].double()
    for sigma, following in pairwise(noise_levels(STEPS)):
        t = torch.full((B, 1), sigma * 1000, dtype=torch.float64)
        x = x + (following - sigma) * exact.decode(x, t, context, actions[:, -1:])
    return x[:, 0]


@torch.no_grad()
def test_a_stream_neither_grows_nor_drifts() -> None:
    model, exact = make_model(), make_model().double()
    stream = Stream(model, 1)
    worst, start, growth = 0.0, 0, 0
    for number in range(2, FRAMES):
        frame = stream.step()
        if number == FRAMES // 6:  # libraries are warm
            start = resident()
        if number == FRAMES - 50:
            growth = resident() - start
            tracemalloc.start()  # which makes everything slow, and takes memory itself
        if number % (FRAMES // 20) == 0 or number == FRAMES - 1:
            error = float((frame - uncached(stream, number, exact)).abs().max())
            assert error < TOLERANCE, number
            worst = max(worst, error)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(
        f"\n{FRAMES} frames: worst error {worst:.1e}, memory grew by {growth / 2**20:.2f} MiB, "
        f"Python's objects in 50 frames by {held / 2**20:.2f} MiB"
    )
    assert growth < MOST_GROWTH
    assert held < 2**18


@torch.no_grad()
def test_two_streams_do_not_disturb_each_other() -> None:
    """Side by side, with different seeds and actions, each is to the bit what it is alone."""
    model = make_model()
    count = min(FRAMES // 4, 1000)
    both = [Stream(model, 1), Stream(model, 2, guidance_scale=1.5, sink_frames=1)]
    for _ in range(count):
        side_by_side = [stream.step() for stream in both]
    alone = [Stream(model, 1), Stream(model, 2, guidance_scale=1.5, sink_frames=1)]
    for stream, expected in zip(alone, side_by_side, strict=True):
        for _ in range(count):
            frame = stream.step()
        assert torch.equal(frame, expected)
    assert not torch.equal(*side_by_side)


@pytest.mark.parametrize("frame", [0, 300, 10_000, 1_000_000])
def test_positions_keep_their_precision(frame: int) -> None:
    """Cosines and sines of the farthest frame are those of double precision."""
    rotary = rotary_positions(torch.tensor([frame]), 2, 3)
    angles = []
    for dims, position in zip(ROTARY_DIMS, (frame, 1, 2), strict=True):  # the last token's
        exponents = torch.arange(0, dims, 2, dtype=torch.float64) / dims
        angles.append(position * ROTARY_THETA**-exponents)
    table = torch.cat(angles)
    assert (rotary.cos[-1] - table.cos().repeat(2)).abs().max() < 1e-7
    assert (rotary.sin[-1] - torch.cat([-table.sin(), table.sin()])).abs().max() < 1e-7


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
