"""The evaluation protocol: which clips, seeds and rows, and how new frames are predicted.

A model continues context frames; its new frames are compared with the real ones. Pixels are rounded
to 8 bits and saved (`scd.evaluation.samples`) before anything is measured
(`scd.evaluation.measure`).
"""

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scd.data.clips import ClipFolder, read_actions
from scd.doom.replay import Replay
from scd.errors import ScdError
from scd.models.autoencoder import Codec
from scd.models.world_model import WorldModel
from scd.options import Options
from scd.rollout import continue_videos
from scd.utils.processes import processes
from scd.utils.seeding import generator

EVALUATION_STREAM = 3
MODEL, REPEAT, OTHER = "model", "repeat last context frame", "other real clips"  # rows
AUTOENCODED = "real frames through the autoencoder"  # an upper bound for the model
# What a perfect model would get that has forgotten where it is: see `play_with_other_keys`.
OTHER_KEYS = "real Doom under other clips' keys"
OTHER_KEYS_AUTOENCODED = f"{OTHER_KEYS}, through the autoencoder"
# Sets of clips, one for each video: the real ones, real ones of other numbers, the repeated frame,
# real ones whose new frames went through the autoencoder; and the simulator's under other keys.
REAL_SET, OTHER_SET, REPEAT_SET, AUTOENCODED_SET = "real", "other", "repeat", "autoencoded"
OTHER_KEYS_SET, OTHER_KEYS_AUTOENCODED_SET = "other-keys", "other-keys-autoencoded"
UNPAIRED_SETS = (OTHER_SET, OTHER_KEYS_SET, OTHER_KEYS_AUTOENCODED_SET)  # not to compare by frame


@dataclass(frozen=True)
class Prediction:
    """A set of clips that the model generates: its name, seed, and whether actions are swapped."""

    name: str
    seed: int
    swapped: bool = False


def predictions(options: Options) -> list[Prediction]:
    """List the sets that the model predicts: one for each trajectory, one with swapped actions."""
    seeds = options.eval.seeds
    sets = [Prediction(f"model-seed-{seed}", seed) for seed in dict.fromkeys(seeds)]
    if options.eval.swapped_actions:
        sets.append(Prediction("swapped", seeds[0], swapped=True))
    return sets


def table_rows(options: Options) -> dict[str, list[str]]:
    """Name the table's rows, and the sets of clips that each is measured on, one a trajectory.

    Comparisons that do not apply are left out: without context there is no last frame to repeat.
    """
    comparisons = options.eval.comparisons
    rows = {MODEL: [f"model-seed-{seed}" for seed in options.eval.seeds]}
    if options.eval.swapped_actions:
        rows[_swapped_row(options)] = ["swapped"]
    if "repeat" in comparisons and options.eval.context_frames:
        rows[REPEAT] = [REPEAT_SET]
    if "autoencoder" in comparisons and options.autoencoder.path is not None:
        rows[AUTOENCODED] = [AUTOENCODED_SET]
    if "other" in comparisons:
        rows[OTHER] = [OTHER_SET]
    if "other_keys" in comparisons:
        rows[OTHER_KEYS] = [OTHER_KEYS_SET]
        if options.autoencoder.path is not None:
            rows[OTHER_KEYS_AUTOENCODED] = [OTHER_KEYS_AUTOENCODED_SET]
    return rows


def read_evaluation_clip(data: ClipFolder, number: int, options: Options) -> dict[str, Tensor]:
    """Read clip `number` of an evaluation: the list's entries in order, then once more, and so on.

    Start frames come from a generator of the clip's number. Numbers from `eval.videos` on are the
    other real clips.
    """
    frames = _clip_frames(options)
    round_, entry = divmod(number, len(data))
    if round_ and data.length(entry) == (frames - 1) * options.data.frame_stride + 1:
        raise ScdError(
            f"{data.list_path}: {len(data)} clips of just {frames} frames: too few for clip "
            f"{number + 1}; lower the number of videos, or make eval.comparisons without `other`"
        )
    return data.read(entry, frames, options.data.frame_stride, _start_generator(number))


def note_repeats(data: ClipFolder, videos: int, others: bool = False) -> None:
    """Say on the main process that clips are fewer than videos, if they are.

    Args:
        others: whether as many other real clips are taken too.
    """
    if len(data) < videos:
        problem = "some are continued more than once, each time from another first frame"
    elif others and len(data) < 2 * videos:
        problem = (
            f"of as many other real clips, {2 * videos - len(data)} are parts of the same ones, so "
            f"their distances are too low; record more, or lower eval.videos"
        )
    else:
        return
    if processes().is_main_process:
        count = f"{len(data)} clip{'s' * (len(data) > 1)} for {videos} videos"
        print(f"note: {data.list_path} has {count}: {problem}", file=sys.stderr)


def read_evaluation_batch(
    data: ClipFolder, numbers: list[int], options: Options, device: torch.device
) -> dict[str, Tensor]:
    """Read evaluation clips by number and stack them: `video` (B, F, 3, H, W), `actions` …"""
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
    """Predict the frames after the context, (B, new frames, 3, H, W) in steps of 1/255.

    Args:
        batch: see `read_evaluation_batch`.
        numbers: the clips' numbers; with `seed` they decide the noise, whatever the batch.
    """
    new = continue_videos(
        model,
        options.rollout,
        _context_latents(codec, batch["video"][:, : options.eval.context_frames]),
        options.eval.new_frames,
        batch.get("actions"),
        batch.get("label"),
        generator=[generator("cpu", "evaluate", seed, number) for number in numbers],
    )
    return _rounded(codec.decode(new))


def not_finite(what: str, numbers: list[int]) -> ScdError:
    """Make the error that names videos whose predictions are not finite."""
    return ScdError(
        f"{what}: the prediction of video {', '.join(map(str, numbers))} is not finite; the "
        f"weights or the rollout's options are broken"
    )


def autoencode_frames(codec: Codec, video: Tensor) -> Tensor:
    """Encode and decode real frames (B, F, 3, H, W); returns as `predict_frames`."""
    return _rounded(codec.decode(codec.encode(video)))


def play_with_other_keys(
    data: ClipFolder, options: Options, numbers: list[int], device: torch.device
) -> Tensor:
    """Continue the contexts of clips in the simulator, with the keys of the clips after them.

    FVD compares clips under the same keys, which fit the place where they were pressed. This is
    what real frames get for keys that were meant for another place.

    Returns:
        As `predict_frames`. Where an episode ends on the way, the next clip's keys are taken.

    Raises:
        ScdError: the clips are not as `scd record` recorded them, or no keys lead to an end.
    """
    known, new, count = options.eval.context_frames, options.eval.new_frames, options.eval.videos
    if count < 2:
        raise ScdError("eval.comparisons has other_keys, which needs eval.videos of 2 or more")
    clips = []
    with closing(Replay(data.root)) as replay:
        if replay.frame_size != options.data.frame_size or options.data.frame_stride != 1:
            raise ScdError(
                f"eval.comparisons has other_keys, which needs every frame of {data.root} as it "
                f"was recorded: data.frame_size={replay.frame_size} data.frame_stride=1"
            )
        for number in numbers:
            path, start = _place(data, number, options)
            for other in range(number + 1, number + count):
                keys, first = _place(data, other % count, options)
                actions = read_actions(keys.with_suffix(".npz"))[first + known :][:new]
                frames = replay.play_on(path, start + known - 1, actions)
                if frames is not None:
                    clips.append(torch.from_numpy(frames).movedim(-1, 1).float() / 255)
                    break
            else:
                raise ScdError(f"{path}: under all other clips' keys the episode ends too early")
    return torch.stack(clips).to(device)


def swap_new_actions(actions: Tensor, options: Options) -> Tensor:
    """Exchange the two actions of `eval.swapped_actions` in the new frames; in action vectors
    (B, F, V), two components."""
    one, other = options.eval.swapped_actions
    new = actions[:, options.eval.context_frames :]
    if options.model.condition == "action_vector":
        exchanged = new.clone()
        exchanged[..., [one, other]] = new[..., [other, one]]
    else:
        exchanged = torch.where(new == one, other, torch.where(new == other, one, new))
    return torch.cat([actions[:, : options.eval.context_frames], exchanged], dim=1)


def _clip_frames(options: Options) -> int:
    return options.eval.context_frames + options.eval.new_frames


def _start_generator(number: int) -> np.random.Generator:
    """Return what draws the first frame of an evaluation's clip."""
    return np.random.default_rng([EVALUATION_STREAM, number])


def _place(data: ClipFolder, number: int, options: Options) -> tuple[Path, int]:
    """Find the video of an evaluation's clip, and the clip's first frame in it."""
    entry = number % len(data)
    last = data.length(entry) - _clip_frames(options)
    path = data.root / str(data.entries[entry].video_path)
    return path, data.first_frame(last, _start_generator(number))


def _rounded(video: Tensor) -> Tensor:
    return (video * 255).round() / 255


def _context_latents(codec: Codec, video: Tensor) -> Tensor:
    if video.shape[1]:
        return codec.encode(video)
    height, width = (side // codec.downsampling for side in video.shape[-2:])
    return video.new_zeros(len(video), 0, codec.channels, height, width)


def _swapped_row(options: Options) -> str:
    names = options.data.action_names
    one, other = (
        names[action] if action < len(names) else f"action {action}"
        for action in options.eval.swapped_actions
    )
    # The model has the best of its trajectories.
    alone = ", one trajectory" if len(set(options.eval.seeds)) > 1 else ""
    return f"{one} and {other} swapped{alone}"
