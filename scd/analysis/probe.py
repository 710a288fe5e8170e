"""From a checkpoint to a probe report: `scd probe`."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from scd.analysis.bench import Bench
from scd.analysis.clips import read_probe_clips
from scd.analysis.cuts import (
    blind_count,
    blind_layers,
    leave_out,
    skip_count,
    skip_layers,
)
from scd.analysis.hooks import all_blocks
from scd.analysis.looks import look_at_attention, look_at_features
from scd.analysis.report import Section, write_report
from scd.analysis.sufficiency import change_context, change_count
from scd.analysis.suggest import suggest_split, suggestion_count
from scd.environment import environment
from scd.errors import ScdError
from scd.evaluation.compare import layers_text
from scd.models import SCD, CausalDiT
from scd.models.load import load_checkpoint_for_use
from scd.options import options_to_dict

NEW_FRAMES = 4  # made by every variant of the model


def probe_checkpoint(
    path: Path,
    options_path: str | None,
    overrides: list[str],
    clips: int,
    steps: int,
    fine_tune: int,
) -> Path:
    """Probe a model on validation clips; returns the folder of the report.

    Args:
        clips: how many clips; from 64 on with FVD.
        steps: denoising steps a frame, in all probes.
        fine_tune: training steps of every fine-tuned variant; 0: none, and no training data needed.

    Raises:
        ScdError: numbers that cannot work, and whatever loading the model or the data raises.
    """
    for name, value, least in (
        ("clips", clips, 2),
        ("steps", steps, 3),
        ("fine-tune", fine_tune, 0),
    ):
        if value < least:
            raise ScdError(f"--{name} {value}: must be {least} or more")
    loaded = load_checkpoint_for_use(path, options_path, overrides)
    options, step = loaded.options, loaded.source["step"]
    if isinstance(loaded.model, CausalDiT) and len(loaded.model.blocks) < 2:
        raise ScdError(f"{path}: a dense model of one layer has nothing to separate")
    read = read_probe_clips(loaded, clips, NEW_FRAMES)
    with tqdm(desc="probe", dynamic_ncols=True) as bar:
        bench = Bench(loaded, read, steps, fine_tune, bar)
        sections = _sections(bench)
    stem = path.stem if step is None else f"step-{step:08d}"
    folder = options.output / "probe" / stem
    about = {
        "summary": f"{layers_text(options)}, {path}, step {step}; {clips} validation clips, "
        f"{read.known} given frames, {NEW_FRAMES} new ones in {steps} steps without guidance.",
        "checkpoint": loaded.source,
        "clips": clips,
        "steps": steps,
        "new_frames": NEW_FRAMES,
        "fine_tune": fine_tune,
        "options": options_to_dict(options),
        "environment": environment(),
    }
    write_report(folder, f"Probes of {options.name}", about, sections)
    for section in sections:
        print(f"\n{section.title}\n  {section.finding}")
    print(f"\nreport: {folder / 'index.html'}, probe.json")
    return folder


def _sections(bench: Bench) -> list[Section]:
    """All probes in order, with a bar over all that is measured."""
    separate = isinstance(bench.model, SCD)
    found: dict[str, Section] = {}

    def suggest() -> Section:
        redundancy, blind = found["redundancy"], found["frame_diagonal"]
        to_end = redundancy.numbers["similarity"][:, :-2, -2]
        return suggest_split(bench, to_end, blind.numbers["blind_layers"])

    last: tuple[Callable[[], Section], int] = (suggest, suggestion_count(bench))
    if separate:
        last = (lambda: change_context(bench), change_count())
    plan: list[tuple[Callable[[], Section], int]] = [
        (lambda: look_at_features(bench), 1),
        (lambda: look_at_attention(bench), 1),
        (lambda: skip_layers(bench), skip_count(bench)),
        (lambda: blind_layers(bench), blind_count(bench)),
        (lambda: leave_out(bench), len(all_blocks(bench.model))),
        last,
    ]
    bench.bar.reset(total=sum(count for _, count in plan))  # what comes before is short
    for run, _ in plan:
        section = run()
        found[section.key] = section
    return list(found.values())
