"""Checkpoints of the paper's public code: read their names, fill our modules."""

import re
from pathlib import Path

import torch
from torch import Tensor

from scd.errors import ScdError, reason
from scd.models.layers import HEAD_DIM
from scd.models.scd import SCD
from scd.models.weights import build_to_fit, read_state_dict

RENAMED = {
    "x_embedder": "embed",
    "timestep_embedder": "conditioning.time",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "unembed",
    "decoder_input_proj": "fuse",
    "attn.norm_q": "attention.norm_q",
    "attn.norm_k": "attention.norm_k",
    "attn.to_out.0": "attention.out",
    "norm1.linear": "modulation_attention.linear",
    "norm2.linear": "modulation_mlp.linear",
    "mlp.net.0.proj": "mlp.up",
    "mlp.net.2": "mlp.down",
}


def load_reference_checkpoint(
    source: str | Path | dict[str, Tensor], patch_size: int = 1, fusion: str = "token_concat"
) -> SCD:
    """Make an `SCD` with the weights of the reference implementation.

    Sizes, layers and conditions are read off the tensors.

    Args:
        source: its `ema.pth` (or a safetensors file), or the flat state dict with the prefixes
            `encoder.` and `decoder.`.

    Raises:
        ScdError: the file holds anything but tensors, or the tensors are no such network.
    """
    name = "state dict" if isinstance(source, dict) else str(source)
    tensors = dict(source) if isinstance(source, dict) else read_state_dict(Path(source))
    try:
        configuration = _configuration(tensors, patch_size, fusion)
        converted = _convert(tensors, fusion)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ScdError(
            f"{name}: not a reference SCD checkpoint ({reason(error)}), nor one of this project, "
            f"whose options are in the file's metadata"
        ) from error
    return build_to_fit(lambda: SCD(**configuration), converted, name).eval()


def _configuration(tensors: dict[str, Tensor], patch_size: int, fusion: str) -> dict:
    width, patch = tensors["encoder.x_embedder.weight"].shape
    if width % HEAD_DIM or patch % patch_size**2:
        raise ValueError(f"width {width} or patch of {patch} values do not fit")
    tables = {k: t for k, t in tensors.items() if k.startswith("decoder.") and "_table" in k}
    condition, count = "none", 0
    for key, table in tables.items():
        condition = "action" if "action" in key else "label"
        count = table.shape[0] - 1
    return {
        "channels": patch // patch_size**2,
        "patch_size": patch_size,
        "heads": width // HEAD_DIM,
        "encoder_layers": _layers(tensors, "encoder"),
        "decoder_layers": _layers(tensors, "decoder"),
        "fusion": fusion,
        "condition": condition,
        "num_conditions": count,
        "modulate_context": "encoder.norm_out.linear.weight" in tensors,
        "modulate_output": "decoder.norm_out.linear.weight" in tensors,
    }


def _layers(tensors: dict[str, Tensor], part: str) -> int:
    pattern = re.compile(rf"{part}\.transformer_blocks\.(\d+)\.")
    numbers = [int(match[1]) for match in map(pattern.match, tensors) if match]
    if not numbers:
        raise ValueError(f"no {part}.transformer_blocks")
    if max(numbers) >= len(tensors):
        raise ValueError(f"{part}.transformer_blocks.{max(numbers)}, but few tensors")
    return max(numbers) + 1


def _convert(tensors: dict[str, Tensor], fusion: str) -> dict[str, Tensor]:
    converted, unknown = {}, {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", rest)
        prefix = f"{part}.blocks.{block[1]}." if block else f"{part}."
        rest = block[2] if block else rest
        stem, _, leaf = rest.rpartition(".")
        head, _, tail = stem.partition(".")
        if stem in ("attn.to_q", "attn.to_k", "attn.to_v"):
            continue
        if "_table" in rest:
            converted[f"{prefix}conditioning.table.weight"] = tensor
        elif stem in RENAMED:
            converted[f"{prefix}{RENAMED[stem]}.{leaf}"] = tensor
        elif head == "timestep_embedder":
            converted[f"{prefix}conditioning.time.{tail}.{leaf}"] = tensor
        else:
            unknown[key] = tensor
    for key in [key for key in tensors if ".attn.to_q." in key]:
        part, _, number, _, _, leaf = key.split(".")
        q, k, v = (tensors[key.replace("to_q", f"to_{letter}")] for letter in "qkv")
        qkv = torch.cat([_halves(q), _halves(k), v])
        converted[f"{part}.blocks.{number}.attention.qkv.{leaf}"] = qkv
    for key in [key for key in converted if ".attention.norm_" in key]:
        converted[key.removesuffix(".weight")] = _halves(converted.pop(key))
    if fusion == "token_concat_with_proj":
        unknown = _take_context_projection(unknown, converted)
    return converted | unknown


def _halves(channels: Tensor) -> Tensor:
    """Reorder the first axis from adjacent pairs to halves, head by head (see `Rotary.rotate`)."""
    heads = channels.unflatten(0, (-1, HEAD_DIM // 2, 2))
    return heads.transpose(1, 2).reshape(channels.shape)


def _take_context_projection(
    unknown: dict[str, Tensor], converted: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Take the context's LayerNorm and Linear from the rest, recognized by their shapes.

    The only matrix among the decoder's remaining tensors is the Linear's.
    """
    stems = {key.rpartition(".")[0] for key in unknown if key.startswith("decoder.")}
    rest = dict(unknown)
    for stem in stems:
        weight = unknown.get(f"{stem}.weight")
        if weight is None:
            continue
        name = "context_proj" if weight.ndim == 2 else "context_norm"
        for leaf in ("weight", "bias"):
            tensor = rest.pop(f"{stem}.{leaf}", None)
            if tensor is not None:
                converted[f"decoder.{name}.{leaf}"] = tensor
    if (
        "decoder.context_norm.weight" not in converted
        and "decoder.context_proj.weight" in converted
    ):
        width = converted["decoder.context_proj.weight"].shape[0]  # a norm without weights
        converted["decoder.context_norm.weight"] = torch.ones(width)
        converted["decoder.context_norm.bias"] = torch.zeros(width)
    return rest
