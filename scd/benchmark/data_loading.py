"""Measure clips per second through the training's data loader, by number of workers.

The data set is made for the measurement: video of a camera that moves over a texture, and latents
of noise. Files are dropped from the page cache when they are written and after every reading, so
each one is read from disk.
"""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from scd.benchmark.cases import ACTIONS, CHANNELS, DataCase
from scd.benchmark.machine import peak_bytes
from scd.benchmark.rollouts import AUTOENCODER
from scd.data.clips import ClipFolder, clip_folder
from scd.data.latents import write_latents
from scd.data.lists import ClipEntry, write_list
from scd.data.loader import TrainingClips, training_batches
from scd.data.video import write_video
from scd.data.video_checks import VideoChecks
from scd.models.autoencoder import PUBLISHED_SCALING, LatentCodec, build_autoencoder
from scd.options import Options, load_options
from scd.training.step_cost import estimate_step
from scd.utils.files import write_atomically
from scd.utils.paths import project_file
from scd.utils.startup import usable_cores
from scd.utils.table import Table

SETTING = project_file("options/scd_minecraft.yml")
# The GPUs that the data have to keep up with; an estimate, as no step has been measured on them.
GPUS = 8
PEAK_FLOPS = 989e12  # per second, of an H100 SXM, dense bf16 (its data sheet)
UTILIZATION = 0.4  # of the peak; assumed


def run_data(case: DataCase, folder: Path) -> dict[str, Any]:
    """Time one case in this process, with its data on the file system of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with TemporaryDirectory(prefix="data-", dir=folder) as root:
        options = _options(case, root)
        files = _write_data(case, options)
        data = options.data
        clips = TrainingClips(
            clip_folder(options, data.train_list, data.source), data.frames, 1, options.seed
        )
        counts = worker_counts(len(usable_cores())) if case.workers is None else case.workers
        rates = [
            {"workers": workers, **_measure_rate(case, clips, options, workers, accelerator)}
            for workers in counts
        ]
    flops = flops_of_clip(options)
    return {
        "rates": rates,
        "file_bytes": files / case.clips,
        "flops_of_clip": flops,
        "taken": {
            "clips_per_second": clips_consumed(flops),
            "gpus": GPUS,
            "peak_flops": PEAK_FLOPS,
            "utilisation": UTILIZATION,
        },
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }


def worker_counts(cores: int) -> list[int]:
    """List the numbers of workers to time: 0, 1, 2, 4, ... and the number of cores."""
    powers = [2**n for n in range(cores.bit_length()) if 2**n < cores]
    return [0, *powers, cores]


def flops_of_clip(options: Options) -> float:
    """Count the operations of a training step per clip, as the dry run does."""
    with torch.device("meta"):
        codec = LatentCodec(build_autoencoder(AUTOENCODER))
    return estimate_step(options, codec).flops / options.train.batch_size


def clips_consumed(
    flops: float, gpus: int = GPUS, peak: float = PEAK_FLOPS, utilization: float = UTILIZATION
) -> float:
    """Compute the clips per second that GPUs train on, at so many operations per clip."""
    return gpus * peak * utilization / flops


def data_table(results: list[tuple[DataCase, dict[str, Any]]]) -> Table:
    """Tabulate the results, with a row for each number of workers."""
    heads = ["data", "workers", "clips/s", "MB/s of files", "CPU, ms/clip"]
    heads += [f"{GPUS} H100s need, clips/s", "÷ need", "cores for it"]
    lines = []
    for case, r in results:
        needed = r["taken"]["clips_per_second"]
        for rate in r["rates"]:
            clips, busy = rate["clips_per_second"], rate.get("cpu_seconds_a_clip")
            cells = [f"{clips:.1f}", f"{clips * r['file_bytes'] / 1e6:.0f}"]
            cells += ["–" if busy is None else f"{1e3 * busy:.1f}"]
            cells += [f"{needed:.1f}", f"{clips / needed:.2f}"]
            cells += ["–" if busy is None else f"{busy * needed:.1f}"]
            lines.append([case.name, str(rate["workers"]), *cells])
    notes = [
        "Batches of 2 clips with their actions, files read from disk. 0 workers: on one thread, "
        "which also gives the CPU time of a clip. What GPUs need is an estimate on paper: the "
        f"model of {SETTING.name} on clips of so many frames, the dry run's count of operations, "
        f"{UTILIZATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s on each GPU, without the encoding "
        "of videos. Cores for it: CPU time of a clip times those clips."
    ]
    return Table(heads, lines, 1, notes)


def _options(case: DataCase, root: str) -> Options:
    """Load the paper's Minecraft options with the case's data."""
    source = "video" if case.suffix == ".mp4" else "latents"
    return load_options(
        SETTING,
        [
            f"data.root={root}",
            "data.train_list=train.json",
            f"data.source={source}",
            f"data.frames={case.frames}",
            f"data.frame_size={case.size}",
            f"train.steps={10**9}",  # as many batches as there is time for
        ],
    )


def _write_data(case: DataCase, options: Options) -> int:
    """Write the clips and their list; returns the total size of the files in bytes."""
    root, rng = Path(options.data.root), np.random.default_rng(0)
    entries = []
    for number in range(case.clips):
        path, action_path = root / f"{number}{case.suffix}", root / f"{number}.npz"
        if case.suffix == ".mp4":
            write_video(path, moving_camera(rng, case.episode, case.size), options.data.fps)
        else:
            side = case.size // 16
            values = rng.standard_normal((case.episode, CHANNELS, side, side), dtype=np.float32)
            latents = torch.from_numpy(values / PUBLISHED_SCALING).to(getattr(torch, case.stored))
            if case.suffix == ".pt":
                write_atomically(path, partial(torch.save, latents))
            else:
                write_latents(path, latents, "benchmark")
        actions = rng.integers(ACTIONS, size=case.episode)
        write_atomically(action_path, partial(np.savez, actions=actions))
        entry = ClipEntry(action_path=action_path.name)
        video = case.suffix == ".mp4"
        entries.append(
            replace(entry, video_path=path.name) if video else replace(entry, latent_path=path.name)
        )
    sizes = sum(path.stat().st_size for path in root.iterdir())
    write_list(root / options.data.train_list, entries)
    # `scd make-lists` and `scd validate` do this once; it is not part of reading a clip.
    VideoChecks(root).check_all(entry.video_path for entry in entries if entry.video_path)
    for path in root.iterdir():
        _drop(path)
    return sizes


def _drop(path: Path) -> None:
    """Drop a file from the page cache, which keeps what is not on the disk yet."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def moving_camera(rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """Render video of a camera that shifts, turns and zooms over a texture, (F, size, size, 3).

    With the grain of its finest detail it takes some 3 bits per pixel, as recorded Doom does.
    """
    texture = torch.zeros(1, 3, 4 * size, 4 * size)
    for detail, strength in ((8, 1.0), (32, 0.5), (4 * size, 0.4)):
        noise = torch.from_numpy(rng.standard_normal((1, 3, detail, detail), dtype=np.float32))
        texture += strength * F.interpolate(noise, size=texture.shape[-2:], mode="bicubic")
    x, y, angle, zoom = (_walk(rng, frames, step) for step in (0.004, 0.004, 0.01, 0.01))
    scale = 0.25 * zoom.clamp(-1, 1).exp()
    rows = (
        scale * angle.cos(),
        -scale * angle.sin(),
        x,
        scale * angle.sin(),
        scale * angle.cos(),
        y,
    )
    grid = F.affine_grid(
        torch.stack(rows, dim=1).view(frames, 2, 3), [frames, 3, size, size], align_corners=False
    )
    video = F.grid_sample(
        texture.expand(frames, -1, -1, -1), grid, padding_mode="reflection", align_corners=False
    )
    return (128 + 48 * video).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _walk(rng: np.random.Generator, frames: int, step: float) -> Tensor:
    """Draw a smooth random path (F,) that returns to zero again and again."""
    position, speed, path = 0.0, 0.0, []
    for _ in range(frames):
        speed = 0.9 * speed + rng.normal(0, step)
        position = 0.98 * position + speed
        path.append(position)
    return torch.tensor(path)


def _measure_rate(
    case: DataCase, clips: TrainingClips, options: Options, workers: int, accelerator: Accelerator
) -> dict[str, float]:
    """Measure clips per second, after the batches that workers prefetch when they start."""
    train, threads = replace(options.train, workers=workers), torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        with training_batches(0, clips, train, accelerator) as batches:
            for _ in range(1 + 4 * workers):
                _drop_from_cache(next(batches), clips)
            began, busy, count = time.perf_counter(), time.process_time(), 0
            while not count or time.perf_counter() - began < case.seconds:
                count += len(_drop_from_cache(next(batches), clips))
            rate = {"clips_per_second": count / (time.perf_counter() - began)}
            if not workers:  # all reading is in this process
                rate["cpu_seconds_a_clip"] = (time.process_time() - busy) / count
            return rate
    finally:
        torch.set_num_threads(threads)


def _drop_from_cache(batch: dict[str, Tensor], clips: TrainingClips) -> Tensor:
    """Drop a batch's files from the page cache; returns the batch's sample numbers."""
    folder = clips.folder
    assert isinstance(folder, ClipFolder)
    for sample in batch["sample"].tolist():
        entry = folder.entries[clips.number(sample)]
        for name in (entry.video_path, entry.latent_path, entry.action_path):
            if name is not None:
                _drop(folder.root / name)
    return batch["sample"]
