"""Names of a Wan's tensors: diffusers', Wan's own, and those in checkpoints of Self-Forcing.

Beware: Wan's affine norm before cross-attention is its `norm3`, which diffusers calls `norm2`; the
norms that go by these names on the other side have no weights.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from scd.errors import ScdError
from scd.models.weights import read_state_dict
from scd.utils.tensor_files import is_plain, read_pt

# Wan's name -> diffusers'; of modules, and of two parameters.
OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
ATTENTION |= {"norm_q": "norm_q", "norm_k": "norm_k"}
IN_BLOCKS = {
    **{f"self_attn.{wan}": f"attn1.{diffusers}" for wan, diffusers in ATTENTION.items()},
    **{f"cross_attn.{wan}": f"attn2.{diffusers}" for wan, diffusers in ATTENTION.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
GENERATORS = ("generator_ema", "generator")  # in Self-Forcing's checkpoints, the better one first
SHARDED = "_fsdp_wrapped_module."  # stands in names that were saved from a sharded model


def to_diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from Wan's names to diffusers'; unknown names stay, for others to refuse."""
    return _renamed(tensors, OUTSIDE_BLOCKS, IN_BLOCKS)


def to_wan_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from diffusers' names to Wan's; unknown names stay."""
    outside, inside = ({v: k for k, v in names.items()} for names in (OUTSIDE_BLOCKS, IN_BLOCKS))
    return _renamed(tensors, outside, inside)


def read_any_names(path: Path) -> dict[str, Tensor]:
    """Read a Wan's tensors from one file, and give them diffusers' names.

    Args:
        path: `.safetensors` or a file of `torch.save`, under diffusers' or Wan's names; or a
            checkpoint of Self-Forcing, whose averaged generator is taken if it has one.

    Raises:
        ScdError: the file is missing or damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        return with_diffusers_names(read_state_dict(path), str(path))
    tensors: Any = read_pt(path)
    if isinstance(tensors, dict):
        found = [part for part in GENERATORS if isinstance(tensors.get(part), dict)]
        tensors = tensors[found[0]] if found else tensors
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()
    ):
        raise ScdError(f"{path}: expected a state dict of tensors, or {' or '.join(GENERATORS)}")
    return with_diffusers_names(tensors, str(path))


def with_diffusers_names(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Give tensors diffusers' names, whichever of the known names they have.

    Raises:
        ScdError: two tensors get the same name.
    """
    plain = {name: name.replace(SHARDED, "").removeprefix("model.") for name in tensors}
    if len(set(plain.values())) < len(tensors):
        raise ScdError(f"{source}: holds tensors twice, with and without {SHARDED} or model.")
    renamed = {plain[name]: tensor for name, tensor in tensors.items()}
    return to_diffusers_names(renamed) if "head.head.weight" in renamed else renamed


def _renamed(
    tensors: dict[str, Tensor], outside: dict[str, str], inside: dict[str, str]
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?s)(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
        if match is None:  # an empty name
            renamed[name] = tensor
            continue
        block, own, kind = (part or "" for part in match.groups())
        renamed[block + (inside if block else outside).get(own, own) + kind] = tensor
    return renamed
