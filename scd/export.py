"""`scd export`: a checkpoint as a folder for others: diffusers pipeline, options, model card."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scd.data.lists import read_list
from scd.errors import ScdError
from scd.evaluation.samples import EVALUATIONS
from scd.evaluation.summary import rollout_text
from scd.models.load import LoadedModel, load_checkpoint_for_use
from scd.options import Options
from scd.pipeline import pipeline_of
from scd.training.run_log import read_log
from scd.utils.environment import git_commit
from scd.utils.files import read_json, write_folder_atomically

CARD_HEAD = """---
library_name: diffusers
license: mit
tags: [scd, world-model, video-prediction, flow-matching]
---
"""


def export_checkpoint(
    checkpoint: Path, folder: Path, dtype: torch.dtype, overrides: list[str]
) -> None:
    """Write what `SCDPipeline.from_pretrained` and `scd play` read.

    Where the autoencoder's folder lies beside the new one, its files are linked, not copied.

    Args:
        dtype: of the world model's weights; the autoencoder stays as it is.
        overrides: `key=value`, on top of the checkpoint's options: how frames are to be made.

    Raises:
        ScdError: the checkpoint is missing or damaged, or the folder is there and is no export.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ScdError(f"{folder} is there and holds no pipeline: choose another folder")
    loaded = load_checkpoint_for_use(checkpoint, None, overrides)
    write_folder_atomically(folder, lambda aside: _write(loaded, aside, folder, dtype))


def _write(loaded: LoadedModel, aside: Path, folder: Path, dtype: torch.dtype) -> None:
    vae = getattr(loaded.codec, "autoencoder", None)
    # Not ModelMixin's own `to`, which warns of a list of layers that is empty here.
    model = nn.Module.to(loaded.model, "cpu", dtype)
    pipeline_of(loaded.options, model, vae).save_pretrained(aside)
    path = loaded.options.autoencoder.path
    if path is not None and Path(path).resolve().parent == folder.resolve().parent:
        for file in (aside / "vae").iterdir():
            if (Path(path) / file.name).is_file():
                file.unlink()
                os.symlink(Path("..", "..", Path(path).name, file.name), file)
    (aside / "README.md").write_text(model_card(loaded, folder.name, dtype), encoding="utf-8")


def model_card(loaded: LoadedModel, name: str, dtype: torch.dtype) -> str:
    """Markdown: what it is, what it was trained on and for how long, and what was measured."""
    options, source = loaded.options, loaded.source
    weights = Path(str(source["path"]))
    count = sum(p.numel() for p in loaded.model.parameters())
    facts = {
        "architecture": f"{type(loaded.model).__name__}, {_layers(options)}, width "
        f"{loaded.model.width}, {count / 1e6:.1f} million parameters, {str(dtype).split('.')[1]}",
        "autoencoder": options.autoencoder.path or "none, pixels",
        "data": _data(options),
        "training": _training(options, weights, source["step"]),
        "git commit": _manifest(weights).get("git_commit") or git_commit() or "unknown",
        "weights": f"SHA-256 of the checkpoint they come from: {source['sha256']}",
        "frames are made by": rollout_text(options.rollout),
    }
    parts = [f"{CARD_HEAD}\n# {name}"]
    parts.append("| | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items()))
    parts.append(
        "```python\nfrom scd.pipeline import SCDPipeline\n\n"
        f'pipeline = SCDPipeline.from_pretrained("{name}")  # this folder\n'
        "frames = pipeline(video, actions=actions, num_frames=64).frames\n```"
    )
    parts.append("## Measured")
    parts += _evaluations(weights, str(source["sha256"])) or [
        "Not measured yet: `scd evaluate`, then `scd export` again."
    ]
    parts.append("All options are in `options.yml`.")
    return "\n\n".join(parts) + "\n"


def _layers(options: Options) -> str:
    m = options.model
    return f"{m.layers} layers" if m.layers else f"{m.encoder_layers} + {m.decoder_layers} layers"


def _data(options: Options) -> str:
    train = Path(options.data.root) / options.data.train_list
    clips = f"{len(read_list(train))} videos" if train.is_file() else "videos"
    size = options.data.frame_size
    return f"{clips} of {train}, {size}x{size}, clips of {options.data.frames} frames"


def _training(options: Options, weights: Path, step: str | int | None) -> str:
    said = f"step {step} of {options.train.steps}, batch {options.train.batch_size}"
    if options.init_from is not None:
        said += f", begun with the weights of {options.init_from}"
    log = _experiment(weights) / "log.jsonl"
    if step is None or not log.is_file():
        return said
    seconds, last = 0.0, 0
    for entry in read_log(log):
        if "seconds" in entry and last < entry["step"] <= int(step):
            seconds += entry["seconds"] * (entry["step"] - last)
            last = entry["step"]
    return f"{said}, {seconds / 3600:.1f} hours"


def _evaluations(weights: Path, sha256: str) -> list[str]:
    """The tables of this checkpoint's evaluations, each under what was asked of it."""
    out = []
    for path in sorted((_experiment(weights) / EVALUATIONS).glob("*/metrics.json")):
        found = read_json(path)
        if found["checkpoint"]["sha256"] != sha256:
            continue
        asked: dict[str, Any] = found["protocol"]
        how = f"{asked['rollout_steps']} steps, window {asked['rollout_window'] or 'open'}"
        out.append(
            f"{asked['videos']} videos of {asked['data']}, {asked['context_frames']} → "
            f"{asked['new_frames']} frames, {how}:"
        )
        out.append(path.with_name("metrics.md").read_text(encoding="utf-8").strip())
    return out


def _experiment(weights: Path) -> Path:
    """experiments/<name>/checkpoints/step-…/ema.safetensors -> experiments/<name>."""
    return weights.parent.parent.parent


def _manifest(weights: Path) -> dict[str, Any]:
    path = weights.with_name("manifest.json")
    return read_json(path) if path.is_file() else {}
