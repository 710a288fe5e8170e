"""Encode the videos of a list into latents, once, and enter them into the list file.

Any number of processes share the work. Each skips what is there already, so an interrupted run goes
on where it stopped; the list file changes at the end, when every entry's latents have been checked.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

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
from scd.models.autoencoder import CHUNK_FRAMES, Codec, LatentCodec, encoder_hash, load_codec
from scd.options import Options
from scd.utils.precision import autocast, resolve_precision
from scd.utils.processes import error_barrier, processes, split_between_processes


def encode_dataset(options: Options) -> None:
    """Write the unscaled latents of every training video, skipping those that are already there.

    Latents go to `<root>/latents/<encoder>/…`, by the hash of its weights, so that another's never
    meet them; the training list's `latent_path` names them. Where videos are scaled and cropped
    (`data.resize_shorter`), the latents are of the centre.

    Raises:
        ScdError: the experiment has no autoencoder, or a video is missing, broken or of a wrong
            size, or another process failed. The list file stays as it was.
    """
    path = options.autoencoder.path
    if path is None:
        raise ScdError("encode: autoencoder.path is null, so there is nothing to encode with")
    state = processes()
    codec = load_codec(path)
    assert isinstance(codec, LatentCodec)
    codec.to(state.device)
    precision = resolve_precision(options.train.mixed_precision, state.device)
    framing, shape = framing_of(options.data), latent_shape(codec, options)
    made_by = encoding_name(options)
    root = Path(options.data.root)
    list_path = root / options.data.train_list
    entries = read_list(list_path)
    folder = Path("latents") / (made_by[:12] + framing.name)
    names = {video: _latent_name(folder, video) for video in _videos(list_path, entries)}
    targets = {video: root / name for video, name in names.items()}
    lengths: dict[Path, int] = {}
    checks = VideoChecks(root)
    with error_barrier():
        for video in _progress(split_between_processes(list(targets))):
            opened, target = checks.open(video), targets[video]
            header = latent_header(target)
            wanted = LatentHeader(made_by, (len(opened), *shape))
            there = header is not None and replace(header, video=None) == wanted
            if not there or of_another_video(header, target, root / video) is not None:
                latents = _encode_video(opened, codec, framing, precision)
                write_latents(target, latents, made_by, identity_of(root / video))
            lengths[targets[video]] = len(opened)
    lengths = dict(item for part in gather_object([lengths]) for item in part.items())
    found_out = gather_object([checks.new])
    with error_barrier():
        if state.is_main_process:
            for part in found_out:
                checks.add(part)
            checks.save()  # so that nothing is checked twice
    with error_barrier():
        if not state.is_main_process:
            return
        found = check_latents(list(targets.values()), made_by, shape)
        for target, length in lengths.items():
            if found[target] != length:
                raise ScdError(f"{target}: {found[target]} latents for {length} frames")
        write_list(
            list_path,
            [replace(entry, latent_path=str(names[str(entry.video_path)])) for entry in entries],
        )


@torch.no_grad()
def _encode_video(video: Video, codec: LatentCodec, framing: Framing, precision: str) -> Tensor:
    """The unscaled latents (F, C, h, w) of a whole video, float32 on the CPU."""
    device = codec.autoencoder.device
    chunks = []
    for images in video.chunks(CHUNK_FRAMES):
        frames = framing(as_images(images), video.path).to(device)
        with autocast(device, precision):
            chunks.append(codec.encode_images(frames.float() / 255).float().cpu())
    return torch.cat(chunks)


def encoding_name(options: Options) -> str:
    """What identifies how latents were made: the encoder's hash, and any scaling before it."""
    return encoder_hash(str(options.autoencoder.path)) + framing_of(options.data).name


def latent_spec(options: Options) -> LatentSpec | None:
    """Describe the latents that an experiment trains on; None if it reads videos.

    Raises:
        ScdError: there is no autoencoder, or the frames do not divide into latents.
    """
    if options.data.source == "video":
        return None
    codec = load_codec(options.autoencoder.path)
    return LatentSpec(encoding_name(options), latent_shape(codec, options))


def check_training_latents(folder: ClipFolder, codec: Codec, options: Options) -> None:
    """Refuse a training list whose latents are not what `options` would encode; collective.

    The main process alone opens the files: hundreds of processes that open all of them keep a
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


def latent_shape(codec: Codec, options: Options) -> tuple[int, int, int]:
    """(C, h, w) of one frame's latents.

    Raises:
        ScdError: the frames do not divide into latents.
    """
    side, rest = divmod(options.data.frame_size, codec.downsampling)
    if rest:
        raise ScdError(
            f"data.frame_size={options.data.frame_size} does not divide by {codec.downsampling}, "
            f"the downsampling of {options.autoencoder.path}"
        )
    return codec.channels, side, side


def _videos(list_path: Path, entries: list[ClipEntry]) -> list[str]:
    """The videos of a list, each once."""
    for number, entry in enumerate(entries):
        if entry.video_path is None:
            raise ScdError(f"{list_path}: entry {number} has no video_path")
    return list(dict.fromkeys(str(entry.video_path) for entry in entries))


def _latent_name(folder: Path, video: str) -> Path:
    """Name a video's latents after it, or by its name's hash where that gets too long."""
    name = folder / f"{video}.safetensors"
    if path_problem(str(name)) is None:
        return name
    return folder / f"{hashlib.sha256(video.encode()).hexdigest()}.safetensors"


def _progress(videos: Sequence[str]) -> Iterable[str]:
    state = processes()
    name = "encode" if state.num_processes == 1 else f"encode (1 of {state.num_processes})"
    quiet = not state.is_local_main_process
    return tqdm(videos, desc=name, unit="clip", disable=quiet, dynamic_ncols=True)
