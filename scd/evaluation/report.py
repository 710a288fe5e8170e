"""What an evaluation leaves for people: tables in the terminal and in files, pictures, videos."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from scd.evaluation.pictures import write_grid, write_side_by_side
from scd.evaluation.protocol import MODEL, REAL_SET
from scd.evaluation.samples import SampleFolder
from scd.evaluation.table import Evaluation, sweep_table, table
from scd.options import Options
from scd.utils.environment import environment
from scd.utils.files import write_atomically, write_json
from scd.utils.table import Table
from scd.utils.tracking import trackers_of

Done = tuple[dict[str, str], Path, Evaluation]  # varied options, folder of samples, result


def write_report(folder: Path, found: Evaluation) -> None:
    """`metrics.json`, each number with all it was made with, and `metrics.md`."""
    write_json(folder / "metrics.json", {**found.as_dict(), "environment": environment()})
    _write_text(folder / "metrics.md", table(found).markdown())


def report_single(options: Options, done: Done) -> Table:
    """Write and print the table of one evaluation."""
    _, folder, found = done
    write_report(options.output, found)
    samples, result = options.output / "samples", table(found)
    print(f"\n{result.markdown()}\n")
    print(f"metrics: {options.output / 'metrics.json'}, metrics.md")
    print(f"videos:  {samples}/*.mp4 (left generated, right real, given frames framed)")
    print(f"grid:    {samples / 'grid.png'}")
    print(f"lossless samples: {folder}")
    return result


def report_sweep(options: Options, done: list[Done]) -> Table:
    """Write and print one table of several evaluations, a line for each."""
    result = sweep_table([(varied, found) for varied, _, found in done], MODEL)
    text = result.markdown()
    _write_text(options.output / "sweep.md", text)
    entries = [
        {"options": varied, "samples": str(folder), **found.as_dict()}
        for varied, folder, found in done
    ]
    whole = {"sweep": entries, "environment": environment()}
    write_json(options.output / "sweep.json", whole)
    print(f"\n{text}\n\nsweep: {options.output / 'sweep.json'}, sweep.md; every table with its")
    print(f"       comparisons and samples: {options.output / 'evaluation'}/*/metrics.md")
    return result


def scalars(found: Evaluation) -> dict[str, float]:
    """The numbers of all rows by name, for trackers."""
    return {
        f"evaluation/{name}/{metric}": value
        for name, values in found.rows.items()
        for metric, value in values.items()
        if isinstance(value, float)
    }


def write_samples(samples: SampleFolder, options: Options, folder: Path) -> None:
    """Videos of the first trajectory beside the real ones, and `grid.png`."""
    numbers = range(min(options.eval.saved_videos, samples.videos))
    if not numbers:
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


def track_table(options: Options, step: int, table: Table, scalars: dict[str, float]) -> None:
    """Log a table, and numbers by name, to the trackers of `train.trackers` (main process only).

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
        if tracker.name == "tensorboard":
            tracker.writer.add_text("evaluation", table.markdown(), step)
        elif tracker.name == "wandb":
            tracker.log_table("evaluation", columns=table.heads, data=table.lines, step=step)
    accelerator.end_training()
