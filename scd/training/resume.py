"""Resume a run from its newest checkpoint, if it is still the same run."""

import hashlib
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from scd.data.clips import Clips
from scd.errors import ScdError
from scd.models.autoencoder import encoder_hash
from scd.models.weights import load_matching, weight_files
from scd.options import Options, options_to_dict
from scd.training.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    set_newer_checkpoints_aside,
    start_is_lost,
)
from scd.training.tasks import Task
from scd.utils.files import sha256
from scd.utils.processes import error_barrier

# Options with weights that a run depends on: the files may be moved, but not changed.
WEIGHTS = ("init_from", "distill.teacher", "distill.weak_teacher", "autoencoder.world_model")
LOST = "lost"  # the hash of weights that are gone
# Options that may change: paths, speed, length, what is measured.
FREE = (
    *("name", "output_root", *WEIGHTS, "data.max_broken_clips"),
    *("data.root", "data.fps", "data.action_names", "data.val_list"),
    *("optim.", "rollout.", "eval.", "train.", "distill.critic_lr"),
)
# What is trained on may not: own rollouts, and targets of an average of the weights.
TRAINED_ON = {
    "dmd": (
        *("rollout.steps", "rollout.spacing", "rollout.shift", "rollout.temperature"),
        *("rollout.first_frame_steps", "rollout.window", "rollout.sink_frames"),
        "rollout.precision",
    ),
    "consistency": ("optim.ema_decay",),
}


def resume(
    options: Options, task: Task, identity: dict[str, Any], main: bool
) -> TrainingState | None:
    """Load the newest checkpoint, and its weights into the task's networks; collective.

    Args:
        identity: of the run as it is started now, see `run_identity`.
        main: whether this is the main process.

    Returns:
        The state of the run; None if there is no checkpoint yet.

    Raises:
        ScdError: no checkpoint is whole, or the newest belongs to another run.
    """
    path = newest_checkpoint(options.output / "checkpoints", main)
    if path is None:
        return None
    state = load_checkpoint(path)
    if identity["init_from"] == LOST:
        identity["init_from"] = state.run.get("init_from")
        if main:
            print(f"note: init_from={options.init_from} is gone: the run goes on without it")
    refuse_other_run(state.run, identity, str(path))
    load_matching(task.network, state.ema, str(path))  # only to see that it fits
    load_matching(task.network, state.model, str(path))
    if task.critic is not None:
        assert state.critic is not None  # the run is the same, so it had one
        load_matching(task.critic, state.critic["model"], f"{path} (critic)")
    if main:
        set_newer_checkpoints_aside(path)
        print(f"resuming {options.name} from step {state.step} ({path})")
        if state.step > options.train.steps:
            print(f"it has more steps than train.steps={options.train.steps}: nothing is trained")
        before, now = saved_precision(state.run), identity["precision"]
        if before not in (None, now):
            print(f"it was trained in {before} so far, and is in {now} from here on")
    return state


def newest_checkpoint(folder: Path, main: bool) -> Path | None:
    """Find the newest whole checkpoint on the main process, and share its path; collective.

    Raises:
        ScdError: see `latest_checkpoint`.
    """
    path = None
    with error_barrier():
        if main:
            remove_leftovers(folder)
            path = latest_checkpoint(folder)
    return broadcast_object_list([path])[0]


def run_identity(options: Options, processes: int) -> dict[str, Any]:
    """Describe a run for its checkpoints: every option, clips per step, hashes of weights.

    Those are of all `WEIGHTS`, and of the encoder that makes the latents.
    """
    values = options_to_dict(options)
    paths = flatten_options(values)
    path = options.autoencoder.path
    if start_is_lost(options):
        paths["init_from"] = LOST
    return {
        "options": values,
        "clips_per_step": clips_per_step(options, processes),
        "encoder": None if path is None or options.model.is_wan else encoder_hash(path),
        **{key: _hash_weights(paths[key]) for key in WEIGHTS},
    }


def _hash_weights(path: str | None) -> str | None:
    if path in (None, LOST):
        return path
    return "-".join(map(sha256, weight_files(Path(path))))


def describe_clips(clips: Clips) -> str:
    """Say how many clips a list has, with a hash of their names in order."""
    names = "\n".join(str(clips.name(number)) for number in range(len(clips)))
    return f"{len(clips)} clips ({hashlib.sha256(names.encode()).hexdigest()[:16]})"


def clips_per_step(options: Options, processes: int) -> int:
    """Count the clips of an optimizer step, over all processes."""
    return processes * options.train.batch_size * options.train.gradient_accumulation


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], checkpoint: str) -> None:
    """Refuse to resume a run with another data order, noise or objective.

    Processes, batch size and accumulation may change as long as a step sees as many clips.

    Args:
        saved, now: identities, see `run_identity`.

    Raises:
        ScdError: naming every difference.
    """
    defaults = flatten_options(options_to_dict(Options()))
    # An option that is newer than the run did in it what its default does.
    written, after = (flatten_options(run["options"]) for run in (saved, now))
    before = defaults | written
    changes = [
        f"{key} was {before[key]}, is {after[key]}"
        for key in after
        if before[key] != after[key] and not _may_change(key, after)
    ]
    if written.get("flow.self_forcing_prob") and "flow.self_forcing_sigma" not in written:
        changes.append("the histories of flow.self_forcing_prob were made in another way")
    # The rate may change, but not which optimizer the saved state belongs to.
    muon = [values.get("optim.muon_lr") for values in (before, after)]
    if (muon[0] is None) != (muon[1] is None):
        changes.append(f"optim.muon_lr was {muon[0]}, is {muon[1]}")
    # Averages over all steps can be given up, but not begun or changed half way.
    tracked = [
        values["optim.ema_sigma_rel"] if values.get("train.snapshot_every") else None
        for values in (before, after)
    ]
    if tracked[1] is not None and tracked[0] != tracked[1]:
        changes.append(
            f"the averages for snapshots (optim.ema_sigma_rel, with train.snapshot_every) were "
            f"{tracked[0] or 'not tracked'}, are {tracked[1]}"
        )
    was, is_ = saved["clips_per_step"], now["clips_per_step"]
    if was != is_:
        changes.append(
            f"clips per step (processes x train.batch_size x train.gradient_accumulation) were "
            f"{was}, are {is_}"
        )
    if "clips" in saved and saved["clips"] != now["clips"]:  # older runs do not say
        changes.append(f"the clips of data.train_list were {saved['clips']}, are {now['clips']}")
    if saved.get("encoder", now["encoder"]) != now["encoder"]:  # older runs do not say
        changes.append("the encoder at autoencoder.path is another")
    for key in WEIGHTS:
        # A run from before the option was made had none; of one from before it was hashed, it is
        # not known which.
        unknown = key in written and key not in saved
        if not unknown and saved.get(key) != now[key]:
            changes.append(f"the weights at {key} are others")
    if changes:
        raise ScdError(
            f"{checkpoint} belongs to another run: {'; '.join(changes)}. Set this back to resume "
            f"it, or start a new run under another name=..."
        )


def _may_change(key: str, options: dict[str, Any]) -> bool:
    if key in TRAINED_ON.get(options["distill.method"], ()):
        return False
    return key.startswith(FREE)


def saved_precision(saved: dict[str, Any]) -> str | None:
    """Read from a run's identity what it computed in; None where it does not say."""
    # Runs from before `auto` computed in what the option named.
    named = flatten_options(saved["options"]).get("train.mixed_precision")
    return saved.get("precision") or (named if named in ("bf16", "fp32") else None)


def flatten_options(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flatten_options(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
