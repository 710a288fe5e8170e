"""`scd export`: write a checkpoint as a diffusers pipeline with its options and a model card."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scd.data.lists import read_list
from scd.errors import ScdError
from scd.evaluation.samples import EVALUATIONS
from scd.evaluation.summary import rollout_text
from scd.models.load import LoadedModel, load_checkpoint_for_use, source_of
from scd.models.weights import weight_files
from scd.models.world_model import WorldModel
from scd.options import OPTIONS_FILE, Options, load_options
from scd.pipeline import pipeline_of
from scd.training.run_log import read_log
from scd.utils.environment import git_commit
from scd.utils.files import read_json, sha256, write_folder_atomically
from scd.utils.precision import with_weights_in
from scd.wan.from_options import options_in
from scd.wan.training_run import TRAINING_FILE, load_pipeline_of_checkpoint, save_run

CARD_HEAD = """---
library_name: diffusers
license: {license}
tags: [scd, {task}, flow-matching]
---
"""
CARD = "README.md"
# What exports write: the rest of a folder stays there when another export replaces it.
WRITTEN = {"model_index.json", "transformer", "vae", OPTIONS_FILE, TRAINING_FILE, CARD}
# Rows of a card that a further export of an exported folder takes over.
ORIGIN = ("autoencoder", "training data", "training", "teacher", "git commit", "checkpoint")
OWN = {"license": "mit", "task": "world-model, video-prediction"}
OF_WAN = {
    "license": "apache-2.0",
    "task": "text-to-video",
}  # the license is that of Wan2.1's weights
CAUSAL = "A causal video diffusion model that generates video frame by frame"
KINDS = {
    "scd": CAUSAL,
    "causal_dit": CAUSAL,
    "bidirectional_dit": "A video diffusion model that sees all frames of a clip at once",
    "scd_wan": f"{CAUSAL}, made of a text-to-video Wan",
    "causal_wan": f"{CAUSAL}, made of a text-to-video Wan",
    "bidirectional_wan": "A text-to-video Wan that sees all frames of a clip at once",
}
PAPER = (
    ", trained with `scd`, the open-source project for Separable Causal Diffusion ([Bai et al., "
    "CVPR 2026](https://arxiv.org/abs/2602.10095))."
)
ABOUT = {
    "scd": "Its causal encoder runs once per frame, and only its light decoder denoises.",
    "causal_dit": "It is the paper's dense baseline: every layer runs in every denoising step.",
    "bidirectional_dit": "It cannot be streamed: it is a teacher to distil causal models from.",
}
ABOUT |= {
    "scd_wan": ABOUT["scd"],
    "causal_wan": "It is the dense baseline: every layer runs in every denoising step.",
    "bidirectional_wan": ABOUT["bidirectional_dit"],
}
LEGEND = (
    "Arrows say whether higher or lower is better. +1…+4 are the first four new frames; n is the "
    "number of videos that FVD is computed from. The rows below the model's are measured on the "
    "same videos, for comparison."
)


def export_checkpoint(
    checkpoint: Path, folder: Path, dtype: torch.dtype, overrides: list[str]
) -> None:
    """Write the folder that `SCDPipeline.from_pretrained` and `scd play` load, or, of a Wan's
    checkpoint, the one that `SCDWanPipeline.from_pretrained` and `scd wan generate` load.

    If the autoencoder's folder is beside the new one, its files are linked, not copied. An earlier
    export is replaced; what else its folder holds, such as evaluations, stays.

    Args:
        dtype: of the world model's weights; the autoencoder's are unchanged.
        overrides: `key=value`, applied to the checkpoint's options, such as `rollout.steps=4`.

    Raises:
        ScdError: the checkpoint is missing or damaged, or the folder holds something else.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ScdError(f"{folder} exists and holds no pipeline: choose another folder")
    if folder.resolve() == checkpoint.resolve():
        raise ScdError(f"{folder} is the model to export itself: choose another folder")
    if (options := options_in(checkpoint, overrides)) is not None:
        _export_wan(checkpoint, options, folder, dtype)
        return
    loaded = load_checkpoint_for_use(checkpoint, None, overrides)
    _replace(folder, lambda aside: _write(loaded, aside, folder, dtype))


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder atomically, and keep in it all of the present one that exports do not write.

    Files that are kept are linked: the present folder stays whole until the new one is.
    """

    def write_and_keep(aside: Path) -> None:
        write(aside)
        new = WRITTEN.union(path.name for path in aside.iterdir())
        if folder.is_dir():
            shutil.copytree(
                folder,
                aside,
                symlinks=True,
                ignore=lambda parent, _: new if Path(parent) == folder else set(),
                copy_function=_link,
                dirs_exist_ok=True,
            )

    write_folder_atomically(folder, write_and_keep)


def _link(file: str, to: str) -> None:
    try:
        os.link(file, to, follow_symlinks=False)
    except OSError:  # a file system without such links
        shutil.copy2(file, to, follow_symlinks=False)


def _write(loaded: LoadedModel, aside: Path, folder: Path, dtype: torch.dtype) -> None:
    vae = getattr(loaded.codec, "autoencoder", None)
    # Not ModelMixin's own `to`, which warns about an empty list of layers.
    model = nn.Module.to(loaded.model, "cpu", dtype)
    pipeline_of(loaded.options, model, vae).save_pretrained(aside)
    path = loaded.options.autoencoder.path
    codec = None if path is None else Path(path).resolve()
    if codec is not None and codec.parent == folder.resolve().parent:
        for file in (aside / "vae").iterdir():
            if (codec / file.name).is_file():
                file.unlink()
                os.symlink(Path("..", "..", codec.name, file.name), file)
    card = model_card(model, loaded.options, loaded.source, folder.name, dtype, aside)
    (aside / CARD).write_text(card, encoding="utf-8")


def _export_wan(checkpoint: Path, options: Options, folder: Path, dtype: torch.dtype) -> None:
    pipeline, source = load_pipeline_of_checkpoint(checkpoint, options), source_of(checkpoint)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    pipeline.transformer = model = with_weights_in(pipeline.transformer, precision)

    def write(aside: Path) -> None:
        save_run(pipeline, options, aside)
        card = model_card(model, options, source, folder.name, dtype, aside)
        (aside / CARD).write_text(card, encoding="utf-8")

    _replace(folder, write)


def model_card(
    model: WorldModel,
    options: Options,
    source: dict[str, str | int | None],
    name: str,
    dtype: torch.dtype,
    written: Path,
) -> str:
    """Write a model card in Markdown: the model, its data, training, use and evaluations.

    Args:
        source: of the checkpoint, as `scd.models.load.source_of` says it.
        written: the folder that its weights are exported to.
    """
    weights = Path(str(source["path"]))
    head = CARD_HEAD.format(**(OF_WAN if options.model.is_wan else OWN))
    facts = {
        "architecture": _architecture(model, options, dtype),
        "autoencoder": options.autoencoder.path or "none: the model works on pixels",
        "conditions": _conditions(options),
        "training data": _data(options),
        "training": _training(options, weights, source["step"]),
        "git commit": _manifest(weights).get("git_commit") or git_commit() or "unknown",
        "checkpoint": f"SHA-256 {source['sha256']}",
        "sampling, by default": rollout_text(options.rollout),
    }
    earlier, evaluation = _earlier_card(weights)
    same_use = earlier.get("sampling, by default") == facts["sampling, by default"]
    facts |= {key: earlier[key] for key in ORIGIN if key in earlier}
    parts = [
        f"{head}\n# {name}",
        f"{KINDS[options.model.type]}{PAPER} {ABOUT[options.model.type]}",
    ]
    parts.append("| | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in facts.items()))
    parts += ["## Use", _usage(options, name), "## Evaluation"]
    unevaluated = "This checkpoint has not been evaluated yet: "
    if options.model.is_wan:
        unevaluated += "`scd wan generate --vbench` and `scd wan measure` help with that."
    else:
        unevaluated += "run `scd evaluate`, then `scd export` again."
    kept = [evaluation] if evaluation and same_use else []
    places = {_experiment(weights).resolve(), options.output.resolve()}
    parts += _evaluations(places, str(source["sha256"]), written) or kept or [unevaluated]
    return "\n\n".join(parts) + "\n"


def _earlier_card(folder: Path) -> tuple[dict[str, str], str]:
    """Read what the card of an exported folder says of its origin, and its evaluation."""
    path = folder / CARD
    if not path.is_file():  # a checkpoint has none
        return {}, ""
    text, _, evaluation = path.read_text(encoding="utf-8", errors="replace").partition(
        "\n## Evaluation\n"
    )
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE)
    return dict(rows), evaluation.strip()


def _architecture(model: WorldModel, options: Options, dtype: torch.dtype) -> str:
    m = options.model
    if m.is_separable:
        layers = f"{m.encoder_layers} encoder and {m.decoder_layers} decoder layers"
    else:
        layers = f"{m.layers} layers"
    count = sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__}: {layers}, {model.width} wide, "
        f"{count / 1e6:.1f} million parameters, {str(dtype).split('.')[1]}"
    )


def _conditions(options: Options) -> str:
    model = options.model
    if model.is_wan:
        return "a text" + (
            f", and one of {model.num_conditions} actions a frame" * model.has_actions
        )
    names = ", ".join(f"{i} {name}" for i, name in enumerate(options.data.action_names))
    return {
        "none": "none",
        "label": f"a class label per video, 0 to {model.num_conditions - 1}",
        "action": f"an action per frame: {names or f'0 to {model.num_conditions - 1}'}",
        "action_vector": f"a vector per frame with the components {names or model.num_conditions}",
    }[model.condition]


def _data(options: Options) -> str:
    train = Path(options.data.root) / options.data.train_list
    if options.data.source == "prompts":
        return f"prompts alone, of {train}"
    videos = f"{len(read_list(train))} videos" if train.is_file() else "videos"
    height, width = options.data.frame_sides
    frames = f"{options.data.frames} {'latent ' * options.model.is_wan}frames"
    return f"{videos} of {train}, {width}x{height} pixels, in clips of {frames}"


def _training(options: Options, weights: Path, step: str | int | None) -> str:
    at = "unknown" if step is None else step
    text = f"step {at} of {options.train.steps}, batch size {options.train.batch_size}"
    if options.init_from is not None:
        text += f", initialized from {options.init_from}"
    if options.distill.method != "none":
        text += f", distilled ({options.distill.method}) from {options.distill.teacher}"
    if options.distill.weak_teacher is not None:
        text += f", guided away from {options.distill.weak_teacher}"
    log = _experiment(weights) / "log.jsonl"
    if step is None or not log.is_file():
        return text
    seconds, last = 0.0, 0
    for entry in read_log(log):
        if "seconds" in entry and last < entry["step"] <= int(step):
            seconds += entry["seconds"] * (entry["step"] - last)
            last = entry["step"]
    return f"{text}, {seconds / 3600:.1f} hours"


def _usage(options: Options, name: str) -> str:
    if options.model.is_wan:
        return _usage_of_wan(options, name)
    if options.model.type == "bidirectional_dit":  # which the pipeline cannot roll out
        return (
            f"`./scripts/train.sh options/scd_doom_distilled.yml distill.teacher={name}` distils a "
            f"causal model from this folder, `scd evaluate {name}` measures it. All options of the "
            f"experiment are in `options.yml`."
        )
    conditions = {
        "none": ("", ""),
        "label": ("labels=labels, ", ", labels (B,)"),
        "action": ("actions=actions, ", ", actions (B, K + 64) integers"),
        "action_vector": ("actions=actions, ", ", actions (B, K + 64, V)"),
    }
    argument, shape = conditions[options.model.condition]
    return (
        "```python\nfrom scd.pipeline import SCDPipeline\n\n"
        f'pipeline = SCDPipeline.from_pretrained("{name}")  # this folder\n'
        f"frames = pipeline(video, {argument}num_frames=64).frames\n"
        f"# video (B, K, 3, H, W) in [0, 1]{shape} -> (B, K + 64, 3, H, W)\n```\n\n"
        "All options of the experiment are in `options.yml`."
    )


def _usage_of_wan(options: Options, name: str) -> str:
    more = f"All options of the experiment are in `{TRAINING_FILE}`."
    if options.model.is_bidirectional:
        train = "./scripts/train.sh options/scd_wan_distilled.yml"
        return f"`{train} distill.teacher={name}` distils a causal model from this folder. {more}"
    height, width = options.data.frame_sides
    size = f"--height {height} --width {width} --fps {options.data.fps:g}"
    negative, texts = "", "text"
    if options.rollout.guidance == "condition" and options.rollout.guidance_scale != 1:
        negative, texts = "negative_prompt_embeds=negative, ", "text, negative"
    return (
        f'```bash\nscd wan generate {name} --prompt "A cat runs." {size} --out cat.mp4\n```\n\n'
        "```python\nfrom scd.wan import SCDWanPipeline\n\n"
        f'pipeline = SCDWanPipeline.from_pretrained("{name}")  # this folder\n'
        f"frames = pipeline(\n    prompt_embeds=text, {negative}height={height}, width={width}\n)"
        f".frames\n# {texts} (B, {options.wan.text_length}, {options.wan.text_dim}) -> "
        f"(B, 81, 3, {height}, {width})\n```\n\n{more}"
    )


def _evaluations(places: set[Path], checkpoint: str, written: Path) -> list[str]:
    """Collect the tables of this model's evaluations, each under its protocol.

    Args:
        places: folders of experiments where they may lie.
        checkpoint: SHA-256 of the checkpoint. Evaluations of what an export makes of it count too.
    """
    tables = []
    found = sorted(path for at in places for path in (at / EVALUATIONS).glob("*/metrics.json"))
    own = {checkpoint, *map(sha256, weight_files(written))} if found else set()
    for path in found:
        metrics = read_json(path)
        if metrics["checkpoint"]["sha256"] not in own:
            continue
        protocol: dict[str, Any] = metrics["protocol"]
        window, steps = protocol["rollout_window"], protocol["rollout_steps"]
        tables.append(
            f"{protocol['videos']} videos of {protocol['data']}, {protocol['new_frames']} new "
            f"frames after {protocol['context_frames']} context frames, "
            f"{steps} denoising step{'s' * (steps > 1)} per frame, "
            f"{f'a window of {window} frames' if window else 'attention to all past frames'}:"
        )
        tables.append(path.with_name("metrics.md").read_text(encoding="utf-8").strip())
    return [LEGEND, *tables] if tables else []


def _experiment(weights: Path) -> Path:
    """Find the experiment of experiments/<name>/checkpoints/step-…/ema.safetensors or of an export.

    An exported model is evaluated in the folder that its options name.
    """
    if weights.is_dir():
        return load_options(weights / OPTIONS_FILE).output
    return weights.parent.parent.parent


def _manifest(weights: Path) -> dict[str, Any]:
    path = weights.with_name("manifest.json")
    return read_json(path) if path.is_file() else {}
