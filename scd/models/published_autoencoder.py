"""Published autoencoders, fetched from the Hugging Face hub and saved as diffusers folders."""

import re
import shutil
from pathlib import Path

import torch

from scd.data.hub import Repository, check_space, exclusive_use, size_text
from scd.data.published import AutoencoderSource
from scd.errors import ScdError
from scd.models.autoencoder import PUBLISHED_SCALING, build_autoencoder
from scd.models.weights import load_matching, read_state_dict
from scd.options import AutoencoderOptions, load_options
from scd.utils.files import sha256
from scd.utils.paths import project_file


def fetch_autoencoder(source: AutoencoderSource, folder: Path, endpoint: str | None = None) -> None:
    """Download a published DC-AE and save it as a diffusers folder, unless it is there already.

    Args:
        endpoint: address of the hub; None: $HF_ENDPOINT or huggingface.co.

    Raises:
        ScdError: no network or access, too little disk space, or a file that is damaged or refused.
    """
    if (folder / "config.json").is_file():
        print(f"{folder}: there already")
        return
    options = load_options(project_file(source.options)).autoencoder
    with exclusive_use(folder.parent) as state:
        repo = Repository(source.repo, "model", state / "downloads", endpoint)
        commit, files = repo.files()
        file = next((f for f in files if f.name == source.file), None)
        if file is None:
            raise ScdError(f"{repo}: holds no {source.file}")
        check_space(folder.parent, 2 * file.size, repo)
        print(f"{repo}: {file.name} ({size_text(file.size)})")
        (path,) = repo.download([file], commit)
        digits = re.search(r"-([0-9a-f]{8})\.pth$", source.file)
        actual = sha256(path)
        if digits is None or not actual.startswith(digits[1]):
            path.unlink()
            raise ScdError(
                f"{repo}: {file.name} has SHA-256 {actual[:8]}..., not the digits in its name: "
                f"damaged or replaced, and deleted here"
            )
        convert_published(path, options, folder)
        shutil.rmtree(repo.downloads, ignore_errors=True)
    print(f"{folder}: autoencoder, from {source.repo} {source.file}")


def convert_published(weights: Path, options: AutoencoderOptions, folder: Path) -> None:
    """Save a published DC-AE state dict (`.pth`) as the diffusers folder that `load_codec` reads.

    Raises:
        ScdError: the file holds anything but tensors, they do not fit the options' architecture
            or are not finite, or the folder cannot be written.
    """
    tensors = read_state_dict(weights)
    autoencoder = build_autoencoder(options)
    load_matching(autoencoder, tensors, str(weights))
    for name, tensor in autoencoder.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ScdError(f"{weights}: {name} is not finite")
    autoencoder.register_to_config(scaling_factor=PUBLISHED_SCALING)
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
        autoencoder.save_pretrained(aside)
        aside.replace(folder)
    except OSError as error:
        raise ScdError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
