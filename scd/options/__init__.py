"""Typed options: one YAML file is one experiment, `key=value` overrides change single values."""

from scd.options.reader import (
    OPTIONS_FILE,
    load_options,
    options_from_json,
    options_to_dict,
    options_to_yaml,
    with_present_names,
)
from scd.options.rules import check_rollout
from scd.options.schema import (
    MAX_SIGMA_REL,
    AutoencoderOptions,
    BlockType,
    DataOptions,
    DiscriminatorOptions,
    EvalOptions,
    FlowOptions,
    FvdPrecision,
    Guidance,
    ModelOptions,
    OptimOptions,
    Options,
    RolloutOptions,
    TrainOptions,
    known_keys,
)

__all__ = [
    "MAX_SIGMA_REL",
    "OPTIONS_FILE",
    "AutoencoderOptions",
    "BlockType",
    "DataOptions",
    "DiscriminatorOptions",
    "EvalOptions",
    "FlowOptions",
    "FvdPrecision",
    "Guidance",
    "ModelOptions",
    "OptimOptions",
    "Options",
    "RolloutOptions",
    "TrainOptions",
    "check_rollout",
    "known_keys",
    "load_options",
    "options_from_json",
    "options_to_dict",
    "options_to_yaml",
    "with_present_names",
]
