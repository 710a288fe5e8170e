"""Reports of an evaluation: tables in the terminal and in files, sample videos, a grid."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from scd.evaluation.pictures import remove_other_videos, write_grid, write_side_by_side
from scd.evaluation.protocol import MODEL, REAL_SET
from scd.evaluation.samples import SampleFolder
from scd.evaluation.summary import Evaluation, markdown, sweep_tables, tables
from scd.options import Options
from scd.utils.environment import environment
from scd.utils.files import write_atomically, write_json
from scd.utils.table import Table
from scd.utils.tracking import trackers_of

Done = tuple[dict[str, str], Path, Evaluation]  # varied options, folder of samples, result


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write `metrics.json`, the numbers with all they depend on, and `metrics.md`, the tables."""
    write_json(folder / "metrics.json", {**evaluation.as_dict(), "environment": environment()})
    _write_text(folder / "metrics.md", markdown(tables(evaluation)))


def report_single(options: Options, done: Done) -> dict[str, Table]:
    """Write and print the tables of one evaluation."""
    _, folder, evaluation = done
    write_report(options.output, evaluation)
    samples, result = options.output / "samples", tables(evaluation)
    print(f"\n{markdown(result)}\n")
    print(f"metrics: {options.output / 'metrics.json'}, metrics.md")
    if options.eval.saved_videos:
        print(f"videos:  {samples}/*.mp4 (left generated, right real, context frames framed)")
        print(f"grid:    {samples / 'grid.png'}")
    print(f"lossless samples: {folder}")
    return result


def report_sweep(options: Options, done: list[Done]) -> dict[str, Table]:
    """Write and print the tables of several evaluations, a line for each."""
    result = sweep_tables([(varied, evaluation) for varied, _, evaluation in done], MODEL)
    text = markdown(result)
    _write_text(options.output / "sweep.md", text)
    entries = [
        {"options": varied, "samples": str(folder), **evaluation.as_dict()}
        for varied, folder, evaluation in done
    ]
    whole = {"sweep": entries, "environment": environment()}
    write_json(options.output / "sweep.json", whole)
    print(f"\n{text}\n\nsweep: {options.output / 'sweep.json'}, sweep.md; every table with its")
    print(f"       comparisons and samples: {options.output / 'evaluation'}/*/metrics.md")
    return result


def scalars(evaluation: Evaluation) -> dict[str, float]:
    """Collect the numbers of all rows by name, for trackers."""
    return {
        f"evaluation/{name}/{metric}": value
        for name, values in evaluation.rows.items()
        for metric, value in values.items()
        if isinstance(value, float)
    }


def write_samples(samples: SampleFolder, options: Options, folder: Path) -> None:
    """Write videos of the first trajectory beside the real ones, and `grid.png`.

    Those of an earlier evaluation are replaced or deleted.
    """
    numbers = range(min(options.eval.saved_videos, samples.videos))
    remove_other_videos(folder, numbers)
    if not numbers:
        (folder / "grid.png").unlink(missing_ok=True)
        return
    first = samples.rows[MODEL][0]
    generated, real = (
        torch.stack([samples.read_clip(set_, number) for number in numbers])
        for set_ in (first, REAL_SET)
    )
    known, fps = samples.context_frames, options.data.fps
    for number in numbers:
        path = folder / f"{number:05d}.mp4"
        write_side_by_side(path, generated[number], real[number], known, fps)
    write_grid(folder / "grid.png", generated, real, known)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))


def track_tables(
    options: Options, step: int, tables: dict[str, Table], scalars: dict[str, float]
) -> None:
    """Log tables and numbers by name to the trackers of `train.trackers` (main process only).

    Raises:
        ScdError: see `scd.utils.tracking.WandB.start`.
    """
    accelerator = Accelerator(
        log_with=trackers_of(options, "evaluation"),
        project_config=ProjectConfiguration(str(options.output), str(options.output / "trackers")),
        cpu=not torch.cuda.is_available(),
    )
    accelerator.init_trackers(options.name)
    accelerator.log(scalars, step=step)
    for tracker in accelerator.trackers:
        for name, table in tables.items():
            if tracker.name == "tensorboard":
                tracker.writer.add_text(name, table.markdown(), step)
            elif tracker.name == "wandb":
                tracker.log_table(name, columns=table.heads, data=table.lines, step=step)
    accelerator.end_training()
