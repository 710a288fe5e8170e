"""`scd export --web --measure FRAMES`: what smaller weights cost, as a table."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scd.errors import ScdError
from scd.evaluation.frame_metrics import lpips_distance, psnr
from scd.evaluation.metric_weights import MetricUnavailable
from scd.options import RolloutOptions
from scd.play.starts import Start, load_starts
from scd.play.worlds import ModelWorld, Pretrained, Settings, frame_seed
from scd.utils.table import Table
from scd.web.onnx_export import FORMATS
from scd.web.onnx_rollout import OnnxRollout, all_levels
from scd.web.site import STEPS, load_for_web, onnx_graphs, start_latents, write_graphs

HELD = 8  # frames that a key is held
HEADS = ["weights", "graphs, MB", "PSNR ↑, dB", "LPIPS ↓", "PSNR +1…+4 ↑", "LPIPS +1…+4 ↓"]
NOTE = (
    "Pictures of the exported graphs against those of PyTorch in float32, from the same noise and "
    "under the same keys. Every frame builds on those before it, so small differences grow; the "
    "last row, PyTorch with another seed, is as far as they can grow."
)


def measure_formats(path: Path, starts: Path, frames: int, overrides: list[str]) -> Table:
    """Roll out all formats from all start clips, compare with PyTorch, print a table.

    Raises:
        ScdError: there is no frame to measure; the model or the clips are missing or do not fit.
    """
    if frames < 4:
        raise ScdError(f"export: --measure {frames}: must be at least 4")
    pretrained = load_for_web(path, overrides)
    data = pretrained.options.data
    clips = load_starts(starts, data.frame_size, len(data.action_names))
    graphs, levels = onnx_graphs(pretrained), all_levels(pretrained.options.rollout, STEPS)
    expected = _videos([_by_torch(pretrained, start, frames, seed=0) for start in clips])
    rows = []
    for weights in FORMATS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_graphs(graphs, folder, weights)
            size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
            rollout = OnnxRollout(folder, _settings(pretrained), levels)
            found = [_by_onnx(rollout, pretrained, start, frames) for start in clips]
        rows.append([weights, f"{size:.1f}", *_figures(_videos(found), expected)])
    other = _videos([_by_torch(pretrained, start, frames, seed=1) for start in clips])
    rows.append(["another seed", "–", *_figures(other, expected)])
    table = Table(HEADS, rows, 1, [f"{len(clips)} starts, {frames} frames each. {NOTE}"])
    print("\n" + table.markdown())
    return table


def keys(start: Start, actions: int, frames: int) -> list[int]:
    """Choose actions, held for some frames each, the same for a start every time."""
    rng = random.Random(start.name)
    chosen = [rng.randrange(actions) for _ in range(-(-frames // HELD))]
    return [chosen[frame // HELD] for frame in range(frames)]


def _settings(pretrained: Pretrained) -> RolloutOptions:
    """Set what both sides do: no guidance, and no more steps than can be chosen in the browser."""
    rollout = pretrained.options.rollout
    return replace(rollout, steps=pretrained.steps, guidance="none", guidance_scale=1.0)


def _by_torch(pretrained: Pretrained, start: Start, frames: int, seed: int) -> np.ndarray:
    """Generate frames as `scd play` does, without guidance: (F, H, W, 3) uint8."""
    world, first = ModelWorld(pretrained), len(start.actions)
    world.reset(start, Settings(guidance_scale=1.0, seed=seed))
    actions = keys(start, pretrained.model.num_conditions, frames)
    return np.stack([world.step(a, first + i).picture for i, a in enumerate(actions)])


def _by_onnx(rollout: OnnxRollout, pretrained: Pretrained, start: Start, frames: int) -> np.ndarray:
    generator, first = torch.Generator(), len(start.actions)
    given = [action for action in start.actions if isinstance(action, int)]  # vectors: not exported
    rollout.reset(start_latents(pretrained, start), given, generator)
    pictures = []
    for i, action in enumerate(keys(start, pretrained.model.num_conditions, frames)):
        generator.manual_seed(frame_seed(0, first + i))
        pictures.append(rollout.picture(rollout.step(action)))
    return np.stack(pictures)


def _videos(clips: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(clips)).movedim(-1, 2).float() / 255


def _figures(videos: Tensor, expected: Tensor) -> list[str]:
    quality = psnr(videos, expected)
    try:
        distance: Tensor | None = lpips_distance(videos, expected)
    except MetricUnavailable:
        distance = None
    cells = []
    for part in (slice(None), slice(4)):
        cells.append(f"{quality[:, part].mean().item():.2f}")
        cells.append("–" if distance is None else f"{distance[:, part].mean().item():.4f}")
    return cells
