"""Encode the videos of a list into latents, once, and enter them into the list file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from scd.data.latents import latents_made_by, write_latents
from scd.data.lists import read_list, write_list
from scd.data.video import VideoFile
from scd.errors import ScdError
from scd.models.autoencoder import CHUNK_FRAMES, LatentCodec, autoencoder_hash, load_codec
from scd.options import Options


@torch.no_grad()
def encode_dataset(options: Options) -> None:
    """Write the unscaled latents of every training video, skipping those that are already there.

    Latents go to `<root>/latents/<autoencoder>/…`, by the autoencoder's hash, so that another
    one never meets them; the training list's `latent_path` names them.

    Raises:
        ScdError: the experiment has no autoencoder, or a video is missing or broken.
    """
    path = options.autoencoder.path
    if path is None:
        raise ScdError("encode: autoencoder.path is null, so there is nothing to encode with")
    codec = load_codec(path)
    assert isinstance(codec, LatentCodec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec.to(device)
    made_by = autoencoder_hash(path)
    root = Path(options.data.root)
    list_path = root / options.data.train_list
    bf16 = options.train.mixed_precision == "bf16"
    entries = []
    for number, entry in enumerate(tqdm(read_list(list_path), desc="encode", unit="clip")):
        if entry.video_path is None:
            raise ScdError(f"{list_path}: entry {number} has no video_path")
        latent_path = Path("latents") / made_by[:12] / f"{entry.video_path}.safetensors"
        video = VideoFile(root / entry.video_path)
        if latents_made_by(root / latent_path) != (made_by, len(video)):
            chunks = []
            for start in range(0, len(video), CHUNK_FRAMES):
                indices = np.arange(start, min(start + CHUNK_FRAMES, len(video)))
                frames = torch.from_numpy(video.frames(indices)).permute(0, 3, 1, 2).to(device)
                if frames.shape[2] % codec.downsampling or frames.shape[3] % codec.downsampling:
                    raise ScdError(
                        f"{video.path}: {frames.shape[2]}x{frames.shape[3]} pixels do not divide "
                        f"by {codec.downsampling}, the downsampling of {path}"
                    )
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    chunks.append(codec.encode_images(frames.float() / 255).float().cpu())
            write_latents(root / latent_path, torch.cat(chunks), made_by)
        entries.append(replace(entry, latent_path=str(latent_path)))
    write_list(list_path, entries)
