"""Compare evaluated models in one table: size, time per frame, quality.

Times are measured side by side in one run, a frame of each model in turn, so that a busy machine
slows all of them alike; the median counts.
"""

import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scd.data.clips import clip_folder
from scd.errors import ScdError
from scd.evaluation.evaluate import evaluation_folder
from scd.evaluation.protocol import MODEL
from scd.evaluation.samples import FRAMING
from scd.evaluation.summary import columns, missing_notes, rollout_text
from scd.models.load import LoadedModel, load_checkpoint_for_use
from scd.models.world_model import CausalWorldModel
from scd.options import Options
from scd.rollout import Rollout, continue_videos
from scd.utils.environment import environment
from scd.utils.files import read_json, write_atomically, write_json
from scd.utils.table import Table

TIMED_FRAMES = 9  # of each model, after one to warm up


@dataclass
class Candidate:
    """A model, the `metrics.json` of its evaluation, and its times per frame in seconds."""

    loaded: LoadedModel
    evaluation: dict[str, Any]
    seconds: list[float]

    @property
    def frame_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def sizes(self) -> str:
        return layers_text(self.loaded.options)


def layers_text(options: Options) -> str:
    """Describe a model in words: type, width and layers."""
    m = options.model
    layers = f"{m.encoder_layers}+{m.decoder_layers}" if m.type == "scd" else str(m.layers)
    return f"{m.type} {64 * m.heads} wide, {layers} layers"


def compare_checkpoints(
    paths: list[Path], folder: Path, overrides: list[str] | None = None
) -> None:
    """Print a table of evaluated checkpoints; write `compare.md` and `compare.json` to a folder.

    Args:
        overrides: `key=value`, the ones that all of them were evaluated with.

    Raises:
        ScdError: a checkpoint was not evaluated, or not on the same clips as the others.
    """
    candidates = [_candidate(path, overrides) for path in paths]
    protocols = [candidate.evaluation["protocol"] for candidate in candidates]
    same = ("videos", "context_frames", "new_frames", "seeds", "data_hash", "fvd_precision")
    for key in same:
        if any(key not in protocol for protocol in protocols):
            raise ScdError("evaluated by another version of this project: evaluate them again")
        values = {str(protocol[key]) for protocol in protocols}
        if len(values) > 1:
            raise ScdError(
                f"the checkpoints were evaluated with different {key}: {', '.join(sorted(values))}"
            )
    for key in FRAMING:
        values = {str(getattr(c.loaded.options.data, key)) for c in candidates}
        if len(values) > 1:
            raise ScdError(
                f"the checkpoints were evaluated with different data.{key}: "
                f"{', '.join(sorted(values))}"
            )
    time_frames(candidates)
    text = comparison(candidates).markdown()
    entries = [
        {
            "name": c.loaded.options.name,
            "model": c.sizes,
            "parameters": _parameters(c),
            "seconds_per_frame": c.seconds,
            "evaluation": c.evaluation,
        }
        for c in candidates
    ]
    write_json(folder / "compare.json", {"models": entries, "environment": environment()})
    write_atomically(
        folder / "compare.md", lambda aside: aside.write_text(text + "\n", encoding="utf-8")
    )
    print(f"\n{text}\n\ntable: {folder / 'compare.md'}, compare.json")


@torch.no_grad()
def time_frames(candidates: list[Candidate]) -> None:
    """Time frames at batch 1, in latents, right after the context frames of the evaluation.

    A model that denoises all new frames at once counts with its mean over them.
    """
    steps = [_frame_maker(candidate.loaded) for candidate in candidates]
    for number in tqdm(range(TIMED_FRAMES + 1), desc="time", unit="frame", dynamic_ncols=True):
        for candidate, (make, frames) in zip(candidates, steps, strict=True):
            started = time.perf_counter()
            make().sum().item()  # wait for the device
            if number:
                candidate.seconds.append((time.perf_counter() - started) / frames)


def _frame_maker(loaded: LoadedModel) -> tuple[Callable[[], torch.Tensor], int]:
    """Return a function that makes new frames of a video, and how many it makes at a time."""
    o, model = loaded.options, loaded.model
    known = max(o.eval.context_frames, model.first_predicted)
    side = o.data.frame_size // loaded.codec.downsampling
    context = torch.randn(1, known, model.config.channels, side, side, device=model.device)
    if not isinstance(model, CausalWorldModel):
        new = o.eval.new_frames
        return partial(continue_videos, model, o.rollout, context, new), new
    rollout = Rollout(model, o.rollout, known + TIMED_FRAMES + 1)
    rollout.reset(context)
    return rollout.step, 1


def comparison(candidates: list[Candidate]) -> Table:
    """Make a table with one line for each model; times also as multiples of the fastest."""
    names = _names([candidate.loaded for candidate in candidates])
    fastest = min(candidate.frame_seconds for candidate in candidates)
    first = candidates[0].evaluation["protocol"]
    rows = [candidate.evaluation["rows"][MODEL] for candidate in candidates]
    metrics = columns(rows, [first])
    heads = ["name", "model", "parameters", "s/frame ↓", "ratio", *(c.head for c in metrics)]
    lines = []
    for name, candidate, row in zip(names, candidates, rows, strict=True):
        lines.append(
            [
                name,
                candidate.sizes,
                f"{_parameters(candidate) / 1e6:.1f} M",
                f"{candidate.frame_seconds:.3f}",
                f"{candidate.frame_seconds / fastest:.2f}",
                *(column.cell(row) for column in metrics),
            ]
        )
    note = (
        f"Time: batch 1, {first['context_frames']} frames of context, without the autoencoder; "
        f"median of {TIMED_FRAMES} frames."
    )
    how = [rollout_text(candidate.loaded.options.rollout) for candidate in candidates]
    made = list(zip(names, how, strict=True))
    if len({how for _, how in made}) == 1:
        made = [("Frames", made[0][1])]
    missing = [candidate.evaluation.get("missing", {}) for candidate in candidates]
    lacking = missing_notes(list(zip(names, missing, strict=True)))
    return Table(heads, lines, 2, [note, *(f"{name}: {how}." for name, how in made), *lacking])


def _names(models: list[LoadedModel]) -> list[str]:
    """Name models by their experiment, and where that is not enough by step or file too."""
    names = [model.options.name for model in models]
    return [
        name if names.count(name) == 1 else f"{name}, {_which(model)}"
        for name, model in zip(names, models, strict=True)
    ]


def _which(model: LoadedModel) -> str:
    step = model.source["step"]
    return str(model.source["path"]) if step is None else f"step {step}"


def _candidate(path: Path, overrides: list[str] | None) -> Candidate:
    loaded = load_checkpoint_for_use(path, None, overrides).for_rollouts()
    data = clip_folder(loaded.options, loaded.options.data.val_list, "video")
    metrics = evaluation_folder(loaded.options, loaded.source, data) / "metrics.json"
    found = read_json(metrics) if metrics.is_file() else None
    precision = loaded.options.eval.fvd_precision  # the folder holds those of both
    if found is None or found["protocol"].get("fvd_precision", precision) != precision:
        command = shlex.join(["./scripts/inference.sh", str(path), *(overrides or [])])
        raise ScdError(f"{path}: not evaluated with these options yet; first run {command}")
    return Candidate(loaded, found, [])


def _parameters(candidate: Candidate) -> int:
    return sum(p.numel() for p in candidate.loaded.model.parameters())
