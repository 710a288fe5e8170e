"""The evaluation protocol: context frames in, new frames out, measured against what really came.

PSNR, SSIM and LPIPS: mean over the predicted frames, best of a video's trajectories, mean over the
videos. FVD: over whole clips, for each trajectory, then the mean. Pixels are rounded to 8 bits, as
they would be saved, and compared in memory.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scd.data.clips import ClipFolder
from scd.errors import ScdError
from scd.evaluation.fvd import SHORTEST, frechet_distance
from scd.evaluation.measures import Measures
from scd.evaluation.pictures import write_grid, write_side_by_side
from scd.models.autoencoder import Codec
from scd.models.world_model import WorldModel
from scd.options import Options
from scd.rollout import generate
from scd.seeding import generator

FIRST_FRAMES = 4
EVALUATION_STREAM = 3
MODEL, REPEAT, OTHER = "model", "repeat last context frame", "other real clips"


class Row:
    """One line of the table: metrics and features of every video, for each trajectory."""

    def __init__(self, trajectories: int):
        self.frames: list[list[dict[str, Tensor]]] = [[] for _ in range(trajectories)]
        self.features: list[list[Tensor]] = [[] for _ in range(trajectories)]

    def add(
        self, trajectory: int, frames: dict[str, Tensor] | None, features: Tensor | None
    ) -> None:
        if frames is not None:
            self.frames[trajectory].append(frames)
        if features is not None:
            self.features[trajectory].append(features)

    def result(self, real_features: Tensor | None) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for metric in self.frames[0][0] if self.frames[0] else ():
            values = torch.stack(  # (trajectories, n, frames)
                [torch.cat([batch[metric] for batch in batches]) for batches in self.frames]
            )
            out[metric] = _best(metric, values)
            out[f"{metric}_first_{FIRST_FRAMES}"] = _best(metric, values[..., :FIRST_FRAMES])
            out[f"{metric}_by_frame"] = [round(float(v), 5) for v in values.mean(dim=(0, 1))]
        if real_features is not None and self.features[0]:
            distances = [
                frechet_distance(real_features, torch.cat(batches)) for batches in self.features
            ]
            out["fvd"] = float(np.mean(distances))
        return out


@dataclass
class Evaluation:
    """What `evaluate` found; `rows` maps a row's name to its metrics."""

    protocol: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    missing: dict[str, str]
    weights: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: WorldModel,
    codec: Codec,
    data: ClipFolder,
    options: Options,
    folder: Path,
    videos: int | None = None,
    comparisons: bool = True,
) -> Evaluation:
    """Run the protocol of `options.eval`; write sample videos and `grid.png` into `folder`.

    Args:
        data: real clips, as pixels.
        videos: number of videos, instead of `options.eval.videos`.
        comparisons: also the rows a model is to be judged against: swapped actions, the repeated
            last context frame, other real clips.
    """
    o = options.eval
    count = videos or o.videos
    measures = Measures()
    if o.context_frames + o.new_frames < SHORTEST:
        measures.missing.setdefault("fvd", f"FVD needs clips of {SHORTEST} frames or more")
    if count < 2:
        measures.missing.setdefault("fvd", "FVD needs 2 videos or more")
    # The last clip that will be needed: too few are told now, not after hours.
    read_evaluation_clip(data, (2 if comparisons else 1) * count - 1, options)
    swapped = _swapped_name(options)
    rows = {MODEL: Row(o.trajectories)}
    if comparisons:
        rows |= {name: Row(1) for name in (swapped, REPEAT, OTHER) if name}
    real_features: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    with tqdm(total=count, desc="evaluate", unit="video", dynamic_ncols=True) as bar:
        for start in range(0, count, o.batch_size):
            numbers = list(range(start, min(start + o.batch_size, count)))
            batch = read_evaluation_batch(data, numbers, options, model.device)
            known, new = batch["video"].split([o.context_frames, o.new_frames], dim=1)

            def measure(
                row: Row, trajectory: int, predicted: Tensor, known=known, new=new
            ) -> Tensor:
                whole = torch.cat([known, predicted], dim=1)
                row.add(trajectory, measures.frames(predicted, new), measures.features(whole))
                return whole

            for trajectory, seed in enumerate(o.seeds):
                predicted = predict_frames(model, codec, options, batch, numbers, seed)
                whole = measure(rows[MODEL], trajectory, predicted)
                if trajectory == 0:
                    pairs = zip(whole.cpu(), batch["video"].cpu(), strict=True)
                    shown += list(pairs)[: max(o.saved_videos - len(shown), 0)]
            if swapped in rows:
                other_keys = {**batch, "actions": swap_new_actions(batch["actions"], options)}
                predicted = predict_frames(model, codec, options, other_keys, numbers, o.seeds[0])
                measure(rows[swapped], 0, predicted)
            if REPEAT in rows:
                measure(rows[REPEAT], 0, known[:, -1:].expand(-1, o.new_frames, -1, -1, -1))
            if OTHER in rows:
                others = read_evaluation_batch(
                    data, [count + number for number in numbers], options, model.device
                )
                rows[OTHER].add(0, None, measures.features(others["video"]))
            features = measures.features(batch["video"])
            if features is not None:
                real_features.append(features)
            bar.update(len(numbers))
    _write_samples(folder, shown, options)
    real_all = torch.cat(real_features) if real_features else None
    protocol = {
        "videos": count,
        **{key: getattr(o, key) for key in ("context_frames", "new_frames", "trajectories")},
        "seeds": list(o.seeds),
        "data": str(data.list_path),
        **{f"rollout_{key}": value for key, value in asdict(options.rollout).items()},
    }
    results = {name: row.result(real_all) for name, row in rows.items()}
    return Evaluation(protocol, results, measures.missing, measures.hashes)


def read_evaluation_batch(
    data: ClipFolder, numbers: list[int], options: Options, device: torch.device
) -> dict[str, Tensor]:
    """The evaluation clips of the given numbers, stacked: `video` (B, F, 3, H, W), `actions` …"""
    clips = [read_evaluation_clip(data, number, options) for number in numbers]
    return {key: torch.stack([clip[key] for clip in clips]).to(device) for key in clips[0]}


@torch.no_grad()
def predict_frames(
    model: WorldModel,
    codec: Codec,
    options: Options,
    batch: dict[str, Tensor],
    numbers: list[int],
    seed: int,
) -> Tensor:
    """The frames after the context of a batch, (B, new frames, 3, H, W) in steps of 1/255.

    Args:
        batch: see `read_evaluation_batch`.
        numbers: the clips' numbers; with `seed` they decide the noise, whatever the batch.
    """
    r, o = options.rollout, options.eval
    new = generate(
        model,
        codec.encode(batch["video"][:, : o.context_frames]),
        actions=batch.get("actions"),
        labels=batch.get("label"),
        num_frames=o.new_frames,
        num_steps=r.steps,
        guidance=r.guidance,
        guidance_scale=r.guidance_scale,
        guidance_noise=r.guidance_noise,
        generator=[generator("cpu", "evaluate", seed, number) for number in numbers],
    )
    return (codec.decode(new) * 255).round() / 255


def read_evaluation_clip(data: ClipFolder, number: int, options: Options) -> dict[str, Tensor]:
    """Clip `number` of an evaluation: the list's entries in order, then once more, and so on.

    Start frames come from a generator of the clip's number.
    """
    frames = options.eval.context_frames + options.eval.new_frames
    round_, entry = divmod(number, len(data))
    if round_ and data.length(entry) == (frames - 1) * options.data.frame_stride + 1:
        raise ScdError(
            f"{data.list_path}: {len(data)} clips of just {frames} frames: too few for "
            f"eval.videos={options.eval.videos} and as many other real clips; lower eval.videos"
        )
    rng = np.random.default_rng([EVALUATION_STREAM, number])
    return data.read(entry, frames, options.data.frame_stride, rng)


def swap_new_actions(actions: Tensor, options: Options) -> Tensor:
    """Exchange the two actions of `eval.swapped_actions` in the frames to be generated."""
    one, other = options.eval.swapped_actions
    new = actions[:, options.eval.context_frames :]
    exchanged = torch.where(new == one, other, torch.where(new == other, one, new))
    return torch.cat([actions[:, : options.eval.context_frames], exchanged], dim=1)


def table(evaluation: Evaluation) -> str:
    """The rows as a Markdown table."""
    columns = {
        "psnr": ("PSNR ↑", 2),
        "ssim": ("SSIM ↑", 3),
        "lpips": ("LPIPS ↓", 3),
        f"psnr_first_{FIRST_FRAMES}": (f"PSNR +1…+{FIRST_FRAMES} ↑", 2),
        f"lpips_first_{FIRST_FRAMES}": (f"LPIPS +1…+{FIRST_FRAMES} ↓", 3),
        "fvd": (f"FVD ↓ (n={evaluation.protocol['videos']})", 1),
    }
    width = max(len(name) for name in evaluation.rows)
    heads = [head for head, _ in columns.values()]
    lines = [
        "| " + " | ".join([" " * width, *heads]) + " |",
        "| " + " | ".join(["-" * width, *("-" * (len(h) - 1) + ":" for h in heads)]) + " |",
    ]
    for name, values in evaluation.rows.items():
        cells = [
            (f"{values[key]:.{digits}f}" if key in values else "–").rjust(len(head))
            for key, (head, digits) in columns.items()
        ]
        lines.append("| " + " | ".join([name.ljust(width), *cells]) + " |")
    lines += [f"\n{metric} is missing: {why}" for metric, why in evaluation.missing.items()]
    return "\n".join(lines)


def _best(metric: str, values: Tensor) -> float:
    """(trajectories, n, frames): mean over frames, best trajectory of each video, mean."""
    by_video = values.double().mean(dim=-1)
    best = by_video.amin(dim=0) if metric == "lpips" else by_video.amax(dim=0)
    return float(best.mean())


def _swapped_name(options: Options) -> str:
    pair = options.eval.swapped_actions
    if not pair:
        return ""
    names = options.data.action_names
    one, other = (names[a] if a < len(names) else f"action {a}" for a in pair)
    return f"{one} and {other} swapped"


def _write_samples(folder: Path, shown: list[tuple[Tensor, Tensor]], options: Options) -> None:
    if not shown:
        return
    for number, (generated, real) in enumerate(shown):
        path = folder / f"{number:05d}.mp4"
        write_side_by_side(path, generated, real, options.eval.context_frames, options.data.fps)
    generated, real = (torch.stack(videos) for videos in zip(*shown, strict=True))
    write_grid(folder / "grid.png", generated, real, options.eval.context_frames)
