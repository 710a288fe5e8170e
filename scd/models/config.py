"""The configs of networks, as diffusers keeps them: what they may say, and what follows from it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from scd.errors import ScdError
from scd.options import FlowOptions, ModelOptions
from scd.options.rules import wrong_choice

SIZES = ("channels", "patch_size", "heads", "layers", "encoder_layers", "decoder_layers")


def own_config(model: Any) -> dict[str, Any]:
    """Take the arguments of a diffusers model from its config."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse the config of a network that cannot be; its names are those of the options.

    Raises:
        ScdError: an unknown choice, a size below 1, or a kind of condition without any.
    """
    kinds = {item.name: item.type for of in (ModelOptions, FlowOptions) for item in fields(of)}
    for name, value in config.items():
        if message := wrong_choice(name, kinds.get(name), value):
            raise ScdError(message)
        if name in SIZES and not (isinstance(value, int) and value > 0):
            raise ScdError(f"{name} is {value!r}, not a positive integer")
    condition, num_conditions = config["condition"], config["num_conditions"]
    if num_conditions < 0:
        raise ScdError(f"num_conditions is {num_conditions}, below 0")
    if (condition == "none") != (num_conditions == 0):
        raise ScdError(f"condition {condition!r} contradicts num_conditions {num_conditions}")


def count_patches(height: int, width: int, rows: int, columns: int) -> int:
    """Count the tokens of a frame of latents, whose patches have so many rows and columns.

    Raises:
        ScdError: it does not divide into them.
    """
    if not height or not width or height % rows or width % columns:
        raise ScdError(
            f"frames of {height}x{width}, which patches of {rows}x{columns} do not divide"
        )
    return (height // rows) * (width // columns)
