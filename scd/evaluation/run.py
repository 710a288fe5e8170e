"""From a checkpoint to a metrics table, sample videos and `metrics.json`."""

import time
from pathlib import Path

from scd.data.clips import clip_folder
from scd.environment import environment
from scd.evaluation.protocol import evaluate, table
from scd.files import write_json
from scd.models.load import load_checkpoint_for_use


def evaluate_checkpoint(path: Path, options_path: str | None, overrides: list[str]) -> None:
    """Evaluate as the options say; results go to `experiments/<name>/`."""
    loaded = load_checkpoint_for_use(path, options_path, overrides)
    options = loaded.options
    data = clip_folder(options, options.data.val_list, "video")
    started = time.perf_counter()
    samples = options.output / "samples"
    found = evaluate(loaded.model, loaded.codec, data, options, samples)
    report = {
        "checkpoint": loaded.source,
        **found.as_dict(),
        "environment": environment(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(options.output / "metrics.json", report)
    print(f"\n{table(found)}\n")
    print(f"metrics: {options.output / 'metrics.json'}")
    print(f"videos:  {samples}/*.mp4 (left generated, right real, given frames framed)")
    print(f"grid:    {samples / 'grid.png'}")
