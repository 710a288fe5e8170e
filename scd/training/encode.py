"""Encode training videos into latents once, and check before training that they still fit.

Any number of processes share the work. Videos that are already encoded are skipped, so an
interrupted run can be repeated. The list file changes at the end, when the latents of every entry
have been checked.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from scd.data.clips import ClipFolder
from scd.data.framing import Framing, as_images, framing_of
from scd.data.latents import (
    LatentHeader,
    LatentSpec,
    check_latents,
    latent_header,
    of_another_video,
    write_latents,
)
from scd.data.lists import ClipEntry, path_problem, read_list, write_list
from scd.data.video import Video
from scd.data.video_checks import VideoChecks, identity_of
from scd.errors import ScdError
from scd.models.autoencoder import CHUNK_FRAMES, LatentCodec, PixelCodec, encoder_hash
from scd.options import Options
from scd.training.build import AnyCodec, build_codec, latent_frames, latent_shape
from scd.utils.precision import autocast, resolve_precision
from scd.utils.processes import error_barrier, processes, split_between_processes
from scd.wan.video_codec import WanCodec

PREFETCH_BYTES = 2**28  # of a longer video, only the first frames are read ahead


class _Read(NamedTuple):
    """A video that was read, and is to be encoded."""

    latents: int  # that it has
    identity: str  # of its file, before it was read
    frames: Iterable[Tensor] | None  # (n, 3, H, W) each; None: it is encoded already


def encode_dataset(options: Options) -> None:
    """Write the unscaled latents of every training video, skipping those that are already there.

    Latents go to `<root>/latents/<encoder>/…`, named by a hash of its weights, so that those of
    different encoders never mix; the training list's `latent_path` points to them. Where videos are
    scaled and cropped (`data.resize_shorter`), the latents are of the center crop. While one video
    is encoded, `train.workers` threads check, read and scale the next ones.

    Raises:
        ScdError: the experiment has no autoencoder, or a video is missing, broken or of a wrong
            size, or another process failed. The list file stays as it was.
    """
    if options.data.source == "prompts":
        raise ScdError("encode: data.source=prompts has no videos to encode")
    if options.autoencoder.path is None:
        raise ScdError("encode: autoencoder.path is null, so there is nothing to encode with")
    state = processes()
    codec = build_codec(options)
    assert not isinstance(codec, PixelCodec)
    codec.to(state.device)
    precision = resolve_precision(options.train.mixed_precision, state.device)
    framing, shape = framing_of(options.data), latent_shape(codec, options)
    made_by = encoding_name(options)

    root = Path(options.data.root)
    list_path = root / options.data.train_list
    entries = read_list(list_path)
    folder = Path("latents") / (made_by[:12] + framing.name)
    targets = {video: _latent_name(folder, video) for video in _videos(list_path, entries)}

    checks = VideoChecks(root)
    lengths: dict[str, int] = {}  # latents of each video
    failed: Exception | None = None

    def read(name: str) -> _Read:
        identity, video = identity_of(root / name), checks.open(name)
        count = latent_frames(codec, len(video))
        header = LatentHeader(made_by, (count, *shape))
        done = _is_encoded(root / targets[name], root / name, header)
        return _Read(count, identity, None if done else _frames(video, framing))

    try:
        names = split_between_processes(list(targets))
        with closing(_prefetch(read, names, options.train.workers)) as videos:
            for name, video in zip(_progress(names), videos, strict=True):
                if video.frames is not None:
                    latents = _encode_video(video.frames, codec, precision)
                    write_latents(root / targets[name], latents, made_by, video.identity)
                lengths[name] = video.latents
    except Exception as error:
        failed = error
    finally:  # no video is checked twice, not even after an error or, of one process, Ctrl-C
        if state.num_processes == 1:
            checks.save()

    parts = gather_object([(lengths, checks.new)])
    with error_barrier():
        if state.is_main_process:
            for _, new_checks in parts:
                checks.add(new_checks)
            checks.save()
    with error_barrier():
        if failed is not None:
            raise failed
    with error_barrier():
        if state.is_main_process:
            found = check_latents([root / target for target in targets.values()], made_by, shape)
            for part, _ in parts:
                for name, length in part.items():
                    target = root / targets[name]
                    if found[target] != length:
                        raise ScdError(f"{target}: {found[target]} latents, expected {length}")
            named = [replace(e, latent_path=str(targets[str(e.video_path)])) for e in entries]
            write_list(list_path, named)
            print(f"{list_path}: names the latents of {len(named)} clips, in {root / folder}")


def latent_spec(options: Options) -> LatentSpec | None:
    """Describe the latents that an experiment trains on; None if it reads videos.

    Raises:
        ScdError: there is no autoencoder, or the frames do not divide into latents.
    """
    if options.data.source != "latents":
        return None
    codec = build_codec(options)
    shape = latent_shape(codec, options)
    return LatentSpec(encoding_name(options), shape, codec.frames_per_latent)


def check_training_latents(folder: ClipFolder, codec: AnyCodec, options: Options) -> None:
    """Refuse a training list whose latents are not those that `options` would encode; collective.

    Only the main process opens the files: hundreds of processes that open all of them would keep a
    shared file system busy for minutes.

    Raises:
        ScdError: see `scd.data.latents.check_latents`.
    """
    paths = [folder.root / str(entry.latent_path) for entry in folder.entries]
    folder.frame_shape = latent_shape(codec, options)
    broken = options.data.max_broken_clips
    with error_barrier():
        if processes().is_main_process:
            videos = {
                path: folder.root / entry.video_path
                for path, entry in zip(paths, folder.entries, strict=True)
                if entry.video_path is not None
            }
            check_latents(paths, encoding_name(options), folder.frame_shape, broken, videos)


def encoding_name(options: Options) -> str:
    """Identify how latents are made: by the encoder's hash, and any scaling before it."""
    return encoder_hash(str(options.autoencoder.path)) + framing_of(options.data).name


def _is_encoded(target: Path, video: Path, wanted: LatentHeader) -> bool:
    """Check whether a file holds the latents of a video as it is now, made by this encoder."""
    header = latent_header(target)
    if header is None or replace(header, video=None) != wanted:
        return False
    return of_another_video(header, target, video) is None


def _prefetch(
    read: Callable[[str], _Read], names: Sequence[str], threads: int
) -> Generator[_Read, None, None]:
    """Read videos in order; while one of them is used, threads read the next ones."""
    if not threads:
        yield from map(read, names)
        return
    waiting: deque[Future[_Read]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name in names:
                waiting.append(pool.submit(read, name))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _frames(video: Video, framing: Framing) -> Iterable[Tensor]:
    """Read the frames of an experiment, at most `CHUNK_FRAMES` at once: (n, 3, H, W) uint8.

    They are read now, but of a long video all but the first ones when they are used.
    """
    chunks = (framing(as_images(part), video.path) for part in video.chunks(CHUNK_FRAMES))
    first = next(chunks)
    if first[0].nbytes * len(video) > PREFETCH_BYTES:
        return chain([first], chunks)
    return [first, *chunks]


@torch.no_grad()
def _encode_video(
    frames: Iterable[Tensor], codec: LatentCodec | WanCodec, precision: str
) -> Tensor:
    """Encode the parts of a video into unscaled latents (n, C, h, w), float32 on the CPU."""
    device = codec.autoencoder.device
    if isinstance(codec, WanCodec):  # which goes through a video by itself
        codec.precision = precision
        video = torch.cat(list(frames))[None].to(device)
        return codec.encode_unscaled(video.float() / 255)[0].cpu()
    chunks = []
    for part in frames:
        with autocast(device, precision):
            chunks.append(codec.encode_images(part.to(device).float() / 255).float().cpu())
    return torch.cat(chunks)


def _videos(list_path: Path, entries: list[ClipEntry]) -> list[str]:
    """Name the videos of a list, each once."""
    for number, entry in enumerate(entries):
        if entry.video_path is None:
            raise ScdError(f"{list_path}: entry {number} has no video_path")
    return list(dict.fromkeys(str(entry.video_path) for entry in entries))


def _latent_name(folder: Path, video: str) -> Path:
    """Name a video's latents after it, or after a hash of its name where that would be too long."""
    name = folder / f"{video}.safetensors"
    if path_problem(str(name)) is None:
        return name
    return folder / f"{hashlib.sha256(video.encode()).hexdigest()}.safetensors"


def _progress(videos: Sequence[str]) -> Iterable[str]:
    state = processes()
    name = "encode" if state.num_processes == 1 else f"encode (1 of {state.num_processes})"
    quiet = not state.is_local_main_process
    return tqdm(videos, desc=name, unit="clip", disable=quiet, dynamic_ncols=True)
