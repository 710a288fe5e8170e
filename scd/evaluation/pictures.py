"""Sample videos and pictures for people: side by side, and as grids of frames over time."""

import math
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from scd.data.clips import clip_folder
from scd.data.video import write_video
from scd.errors import ScdError
from scd.evaluation.protocol import not_finite, note_repeats, predict_frames, read_evaluation_batch
from scd.models.load import load_checkpoint_for_use
from scd.utils.files import write_atomically

CONTEXT_COLOR = (255, 196, 0)  # border of context frames
BACKGROUND = 24
MIN_SIDE = 256  # videos are enlarged to at least this many pixels
GRID_COLUMNS = 12
GRID_ROWS = 8


def to_bytes(video: Tensor) -> np.ndarray:
    """Convert a video (F, 3, H, W) in [0, 1] to (F, H, W, 3) uint8."""
    return rearrange(video.clamp(0, 1) * 255, "f c h w -> f h w c").round().byte().cpu().numpy()


def write_side_by_side(
    path: Path, generated: Tensor, real: Tensor, context_frames: int, fps: float
) -> None:
    """Write an mp4: the generated video left, the real one right; context frames have a border."""
    videos = [_enlarge(to_bytes(video)) for video in (generated, real)]
    for video in videos:
        for frame in video[:context_frames]:
            _mark(frame)
    gap = np.full((*videos[0].shape[:2], 8, 3), BACKGROUND, np.uint8)
    write_video(path, np.concatenate([videos[0], gap, videos[1]], axis=2), fps)


def write_grid(path: Path, generated: Tensor, real: Tensor, context_frames: int) -> None:
    """Write a PNG: rows of generated above real frames over time; context frames have a border.

    Videos are (n, F, 3, H, W) in [0, 1]; at most `GRID_ROWS` of them are drawn, and as many moments
    as there are columns: the last context frame, then evenly to the end.
    """
    total = generated.shape[1]
    first = max(context_frames - 1, 0)
    times = np.unique(np.linspace(first, total - 1, GRID_COLUMNS).round().astype(int))
    rows = []
    for clip in range(min(len(generated), GRID_ROWS)):
        for video in (generated, real):
            frames = _enlarge(to_bytes(video[clip][times]), 96)
            for frame, time in zip(frames, times, strict=True):
                if time < context_frames:
                    _mark(frame)
            rows.append(np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0))) for f in frames], 1))
        rows.append(np.full((6, rows[-1].shape[1], 3), BACKGROUND, np.uint8))
    cell = rows[0].shape[1] // len(times)
    label_width, header = 74, 18
    body = np.concatenate(rows)
    sheet = Image.new(
        "RGB", (body.shape[1] + label_width, body.shape[0] + header), (BACKGROUND,) * 3
    )
    sheet.paste(Image.fromarray(body), (label_width, header))
    draw = ImageDraw.Draw(sheet)
    for column, time in enumerate(times):
        known = time < context_frames
        text = "given" if known else f"+{time - context_frames + 1}"
        place = (label_width + column * cell + cell // 2, header // 2)
        draw.text(place, text, fill=CONTEXT_COLOR if known else (220, 220, 220), anchor="mm")
    height = rows[0].shape[0]
    for clip in range(min(len(generated), GRID_ROWS)):
        top = header + clip * (2 * height + 6)
        for offset, text in ((0, "generated"), (height, "real")):
            draw.text((6, top + offset + height // 2), text, fill=(220, 220, 220), anchor="lm")
    write_atomically(path, sheet.save)


def write_mosaic(stem: Path, videos: Tensor, columns: int, context_frames: int, fps: float) -> None:
    """Write all videos (n, F, 3, H, W) in a grid: `stem.mp4`, and its last frame `stem.png`."""
    frames = [_enlarge(to_bytes(video), 128) for video in videos]
    for video in frames:
        for frame in video[:context_frames]:
            _mark(frame)
    blank = np.full_like(frames[0], BACKGROUND)
    frames += [blank] * (-len(frames) % columns)
    mosaic = rearrange(np.stack(frames), "(r c) f h w k -> f (r h) (c w) k", c=columns)
    write_video(stem.with_suffix(".mp4"), mosaic, fps)
    write_atomically(stem.with_suffix(".png"), Image.fromarray(mosaic[-1]).save)


def _enlarge(frames: np.ndarray, side: int = MIN_SIDE) -> np.ndarray:
    """Enlarge by a whole number without smoothing, to at least `side` pixels."""
    factor = -(-side // max(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _mark(frame: np.ndarray) -> None:
    """Draw a border into a frame (H, W, 3)."""
    width = max(frame.shape[0] // 48, 2)
    for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        frame[edge] = CONTEXT_COLOR


def remove_other_videos(folder: Path, numbers: range) -> None:
    """Delete the numbered videos that an earlier command left, but for those to be written now."""
    for path in folder.glob("[0-9]*.mp4"):
        if path.stem.isdecimal() and int(path.stem) not in numbers:
            path.unlink()


def sample_videos(
    checkpoint: Path, opt: str | None, count: int, output: Path | None, overrides: list[str]
) -> None:
    """Continue `count` validation clips and write them to a folder.

    Args:
        opt: an options file instead of the options in the checkpoint.
        output: None: `experiments/<name>/videos`.
        overrides: `key=value`.

    Raises:
        ScdError: the checkpoint or the data cannot be used, or there are too few clips.
    """
    if count < 1:
        raise ScdError(f"--num-videos must be at least 1, not {count}")
    loaded = load_checkpoint_for_use(checkpoint, opt, overrides).for_rollouts()
    options = loaded.options
    folder = output or options.output / "videos"
    data = clip_folder(options, options.data.val_list, "video")
    try:  # before anything is generated for it
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScdError(f"{folder}: cannot be written ({error.strerror or error})") from error
    note_repeats(data, count)
    known = options.eval.context_frames
    videos = []
    for start in tqdm(range(0, count, options.eval.batch_size), desc="sample", unit="batch"):
        numbers = list(range(start, min(start + options.eval.batch_size, count)))
        batch = read_evaluation_batch(data, numbers, options, loaded.model.device)
        predicted = predict_frames(
            loaded.model, loaded.codec, options, batch, numbers, options.eval.seeds[0]
        )
        whole = torch.cat([batch["video"][:, :known], predicted], dim=1).cpu()
        finite = whole.isfinite().all(dim=(1, 2, 3, 4)).tolist()
        if broken := [number for number, fine in zip(numbers, finite, strict=True) if not fine]:
            raise not_finite(str(checkpoint), broken)
        for number, video, real in zip(numbers, whole, batch["video"].cpu(), strict=True):
            path = folder / f"{number:05d}.mp4"
            write_side_by_side(path, video, real, known, options.data.fps)
        videos.append(whole)
    if output is None:
        remove_other_videos(folder, range(count))
    columns = math.ceil(math.sqrt(count))
    write_mosaic(folder / "grid", torch.cat(videos), columns, known, options.data.fps)
    print(f"{folder}: {count} videos (left generated, right real), grid.mp4 and grid.png")
