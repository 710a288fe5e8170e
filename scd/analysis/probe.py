"""`scd probe`: run every probe on a checkpoint, and write the report."""

import json
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from scd.analysis.ablations import (
    count_masking,
    count_skipping,
    probe_attention_mask,
    probe_layer_removal,
    probe_layer_skipping,
)
from scd.analysis.attention_mass import probe_attention
from scd.analysis.context_ablation import count_context, probe_context
from scd.analysis.gradient_report import count_gradients, probe_gradients
from scd.analysis.html_report import Report, Section
from scd.analysis.interventions import named_blocks
from scd.analysis.measurements import clip_numbers, read_probe_clips
from scd.analysis.probed_model import ProbedModel, open_training_clips
from scd.analysis.similarity import probe_similarity
from scd.analysis.suggest_split import count_suggestion, suggest_split
from scd.errors import ScdError
from scd.evaluation.compare import layers_text
from scd.models import SCD, CausalDiT, CausalWorldModel
from scd.models.load import load_checkpoint_for_use
from scd.options import options_to_dict
from scd.utils.environment import environment

NEW_FRAMES = 4  # generated per clip in every measurement
SECTIONS = 7
IDENTITY = ("clips", "steps", "new_frames", "fine_tune", "options")


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
        clips: see `clip_numbers`; with 64 or more, FVD is measured too.
        steps: denoising steps per frame, in all probes.
        fine_tune: training steps of every fine-tuned model; 0: none, without training data.

    Raises:
        ScdError: a number is out of range, or the model or the data cannot be loaded.
    """
    numbers = clip_numbers(clips)
    for name, value, least in (("steps", steps, 3), ("fine-tune", fine_tune, 0)):
        if value < least:
            raise ScdError(f"--{name} {value}: must be {least} or more")
    loaded = load_checkpoint_for_use(path, options_path, overrides)
    options, step = loaded.options, loaded.source["step"]
    if not isinstance(loaded.model, CausalWorldModel):
        raise ScdError(f"{path}: a {options.model.type} has no rollout to probe")
    if loaded.model.takes_first_look:
        raise ScdError(
            f"{path}: model.encoder_frame={options.model.encoder_frame} cannot be probed: the "
            f"probes know encoders that see clean frames only (shift)"
        )
    if isinstance(loaded.model, CausalDiT) and len(loaded.model.blocks) < 2:
        raise ScdError(f"{path}: a dense model with one layer cannot be split")
    read = read_probe_clips(loaded, numbers, NEW_FRAMES)
    training = open_training_clips(loaded) if fine_tune else None
    stem = f"step-{step:08d}" if step is not None else path.resolve().name.removesuffix(".pth")
    about = {
        "summary": f"{layers_text(options)}, {path}, step {step}; {len(read)} validation clips, "
        f"{read.known} context frames, {NEW_FRAMES} new frames in {steps} steps, no guidance.",
        "checkpoint": loaded.source,
        "clips": list(read.numbers),
        "steps": steps,
        "new_frames": NEW_FRAMES,
        "fine_tune": fine_tune,
        "options": options_to_dict(options),
        "environment": environment(),
    }
    # Other clips, steps or weights of the same step have a report of their own.
    inputs = [loaded.source["sha256"], *(about[key] for key in IDENTITY)]
    identity = json.dumps(inputs, sort_keys=True)
    folder = options.output / "probe" / f"{stem}-{sha256(identity.encode()).hexdigest()[:8]}"
    arguments = [*(["--opt", options_path] if options_path else []), *overrides]
    with tqdm(desc="probe", dynamic_ncols=True) as progress:
        probed = ProbedModel(loaded, read, steps, progress, training, fine_tune)
        about["missing_metrics"] = probed.missing_metrics
        report = Report(folder, f"Probes of {options.name}", about, SECTIONS)
        _run_probes(probed, report, arguments)
    for section in report.sections:
        print(f"\n{section.title}\n  {section.finding}")
    print(f"\nreport: {folder / 'index.html'}, probe.json")
    return folder


def _run_probes(probed: ProbedModel, report: Report, arguments: list[str]) -> None:
    """Run all probes in order, and write each to the report as soon as it is done.

    Args:
        arguments: see `suggest_split`.
    """
    sections: dict[str, Section] = {}

    def run(probe: Callable[[], Section]) -> None:
        began = time.perf_counter()
        section = probe()
        sections[section.key] = section
        report.add(section, time.perf_counter() - began)

    def suggest() -> Section:
        maskable = sections["frame_diagonal"].numbers["blind_layers"]
        return suggest_split(probed, steady, maskable, arguments)

    is_scd = isinstance(probed.model, SCD)
    run(lambda: probe_similarity(probed))
    steady = sections["redundancy"].numbers["steady_layers"]
    last = count_context(probed.clips.known) if is_scd else count_suggestion(probed, steady)
    removed = len(named_blocks(probed.model))
    gradients = count_gradients(len(probed.clips))
    counts = [1, count_skipping(probed), count_masking(probed), removed, gradients, last]
    probed.progress.reset(total=sum(counts))  # what comes before is short
    run(lambda: probe_attention(probed))
    run(lambda: probe_layer_skipping(probed))
    run(lambda: probe_attention_mask(probed))
    run(lambda: probe_layer_removal(probed))
    run(lambda: probe_gradients(probed))
    run((lambda: probe_context(probed)) if is_scd else suggest)
