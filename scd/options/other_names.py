"""Other names of options: former ones, those of other projects, and those of a slip of the pen."""

import difflib
from typing import Any

from scd.errors import ScdError
from scd.options.schema import known_keys

# Former names of options and values, which files and checkpoints may have; none changes section.
RENAMED = {
    "adversary": "discriminator",
    "optim.adversary_lr": "optim.discriminator_lr",
    "flow.history_noise": "flow.history_noise_max",
    "flow.own_history": "flow.self_forcing_prob",
    "rollout.window_first": "rollout.sink_frames",
    "rollout.spacing=reference": "rollout.spacing=diffusers",
    "train.mixed_precision=no": "train.mixed_precision=fp32",
}
# Former options, with the ways to write the value at which they did nothing: with that, files and
# checkpoints may have them.
REMOVED = {"autoencoder": {"latent_noise": ("0", "0.0")}}
# What other projects call an option that has another name here.
ELSEWHERE = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "num_inference_steps": "steps",
    "train_batch_size": "batch_size",
    "cfg_scale": "guidance_scale",
}


def with_present_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return nested options brought up to date with `RENAMED` and `REMOVED`.

    Raises:
        ScdError: an option stands there under both its names, or did something and is gone.
    """
    values = _renamed(values, RENAMED, source)
    for section, removed in REMOVED.items():
        given = values.get(section)
        given = given if isinstance(given, dict) else {}
        for name in removed.keys() & given:
            if str(given.pop(name)) not in removed[name]:
                raise ScdError(f"{source}: {section}.{name} is no longer an option: leave it out")
    return values


def with_former_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested options under the names of `RENAMED`, for hashes that must not change."""
    return _renamed(values, {new: old for old, new in RENAMED.items()}, "options")


def _renamed(values: dict[str, Any], names: dict[str, str], source: str) -> dict[str, Any]:
    values = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    for old, new in names.items():
        key, _, old_value = old.partition("=")
        new_key, _, new_value = new.partition("=")
        *sections, name = key.split(".")
        section: Any = values
        for part in sections:
            section = section.get(part)
            section = section if isinstance(section, dict) else {}
        if name not in section:
            continue
        if old_value:
            section[name] = new_value if section[name] == old_value else section[name]
            continue
        new_name = new_key.split(".")[-1]
        if new_name in section:
            raise ScdError(f"{source}: {key} and {new_key} are the same option: keep {new_key}")
        section[new_name] = section.pop(name)
    return values


def unknown_key(key: str) -> str:
    """Say that there is no such option, and which one may have been meant."""
    known = known_keys()
    if key in known:
        return f"unknown key {key!r}: write sections as nested keys, not with dots"
    section, _, name = key.rpartition(".")
    names = {option: option.rpartition(".")[2] for option in known}
    beside = {option: n for option, n in names.items() if option.rpartition(".")[0] == section}
    near = (
        _called(ELSEWHERE.get(name), names)
        or _called(_closest(name, beside, 0.8), beside)
        or _called(name, names)
        or _called(_closest(name, names, 0.7), names)
    )
    meant = " or ".join(map(repr, near))
    return f"unknown key {key!r}" + (f"; did you mean {meant}?" if near else "")


def _closest(name: str, names: dict[str, str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(name, names.values(), 1, cutoff)), None)


def _called(name: str | None, names: dict[str, str]) -> list[str]:
    return [option for option, n in names.items() if n == name]
