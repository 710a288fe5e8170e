"""A folder that holds a model ready to play, and how its frames are made."""

from dataclasses import dataclass
from pathlib import Path

from scd.errors import ScdError
from scd.models.autoencoder import Codec
from scd.models.load import load_folder
from scd.models.world_model import WorldModel
from scd.options import OPTIONS_FILE, Options, load_options
from scd.paths import why_missing

MAX_ACTIONS = 256  # one byte on the wire


@dataclass(frozen=True)
class Pretrained:
    """A world model under actions, its autoencoder, and the options they were trained with."""

    folder: Path
    model: WorldModel
    codec: Codec
    options: Options

    @property
    def about(self) -> dict[str, str | int]:
        """What the page tells about it."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"kind": type(self.model).__name__, "parameters": parameters}

    @property
    def guidance(self) -> str:
        """The kind of guidance that a scale above 1 turns on."""
        if self.options.rollout.guidance != "none":
            return self.options.rollout.guidance
        return "context" if self.model.has_context else "condition"


def load_pretrained(folder: Path, overrides: list[str] | None = None) -> Pretrained:
    """Load what `SCDPipeline.save_pretrained` wrote, with the experiment's `options.yml` beside it.

    Args:
        overrides: `key=value`, on top of the options.

    Raises:
        ScdError: the folder or a part of it is missing or damaged, or its model cannot be played.
    """
    if not folder.is_dir():
        raise ScdError(
            f"{folder}: {why_missing(folder, 'folder')}; --model names one with a pretrained model "
            f"(transformer/, vae/, options.yml)"
        )
    options = load_options(folder / OPTIONS_FILE, overrides)
    _check_playable(options, folder)
    loaded = load_folder(folder, options).for_rollouts()
    loaded.model.requires_grad_(False)
    return Pretrained(folder, loaded.model, loaded.codec, loaded.options)


def _check_playable(options: Options, folder: Path) -> None:
    where, names, rollout = folder / OPTIONS_FILE, options.data.action_names, options.rollout
    if options.task != "world_model" or not options.model.has_actions:
        raise ScdError(f"{where}: only a world model under actions can be played")
    if len(names) != options.model.num_conditions:
        raise ScdError(
            f"{where}: {len(names)} data.action_names for {options.model.num_conditions} actions: "
            f"a player needs a name of each"
        )
    if len(names) > MAX_ACTIONS:
        raise ScdError(f"{where}: {len(names)} actions, but the page knows {MAX_ACTIONS} at most")
    if rollout.window < 1 or rollout.window_first:
        raise ScdError(
            f"{where}: to play for ever, rollout.window must be at least 1 and "
            f"rollout.window_first 0, not {rollout.window} and {rollout.window_first}"
        )
