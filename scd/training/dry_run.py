"""Try an experiment before its data exist: run one step, rollout and evaluation on noise.

Weights that it starts from, or that teach it, need not exist either: random ones stand for them, of
a teacher as deep as the student. (The world model that a decoder learns from must: it decides what
is tried.) All sizes are the true ones. The costs of a step are printed
first, so that they are seen even on a machine that is too small to run it. A Wan is tried in
miniature (`wan_dry_run.py`).
"""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file

from scd.data.latents import write_latents
from scd.data.lists import ClipEntry, write_list
from scd.errors import ScdError
from scd.evaluation.i3d import SHORTEST
from scd.models.autoencoder import build_autoencoder, load_codec
from scd.models.load import build_world_model
from scd.options import (
    AutoencoderOptions,
    DistillOptions,
    EvalOptions,
    Options,
    load_options,
    options_to_dict,
)
from scd.training.build import latent_shape
from scd.training.distillation_cost import (
    describe_networks,
    describe_shares,
    distillation_cost,
    teacher_options,
)
from scd.training.encode import encoding_name
from scd.training.launch import run_experiment
from scd.training.step_cost import estimate_step
from scd.training.wan_dry_run import describe_wan, miniature
from scd.utils.files import write_atomically
from scd.utils.paths import to_read
from scd.utils.processes import error_barrier, processes

CLIPS = 2  # in each list


def dry_run(options: Options) -> None:
    """Print the costs of a step; then run one, a short rollout and an evaluation of two videos.

    Raises:
        ScdError: as a real run would with these options, except for missing data; or the
            autoencoder does not exist and no options file in `options/` describes it.
    """
    state, small = processes(), [options]
    main = state.is_main_process
    with ExitStack() as held:
        with error_barrier():
            if main:
                folder = held.enter_context(_folder_of_all(options, state))
                small = [_prepare(options, Path(folder))]
        run_experiment(broadcast_object_list(small)[0])  # the main process is the last to leave it
    if main:
        done = "a step, a rollout and an evaluation on noise succeeded"
        if options.model.is_wan:
            done = "a step of a miniature of it succeeded on noise"
        print(f"{options.name}: {done}")


def _folder_of_all(options: Options, state: PartialState) -> TemporaryDirectory[str]:
    """Make a folder that all processes see: those of other machines, where results are to go."""
    place = None
    if state.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)):
        place = Path(options.output_root)
        place.mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix="scd-dry-run-", dir=place, ignore_cleanup_errors=True)


def _prepare(options: Options, folder: Path) -> Options:
    """Print the costs of a step; reduce an experiment to what is tried, on noise in a folder."""
    if options.model.is_wan:
        print(describe_wan(options))
        return miniature(options, folder)
    small = _on_noise(options, folder)
    if options.task == "world_model":
        print(describe(small))
    return small


def describe(options: Options) -> str:
    """Describe the costs of one process's step, beside those of the other kind of model.

    Of post-training, with those of the networks that the student learns from.
    """
    codec, distilled = load_codec(options.autoencoder.path), options.distill.method != "none"
    batches = options.train.gradient_accumulation
    lines = []
    for kind in (options,) if distilled else (options, counterpart(options)):
        m, found = kind.model, estimate_step(kind, codec)
        layers = f"{m.encoder_layers} + {m.decoder_layers}" if m.type == "scd" else f"{m.layers}"
        parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in found.parameters.items())
        tokens, flops = found.tokens, float(found.flops)
        state, kept = found.state_bytes, found.activation_bytes
        beside, shares = [], ""
        if distilled:
            cost = distillation_cost(options, codec)
            tokens, flops = cost.tokens, cost.flops
            state, kept = cost.state_bytes, cost.activation_bytes
            beside = [f"  beside it    {describe_networks(cost)}"]
            shares = describe_shares(cost, batches)
        if options.flow.self_forcing_prob:
            shares += ", resampled histories (flow.self_forcing_prob) not counted"
        lines += [
            f"{m.type}, {64 * m.heads} wide, {layers} layers"
            + ("" if kind is options else " (for comparison)"),
            f"  parameters   {found.total_parameters / 1e6:.1f} M ({parts})",
            *beside,
            f"  a step       {batches * tokens} tokens of clips, "
            f"{batches * flops / 1e12:.3g} TFLOP{shares}",
            f"  memory       {_gib(state)} weights, gradients, Adam and EMA; about "
            f"{_gib(kept)} kept for the backward pass",
        ]
    return "\n".join(lines)


def counterpart(options: Options) -> Options:
    """Switch to the other kind of model, with the same width and number of layers."""
    m = options.model
    if m.type == "scd":
        layers = m.encoder_layers + m.decoder_layers
        other = replace(m, type="causal_dit", layers=layers, encoder_layers=0, decoder_layers=0)
    else:
        decoder = max(m.layers // 3, 1)  # as in the paper: 4 of 12
        encoder = max(m.layers - decoder, 1)
        other = replace(m, type="scd", layers=0, encoder_layers=encoder, decoder_layers=decoder)
    return replace(options, model=other)


def _on_noise(options: Options, folder: Path) -> Options:
    """Reduce an experiment to one step on clips of noise, with all files below `folder`."""
    data, evaluation = options.data, options.eval
    path = options.autoencoder.path
    if path is not None and not (to_read(path) / "config.json").is_file():
        architecture = _architecture(path)
        path = str(folder / "autoencoder")
        build_autoencoder(architecture).half().save_pretrained(path)
        options = replace(options, autoencoder=replace(options.autoencoder, path=path))
    if options.task == "autoencoder":
        options = replace(options, init_from=None)
    elif options.init_from is not None:
        options = _with_random_weights(options, folder)
    new_frames = max(2, SHORTEST - evaluation.context_frames)
    options = replace(
        options,
        output_root=str(folder / "experiments"),
        data=replace(data, root=str(folder / "data"), train_list="train.json", val_list="val.json"),
        train=replace(options.train, steps=1, sample_every=1, workers=0, trackers=[]),
        rollout=replace(options.rollout, steps=2),
        eval=replace(evaluation, videos=2, new_frames=new_frames, batch_size=2),
    )
    _write_clips(options, evaluation.context_frames + new_frames)
    return options


def _with_random_weights(options: Options, folder: Path) -> Options:
    """Write random weights for `init_from` and the teachers, and name them in the options."""
    codec = load_codec(options.autoencoder.path)
    start = folder / "start.safetensors"
    save_file(build_world_model(options, codec).state_dict(), start)
    options = replace(options, init_from=str(start))
    d, m = options.distill, options.model
    if d.method == "none":
        return options
    teacher, kind, flow = folder / "teacher.safetensors", m, options.flow
    if d.method == "dmd":
        kind, flow = teacher_options(m), replace(flow, prefix_frames=[1, 1])
    plain = replace(
        options,
        init_from=None,
        distill=DistillOptions(),
        model=kind,
        flow=flow,
        eval=EvalOptions(1, 1),
    )
    about = {"options": json.dumps(options_to_dict(plain)), "step": "0"}
    save_file(build_world_model(plain, codec).state_dict(), teacher, about)
    # The only step updates the student too.
    weak = None if d.weak_teacher is None else str(teacher)
    d = replace(d, teacher=str(teacher), weak_teacher=weak, critic_updates=1)
    return replace(options, distill=d)


def _write_clips(options: Options, evaluation_frames: int) -> None:
    """Write clips of noise, their latents where they are trained on, and both lists."""
    data, model = options.data, options.model
    root = Path(data.root)
    rng = np.random.default_rng(options.seed)
    height = data.resize_shorter or data.frame_size
    width = height * 4 // 3 if data.resize_shorter else height
    needed = (max(data.frames, evaluation_frames) - 1) * data.frame_stride + 1
    entries = []
    for clip in range(CLIPS):
        video = rng.integers(256, size=(needed, height, width, 3), dtype=np.uint8)
        if model.condition == "action_vector":
            actions = rng.integers(2, size=(needed, model.num_conditions))
        else:
            actions = rng.integers(max(model.num_conditions, 1), size=needed)
        path = root / f"{clip}.npz"
        write_atomically(path, partial(np.savez, video=video, actions=actions))
        entries.append(ClipEntry(video_path=path.name, label=clip % max(model.num_conditions, 1)))
    write_list(root / data.val_list, entries)
    if data.source == "latents":
        shape = latent_shape(load_codec(options.autoencoder.path), options)
        for clip, entry in enumerate(entries):
            latents = torch.from_numpy(rng.normal(size=(needed, *shape)).astype(np.float32))
            write_latents(root / f"{clip}.safetensors", latents, encoding_name(options))
            entries[clip] = replace(entry, latent_path=f"{clip}.safetensors")
    write_list(root / data.train_list, entries)


def _architecture(path: str) -> AutoencoderOptions:
    """Load the options of the autoencoder that `path` is for: one of its folders has their name."""
    for part in reversed(Path(path).parts):
        file = to_read(Path("options") / f"{part}.yml")
        if file.is_file() and (found := load_options(file)).task == "autoencoder":
            return found.autoencoder
    raise ScdError(
        f"{path}: no autoencoder there, and no folder of this path has the name of a file in "
        f"options/ that describes it"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
