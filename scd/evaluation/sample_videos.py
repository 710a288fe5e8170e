"""Sample videos to look at: one mp4 each beside the real one, and all of them in one grid."""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from scd.data.clips import clip_folder
from scd.errors import ScdError
from scd.evaluation.pictures import write_mosaic, write_side_by_side
from scd.evaluation.protocol import predict_frames, read_evaluation_batch
from scd.models.load import load_checkpoint_for_use


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
    known = options.eval.context_frames
    videos = []
    for start in tqdm(range(0, count, options.eval.batch_size), desc="sample", unit="batch"):
        numbers = list(range(start, min(start + options.eval.batch_size, count)))
        batch = read_evaluation_batch(data, numbers, options, loaded.model.device)
        predicted = predict_frames(
            loaded.model, loaded.codec, options, batch, numbers, options.eval.seeds[0]
        )
        whole = torch.cat([batch["video"][:, :known], predicted], dim=1).cpu()
        for number, video, real in zip(numbers, whole, batch["video"].cpu(), strict=True):
            path = folder / f"{number:05d}.mp4"
            write_side_by_side(path, video, real, known, options.data.fps)
        videos.append(whole)
    columns = math.ceil(math.sqrt(count))
    write_mosaic(folder / "grid", torch.cat(videos), columns, known, options.data.fps)
    print(f"{folder}: {count} videos (left generated, right real), grid.mp4 and grid.png")
