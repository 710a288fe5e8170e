"""Evaluate checkpoints: from weights to tables, sample videos and `metrics.json`."""

import shutil
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from scd.data.clips import ClipFolder, clip_folder
from scd.errors import ScdError
from scd.evaluation.generate import generate_samples
from scd.evaluation.measure import measure_samples
from scd.evaluation.metrics import AvailableMetrics
from scd.evaluation.protocol import MODEL, note_repeats, table_rows
from scd.evaluation.report import (
    Done,
    report_single,
    report_sweep,
    scalars,
    track_tables,
    write_report,
    write_samples,
)
from scd.evaluation.samples import EVALUATIONS, SampleFolder, identity, identity_name
from scd.evaluation.summary import Evaluation, markdown, summarize, tables
from scd.models.autoencoder import Codec
from scd.models.load import LoadedModel, load_checkpoint_for_use, options_for_use
from scd.models.world_model import WorldModel
from scd.options import Options
from scd.utils.processes import error_barrier, processes


def evaluate_checkpoint(
    path: Path,
    options_path: str | None = None,
    overrides: list[str] | None = None,
    sweeps: list[str] | None = None,
    track: bool = False,
) -> None:
    """Evaluate a checkpoint as its options say; finished work of earlier calls is kept.

    Everything lies below `experiments/<name>/`: the samples with their metrics in
    `evaluation/<step>-<hash of all they depend on>/`, and of the last call `metrics.json`,
    `metrics.md` and `samples/`, or `sweep.json` and `sweep.md`.

    Args:
        overrides: `key=value`.
        sweeps: `key=value,value`: evaluate every combination, and make one table of all.
        track: also log the tables to the trackers of `train.trackers`.
    """
    state = processes()  # before anything is put on a device
    overrides = overrides or []
    combinations = sweep_combinations(sweeps or [])
    settings = [[*overrides, *(f"{k}={v}" for k, v in varied.items())] for varied in combinations]
    for setting in settings:  # report mistakes now, not after the first evaluations
        options = options_for_use(path, options_path, setting)
        if track and not options.train.trackers:
            raise ScdError("--track: train.trackers is empty; add train.trackers=[tensorboard]")
    done: list[Done] = []
    for varied, setting in zip(combinations, settings, strict=True):
        loaded = load_checkpoint_for_use(path, options_path, setting).for_rollouts()
        options = loaded.options
        data = clip_folder(options, options.data.val_list, "video")
        folder = evaluation_folder(options, loaded.source, data)
        note_repeats(data, options.eval.videos, "other" in options.eval.comparisons)
        evaluation = evaluate(loaded.model, loaded.codec, data, options, folder, loaded.source)
        if evaluation is None:
            continue
        write_report(folder, evaluation)
        pictures = (folder if sweeps else options.output) / "samples"
        write_samples(SampleFolder(folder), options, pictures)
        done.append((varied, folder, evaluation))
    if not state.is_main_process:
        return
    result = report_sweep(options, done) if sweeps else report_single(options, done[0])
    if track:
        step = int(done[0][2].checkpoint["step"] or 0)
        track_tables(options, step, result, {} if sweeps else scalars(done[0][2]))


def measure_folder(path: Path) -> None:
    """Measure a folder of saved samples again, without model and data, and print the tables."""
    evaluation = measure(SampleFolder(path), again=True)
    if evaluation is not None:
        write_report(path, evaluation)
        print(f"\n{markdown(tables(evaluation))}\n\nmetrics: {path / 'metrics.json'}")


def evaluate_in_passing(
    model: WorldModel, codec: Codec, data: ClipFolder, options: Options, pictures: Path
) -> dict[str, float]:
    """Evaluate weights in training, without comparisons; of the samples only pictures stay.

    Returns:
        Metric -> value of the model, on the main process; empty on the others.
    """
    scratch = pictures / ".samples"
    main = processes().is_main_process
    with error_barrier():
        if main:
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
    unsaved: dict[str, str | int | None] = {"path": None, "sha256": None, "step": None}
    alone = replace(options, eval=replace(options.eval, comparisons=[]))
    loaded = LoadedModel(model, codec, alone, unsaved).for_rollouts()
    evaluation = evaluate(loaded.model, loaded.codec, data, loaded.options, scratch, unsaved)
    if evaluation is None:
        return {}
    write_samples(SampleFolder(scratch), options, pictures)
    shutil.rmtree(scratch, ignore_errors=True)
    return {name: v for name, v in evaluation.rows[MODEL].items() if isinstance(v, float)}


def evaluate(
    model: WorldModel,
    codec: Codec,
    data: ClipFolder,
    options: Options,
    folder: Path,
    checkpoint: dict[str, Any],
) -> Evaluation | None:
    """Run the protocol of `options.eval`; samples and measurements stay in `folder`.

    Args:
        data: real clips, as pixels.
        checkpoint: path, sha256 and step of the model's weights.

    Returns:
        The result, on the main process; None on the others.
    """
    with error_barrier():
        if processes().is_main_process:
            own = identity(checkpoint["sha256"], options, data)
            rows = table_rows(options)
            SampleFolder.describe(folder, own, rows, _protocol(options, own), checkpoint)
    samples = SampleFolder(folder)
    generate_samples(model, codec, data, options, samples)
    return measure(samples)


def measure(samples: SampleFolder, again: bool = False) -> Evaluation | None:
    """Measure saved samples; None on all processes but the main one."""
    available = AvailableMetrics(samples.setting)
    measure_samples(samples, available, again)
    return summarize(samples, available) if processes().is_main_process else None


def evaluation_folder(options: Options, checkpoint: dict[str, Any], data: ClipFolder) -> Path:
    """Name the folder for the samples of just this checkpoint, protocol, rollout and data."""
    step, hash_ = checkpoint["step"], identity_name(identity(checkpoint["sha256"], options, data))
    stem = Path(checkpoint["path"]).stem if step is None else f"step-{step:08d}"
    return options.output / EVALUATIONS / f"{stem}-{hash_}"


def _protocol(options: Options, identity: dict[str, Any]) -> dict[str, Any]:
    """Collect what a reader of the numbers has to know."""
    o = options.eval
    return {
        "videos": o.videos,
        **{key: getattr(o, key) for key in ("context_frames", "new_frames", "trajectories")},
        "seeds": list(o.seeds),
        "fvd_precision": o.fvd_precision,
        "windows": o.windows,
        "data": str(Path(options.data.root) / options.data.val_list),
        "data_hash": identity["data"],
        "autoencoder_hash": identity["autoencoder"],
        **{f"rollout_{key}": value for key, value in asdict(options.rollout).items()},
    }


def sweep_combinations(sweeps: list[str]) -> list[dict[str, str]]:
    """Combine the values of `key=value,value` texts in every way; without texts: one, empty.

    Raises:
        ScdError: a text has another form, or a key stands twice.
    """
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, values = text.partition("=")
        try:
            parsed = yaml.load(f"[{values}]", yaml.BaseLoader) if equals and key else []
        except yaml.YAMLError:
            parsed = []
        if not parsed or key in axes:
            raise ScdError(f"--sweep {text!r}: expected key=value,value,... with each key once")
        axes[key] = [_as_override(value) for value in parsed]
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _as_override(value: Any) -> str:
    return f"[{', '.join(map(_as_override, value))}]" if isinstance(value, list) else str(value)
