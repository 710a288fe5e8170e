"""Convert a pretrained Wan, from the hub or a folder, to a folder of this project's model."""

import fnmatch
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from scd.data.hub import Repository, check_space, exclusive_use, size_text
from scd.errors import ScdError
from scd.models.weights import build_to_fit, read_state_dict, read_weights
from scd.options import RolloutOptions
from scd.utils.files import read_json, write_folder_atomically
from scd.utils.paths import why_missing
from scd.wan.names import read_any_names, with_diffusers_names
from scd.wan.network import WanWorldModel
from scd.wan.text import ON_HUB
from scd.wan.wan_pipeline import SCDWanPipeline

WEIGHTS = "diffusion_pytorch_model*.safetensors"
WAN_VAE = "Wan2.1_VAE.pth"
INDEX = "model_index.json"  # of a pipeline in diffusers' format
SECOND = "transformer_2/config.json"  # of a Wan2.2 with an expert for each range of noise levels
FILES = ("config.json", WEIGHTS)
WANTED = {  # of a repository on the hub, by whether it is in diffusers' format
    True: [f"{part}/{file}" for part in ("transformer", "vae") for file in FILES],
    False: [*FILES, WAN_VAE],
}
SPACE_FACTOR = 3  # of the download: itself, and what is written, with the layers that exist twice
# As Wan is sampled, at the shift of all recipes that distil it.
ROLLOUT = RolloutOptions(
    steps=50, shift=5.0, guidance="condition", guidance_scale=5.0, precision="auto"
)

Network = TypeVar("Network", bound=torch.nn.Module)


def convert(
    source: str,
    out: Path,
    make: Callable[[WanTransformer3DModel], WanWorldModel],
    weights: Path | None = None,
    endpoint: str | None = None,
) -> None:
    """Write the folder of an `SCDWanPipeline` without text encoder, all weights in float32.

    Args:
        source: a folder or a repository on the hub, in diffusers' format or in Wan's own.
        make: `from_wan` of the model that is wanted.
        weights: a file that takes the place of the source's transformer, such as a checkpoint of
            Self-Forcing; see `scd.wan.names.read_any_names`.
        endpoint: address of the hub; None: $HF_ENDPOINT or huggingface.co.

    Raises:
        ScdError: no such source, a part of it is missing, damaged or does not fit, no access to the
            hub, or the folder holds something else or cannot be written.
    """
    if out.exists() and not (out / INDEX).is_file():
        raise ScdError(f"{out} exists and holds no converted model: choose another folder")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _convert_folder(folder, out, make, weights, source)
    if not re.fullmatch(ON_HUB, source):
        raise ScdError(f"{source}: {why_missing(folder, 'folder')}, and no OWNER/NAME of the hub")
    with exclusive_use(out.parent) as state:
        repo = Repository(source, "model", state / source.replace("/", "--"), endpoint)
        _fetch(repo, out.parent)
        _convert_folder(repo.downloads, out, make, weights, source)
        shutil.rmtree(repo.downloads, ignore_errors=True)


def _fetch(repo: Repository, folder: Path) -> None:
    commit, files = repo.files()
    names = {file.name for file in files}
    if SECOND in names:
        raise _two_experts(str(repo))
    patterns = WANTED["transformer/config.json" in names]
    wanted = [f for f in files if any(fnmatch.fnmatch(f.name, pattern) for pattern in patterns)]
    if not wanted:
        raise ScdError(f"{repo}: holds no Wan, neither in diffusers' format nor in Wan's own")
    size = sum(file.size for file in wanted)
    check_space(folder, SPACE_FACTOR * size, repo)
    print(f"{repo}: {len(wanted)} files ({size_text(size)})")
    repo.download(wanted, commit)


def _convert_folder(
    folder: Path,
    out: Path,
    make: Callable[[WanTransformer3DModel], WanWorldModel],
    weights: Path | None,
    source: str,
) -> None:
    vae = read_autoencoder(folder)
    model = make(read_transformer(folder, weights))
    options = {
        "source": source,
        "weights": None if weights is None else str(weights),
        "rollout": asdict(ROLLOUT),
    }
    pipeline = SCDWanPipeline(model, vae, rollout=asdict(ROLLOUT), options=options)
    write_folder_atomically(out, pipeline.save_pretrained)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {type(model).__name__}, {count / 1e6:.1f} million parameters, from {source}")


def read_transformer(folder: Path, weights: Path | None = None) -> WanTransformer3DModel:
    """Read the transformer of a folder in diffusers' format or in Wan's own, in float32.

    Args:
        weights: a file that is read in place of the folder's.

    Raises:
        ScdError: it is missing or damaged, or tensors and config do not fit together.
    """
    if (folder / SECOND).is_file():
        raise _two_experts(str(folder))
    in_diffusers = (folder / "transformer").is_dir()
    if not in_diffusers and not (folder / "config.json").is_file():
        raise ScdError(f"{folder}: no Wan: holds neither transformer/ nor Wan's own config.json")
    place = folder / "transformer" if in_diffusers else folder
    config = _config(place)
    name = str(place if weights is None else weights)
    tensors = read_any_names(weights) if weights is not None else _read_shards(place)
    tensors = with_diffusers_names(tensors, name)
    if not in_diffusers:
        config = _from_wan_config(config, tensors, place)
    elif config.get("_class_name") != "WanTransformer3DModel":
        raise ScdError(
            f"{place}/config.json: describes a {config.get('_class_name')!r}, not a "
            f"WanTransformer3DModel: convert Wan's own folder"
        )
    layers = config.get("num_layers")
    if not isinstance(layers, int) or not 0 < layers <= len(tensors):
        raise ScdError(f"{place}/config.json: {layers} layers, but {len(tensors)} tensors")
    transformer = build_to_fit(lambda: WanTransformer3DModel.from_config(config), tensors, name)
    return _checked(transformer, name)


def _two_experts(source: str) -> ScdError:
    return ScdError(
        f"{source}: has two transformers, one for high noise and one for low: only a Wan of one "
        f"can be converted"
    )


def read_autoencoder(folder: Path) -> AutoencoderKLWan:
    """Read the autoencoder of a folder in diffusers' format or in Wan's own, in float32.

    Raises:
        ScdError: it is missing or damaged, or tensors and config do not fit together.
    """
    place = folder / "vae"
    if place.is_dir():
        config, tensors = _config(place), _read_shards(place)
        if config.get("_class_name") != "AutoencoderKLWan":
            raise ScdError(f"{place}/config.json: describes a {config.get('_class_name')!r}")
    else:
        place = folder / WAN_VAE
        if not place.is_file():
            raise ScdError(f"{folder}: no Wan with its autoencoder: neither vae/ nor {WAN_VAE}")
        tensors = convert_wan_vae_to_diffusers(read_state_dict(place))
        first = tensors.get("encoder.conv_in.weight")
        config = {"base_dim": 96 if first is None else len(first)}
    vae = build_to_fit(lambda: AutoencoderKLWan.from_config(config), tensors, str(place))
    for key in ("latents_mean", "latents_std"):
        if not isinstance(values := vae.config[key], list) or len(values) != vae.config.z_dim:
            raise ScdError(
                f"{place}/config.json: {key} is not a list of {vae.config.z_dim} numbers"
            )
    return _checked(vae, str(place))


def _from_wan_config(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Any]:
    """Translate the config of Wan's own format to diffusers'."""
    if config.get("model_type") != "t2v":
        raise ScdError(
            f"{folder}/config.json: model_type is {config.get('model_type')!r}, not t2v: neither a "
            f"text-to-video Wan nor a folder in diffusers' format"
        )
    text = tensors.get("condition_embedder.text_embedder.linear_1.weight")
    try:
        return {
            "num_attention_heads": config["num_heads"],
            "attention_head_dim": config["dim"] // config["num_heads"],
            "in_channels": config["in_dim"],
            "out_channels": config["out_dim"],
            "text_dim": 4096 if text is None else text.shape[-1],
            "freq_dim": config["freq_dim"],
            "ffn_dim": config["ffn_dim"],
            "num_layers": config["num_layers"],
            "cross_attn_norm": "blocks.0.norm2.weight" in tensors,
            "eps": config["eps"],
        }
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ScdError(f"{folder}/config.json: not the config of a Wan ({error!r})") from error


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ScdError(f"{folder}/config.json: not a config")
    return config


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all weight files of a folder."""
    paths = sorted(folder.glob(WEIGHTS))
    if not paths:
        raise ScdError(f"{folder}/{WEIGHTS}: {why_missing(folder / WEIGHTS)}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        shard, _ = read_weights(path)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise ScdError(f"{path}: {twice[0]} is in another weight file of {folder} too")
        tensors |= shard
    return tensors


def _checked(network: Network, source: str) -> Network:
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ScdError(f"{source}: {name} is not finite")
    return network.eval()
