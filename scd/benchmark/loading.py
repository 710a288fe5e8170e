"""Clips a second through the loader of training, by number of workers.

The data set is made for the measurement: pictures that a camera sees as it wanders over a texture,
and latents of noise. A file leaves the page cache when it has been read, so each is read from disk.
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
from scd.benchmark.streaming import AUTOENCODER
from scd.data.clips import clip_folder
from scd.data.latents import write_latents
from scd.data.lists import ClipEntry, write_list
from scd.data.loader import TrainingClips, training_batches
from scd.data.video import write_video
from scd.data.video_checks import VideoChecks
from scd.evaluation.table import Table
from scd.models.autoencoder import PUBLISHED_SCALING, LatentCodec, build_autoencoder
from scd.options import Options, load_options
from scd.training.performance import estimate_step
from scd.utils.files import write_atomically
from scd.utils.paths import project_file

SETTING = project_file("options/scd_minecraft.yml")
# What the data have to keep up with, on paper: nobody has measured a step on these GPUs.
GPUS = 8
PEAK_FLOPS = 989e12  # a second, of an H100 SXM, dense bf16 (its data sheet)
UTILISATION = 0.4  # of the peak; assumed


def run_data(case: DataCase, folder: Path) -> dict[str, Any]:
    """Time one case in this process, on the file system of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with TemporaryDirectory(prefix="data-", dir=folder) as root:
        options = _options(case, root)
        files = _write_data(case, options)
        data = options.data
        clips = TrainingClips(
            clip_folder(options, data.train_list, data.source), data.frames, 1, options.seed
        )
        counts = worker_counts(_cores()) if case.workers is None else case.workers
        rates = [
            {"workers": workers, **_rate(case, clips, options, workers, accelerator)}
            for workers in counts
        ]
    flops = flops_of_clip(options)
    return {
        "rates": rates,
        "file_bytes": files / case.clips,
        "flops_of_clip": flops,
        "taken": {
            "clips_per_second": clips_taken(flops),
            "gpus": GPUS,
            "peak_flops": PEAK_FLOPS,
            "utilisation": UTILISATION,
        },
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }


def worker_counts(cores: int) -> list[int]:
    """0, 1, 2, 4, ... and as many as there are cores."""
    powers = [2**n for n in range(cores.bit_length()) if 2**n < cores]
    return [0, *powers, cores]


def flops_of_clip(options: Options) -> float:
    """Of a training step, for each of its clips, as the dry run counts them."""
    with torch.device("meta"):
        codec = LatentCodec(build_autoencoder(AUTOENCODER))
    return estimate_step(options, codec).flops / options.train.batch_size


def clips_taken(
    flops: float, gpus: int = GPUS, peak: float = PEAK_FLOPS, utilisation: float = UTILISATION
) -> float:
    """Clips a second that GPUs train on, if a clip takes so many operations."""
    return gpus * peak * utilisation / flops


def data_table(results: list[tuple[DataCase, dict[str, Any]]]) -> Table:
    """One line for each number of workers."""
    heads = ["data", "workers", "clips/s", "MB/s of files", "CPU, ms/clip"]
    heads += [f"{GPUS} H100s would take, clips/s", "times that", "cores for it"]
    lines = []
    for case, r in results:
        taken = r["taken"]["clips_per_second"]
        for rate in r["rates"]:
            found, busy = rate["clips_per_second"], rate.get("cpu_seconds_a_clip")
            cells = [f"{found:.1f}", f"{found * r['file_bytes'] / 1e6:.0f}"]
            cells += ["–" if busy is None else f"{1e3 * busy:.1f}"]
            cells += [f"{taken:.1f}", f"{found / taken:.2f}"]
            cells += ["–" if busy is None else f"{busy * taken:.1f}"]
            lines.append([case.name, str(rate["workers"]), *cells])
    notes = [
        "Batches of 2 clips with their actions, files read from disk; 0 workers: on one thread, "
        "which also tells how busy a clip keeps it. What GPUs would take is an estimate on paper: "
        f"the model of {SETTING.name} on clips of so many frames, the dry run's count of "
        f"operations, {UTILISATION:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s on each GPU; encoding "
        "of videos left out. Cores for it: CPU time of a clip times those clips."
    ]
    return Table(heads, lines, 1, notes)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _options(case: DataCase, root: str) -> Options:
    """The paper's setting on the case's data."""
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
    """Write the clips and their list; returns the bytes of all files that are read."""
    root, rng = Path(options.data.root), np.random.default_rng(0)
    entries = []
    for number in range(case.clips):
        path, action_path = root / f"{number}{case.suffix}", root / f"{number}.npz"
        if case.suffix == ".mp4":
            write_video(path, wandering(rng, case.episode, case.size), options.data.fps)
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
    # As `scd make-lists` and `scd validate` do once: that is not part of reading a clip.
    VideoChecks(root).check_all(entry.video_path for entry in entries if entry.video_path)
    return sizes


def wandering(rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """Pictures (F, size, size, 3) uint8 of a camera that shifts, turns and nears over a texture.

    With the grain of its finest detail they take some 3 bits a pixel, as recorded Doom does.
    """
    texture = torch.zeros(1, 3, 4 * size, 4 * size)
    for detail, strength in ((8, 1.0), (32, 0.5), (4 * size, 0.4)):
        noise = torch.from_numpy(rng.standard_normal((1, 3, detail, detail), dtype=np.float32))
        texture += strength * F.interpolate(noise, size=texture.shape[-2:], mode="bicubic")
    x, y, angle, nearness = (_walk(rng, frames, step) for step in (0.004, 0.004, 0.01, 0.01))
    scale = 0.25 * nearness.clamp(-1, 1).exp()
    rows = (
        scale * angle.cos(),
        -scale * angle.sin(),
        x,
        scale * angle.sin(),
        scale * angle.cos(),
        y,
    )
    places = F.affine_grid(
        torch.stack(rows, dim=1).view(frames, 2, 3), [frames, 3, size, size], align_corners=False
    )
    seen = F.grid_sample(
        texture.expand(frames, -1, -1, -1), places, padding_mode="reflection", align_corners=False
    )
    return (128 + 48 * seen).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _walk(rng: np.random.Generator, frames: int, step: float) -> Tensor:
    """A smooth random path (F,) that comes back to zero."""
    place, speed, path = 0.0, 0.0, []
    for _ in range(frames):
        speed = 0.9 * speed + rng.normal(0, step)
        place = 0.98 * place + speed
        path.append(place)
    return torch.tensor(path)


def _rate(
    case: DataCase, clips: TrainingClips, options: Options, workers: int, accelerator: Accelerator
) -> dict[str, float]:
    """Of batches as training draws them, after those that workers fetch as they start."""
    train, threads = replace(options.train, workers=workers), torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        with training_batches(0, clips, train, accelerator) as batches:
            for _ in range(1 + 4 * workers):
                _forget(next(batches), clips)
            began, busy, count = time.perf_counter(), time.process_time(), 0
            while not count or time.perf_counter() - began < case.seconds:
                count += len(_forget(next(batches), clips))
            rate = {"clips_per_second": count / (time.perf_counter() - began)}
            if not workers:  # nothing is read elsewhere
                rate["cpu_seconds_a_clip"] = (time.process_time() - busy) / count
            return rate
    finally:
        torch.set_num_threads(threads)


def _forget(batch: dict[str, Tensor], clips: TrainingClips) -> Tensor:
    """Drop a batch's files from the page cache; returns its sample numbers."""
    folder = clips.folder
    for sample in batch["sample"].tolist():
        entry = folder.entries[clips.number(sample)]
        for name in (entry.video_path, entry.latent_path, entry.action_path):
            if name is not None:
                with open(folder.root / name, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return batch["sample"]
