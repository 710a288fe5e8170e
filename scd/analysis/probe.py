"""From a checkpoint to a probe report: `scd probe`."""

import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from scd.analysis.ablations import (
    blind_count,
    blind_layers,
    leave_out,
    skip_count,
    skip_layers,
)
from scd.analysis.context_probe import change_context, change_count
from scd.analysis.fine_tune import open_training_clips
from scd.analysis.html_report import Report, Section
from scd.analysis.interventions import all_blocks
from scd.analysis.observations import look_at_attention, look_at_features
from scd.analysis.probe_clips import clip_numbers, read_probe_clips
from scd.analysis.probed_model import ProbedModel
from scd.analysis.suggest import suggest_split, suggestion_count
from scd.errors import ScdError
from scd.evaluation.compare import layers_text
from scd.models import SCD, CausalDiT
from scd.models.load import load_checkpoint_for_use
from scd.options import options_to_dict
from scd.utils.environment import environment

NEW_FRAMES = 4  # made by every variant of the model
SECTIONS = 6


def probe_checkpoint(
    path: Path,
    options_path: str | None,
    overrides: list[str],
    clips: str,
    steps: int,
    fine_tune: int,
) -> Path:
    """Probe a model on validation clips; returns the folder of the report.

    Args:
        clips: see `clip_numbers`; from 64 on with FVD.
        steps: denoising steps a frame, in all probes.
        fine_tune: training steps of every fine-tuned variant; 0: none, and no training data needed.

    Raises:
        ScdError: numbers that cannot work, and whatever loading the model or the data raises.
    """
    numbers = clip_numbers(clips)
    for name, value, least in (("steps", steps, 3), ("fine-tune", fine_tune, 0)):
        if value < least:
            raise ScdError(f"--{name} {value}: must be {least} or more")
    loaded = load_checkpoint_for_use(path, options_path, overrides)
    options, step = loaded.options, loaded.source["step"]
    if isinstance(loaded.model, CausalDiT) and len(loaded.model.blocks) < 2:
        raise ScdError(f"{path}: a dense model of one layer has nothing to separate")
    read = read_probe_clips(loaded, numbers, NEW_FRAMES)
    training = open_training_clips(loaded) if fine_tune else None
    stem = f"step-{step:08d}" if step is not None else path.resolve().name.removesuffix(".pth")
    folder = options.output / "probe" / stem
    about = {
        "summary": f"{layers_text(options)}, {path}, step {step}; {len(read)} validation clips, "
        f"{read.known} given frames, {NEW_FRAMES} new ones in {steps} steps without guidance.",
        "checkpoint": loaded.source,
        "clips": list(read.numbers),
        "steps": steps,
        "new_frames": NEW_FRAMES,
        "fine_tune": fine_tune,
        "options": options_to_dict(options),
        "environment": environment(),
    }
    arguments = [*(["--opt", options_path] if options_path else []), *overrides]
    with tqdm(desc="probe", dynamic_ncols=True) as bar:
        bench = ProbedModel(loaded, read, steps, bar, training, fine_tune)
        about["missing_metrics"] = bench.missing
        report = Report(folder, f"Probes of {options.name}", about, SECTIONS)
        _probe(bench, report, arguments)
    for section in report.sections:
        print(f"\n{section.title}\n  {section.finding}")
    print(f"\nreport: {folder / 'index.html'}, probe.json")
    return folder


def _probe(bench: ProbedModel, report: Report, arguments: list[str]) -> None:
    """All probes in order, with a bar over all that is measured; each is written when it is done.

    Args:
        arguments: see `suggest_split`.
    """
    found: dict[str, Section] = {}

    def run(probe: Callable[[], Section]) -> None:
        began = time.perf_counter()
        section = probe()
        found[section.key] = section
        report.add(section, time.perf_counter() - began)

    def suggest() -> Section:
        blind = found["frame_diagonal"].numbers["blind_layers"]
        return suggest_split(bench, steady, blind, arguments)

    separate = isinstance(bench.model, SCD)
    run(lambda: look_at_features(bench))
    steady = found["redundancy"].numbers["steady_layers"]
    last = change_count(bench.clips.known) if separate else suggestion_count(bench, steady)
    counts = [1, skip_count(bench), blind_count(bench), len(all_blocks(bench.model)), last]
    bench.bar.reset(total=sum(counts))  # what comes before is short
    run(lambda: look_at_attention(bench))
    run(lambda: skip_layers(bench))
    run(lambda: blind_layers(bench))
    run(lambda: leave_out(bench))
    run((lambda: change_context(bench)) if separate else suggest)
