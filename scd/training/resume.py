"""Where a run goes on: what may have changed since its first half, and what may not."""

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from scd.errors import ScdError
from scd.options import Options, options_to_dict
from scd.training.checkpoint import latest_checkpoint, remove_leftovers
from scd.utils.files import sha256
from scd.utils.paths import why_missing
from scd.utils.processes import error_barrier

# Where things lie, how fast and how long, what is measured: the run stays the same experiment.
FREE = (
    *("name", "output_root", "init_from", "data.max_broken_clips"),
    *("data.root", "data.fps", "data.action_names", "data.val_list"),
    *("optim.", "rollout.", "eval.", "train."),
)


def newest_checkpoint(folder: Path, main: bool) -> Path | None:
    """The newest whole checkpoint, the same on every process: the main one alone looks.

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
    """What a checkpoint keeps of its run: every option, the clips of a step, the weights it began
    with.

    Raises:
        ScdError: those weights are not there.
    """
    train = options.train
    clips = processes * train.batch_size * train.gradient_accumulation
    start = None
    if options.init_from is not None:
        weights = Path(options.init_from)
        if not weights.is_file():
            raise ScdError(f"init_from={weights}: {why_missing(weights, 'weights file')}")
        start = sha256(weights)
    return {"options": options_to_dict(options), "clips_per_step": clips, "init_from": start}


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], checkpoint: str) -> None:
    """Compare two identities: data order, noise and objective must be those of the first half.

    Processes, batch size and accumulation may change as long as a step sees as many clips.

    Raises:
        ScdError: naming every difference.
    """
    before, after = flat_options(saved["options"]), flat_options(now["options"])
    changes = [
        f"{key} was {before[key]}, is {after[key]}"
        for key in after
        if key in before and before[key] != after[key] and not key.startswith(FREE)
    ]
    # A rate may change, the kind of optimiser may not: it says what the saved state is of.
    muon = [values.get("optim.muon_lr") for values in (before, after)]
    if (muon[0] is None) != (muon[1] is None):
        changes.append(f"optim.muon_lr was {muon[0]}, is {muon[1]}")
    # Averages of all steps can be given up, but not begun or changed half way.
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
            f"clips a step (processes x train.batch_size x train.gradient_accumulation) were "
            f"{was}, are {is_}"
        )
    if saved.get("init_from") != now["init_from"]:  # the file's hash; it may have been moved
        changes.append("the weights at init_from are others")
    if changes:
        raise ScdError(
            f"{checkpoint} belongs to another run: {'; '.join(changes)}. Set this back to go on, "
            f"or start anew under another name=..."
        )


def precision_before(saved: dict[str, Any]) -> str | None:
    """Read what a checkpoint's run computed in; None where its manifest does not say."""
    # Checkpoints from before `auto` computed in what the option named.
    named = flat_options(saved["options"]).get("train.mixed_precision")
    return saved.get("precision") or (named if named in ("bf16", "fp32") else None)


def flat_options(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat_options(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
