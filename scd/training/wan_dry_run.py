"""What training a Wan costs, counted without its weights; and a miniature that runs a step of it.

Wan's true size takes more time and memory than a try is worth. So costs are counted on tensors that
have no memory, and the same experiment runs with few and narrow layers, on noise.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from scd.data.latents import write_latents
from scd.data.lists import ClipEntry, write_list
from scd.data.prompts import EMBEDDINGS, write_embedding, write_prompt_list
from scd.models.world_model import CausalWorldModel
from scd.options import Options
from scd.rollout.cache import KVCache, Window
from scd.training.build import build_codec, latent_shape
from scd.training.encode import encoding_name
from scd.training.performance import StepEstimate, estimate_step
from scd.wan.bidirectional_wan import BidirectionalWan
from scd.wan.from_options import build_wan
from scd.wan.video_codec import WanCodec
from scd.wan.wan_pipeline import SCDWanPipeline

GPUS = (1, 2, 8)
GPU_BYTES = 80e9
WAN_LAYERS = 30  # of 1.3B, for a teacher
LATENTS: dict[str, Any] = {
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
CAPTIONS = ("a walk in the rain", "a walk in the sun")


def describe_wan(options: Options) -> str:
    """Describe the parameters, floating-point work and memory of training a Wan, and of its use."""
    with torch.device("meta"):
        codec = WanCodec(AutoencoderKLWan())
        model = build_wan(options, codec.channels, codec.downsampling)
    m, data, r = options.model, options.data, options.rollout
    layers = f"{m.encoder_layers} + {m.decoder_layers}" if m.is_separable else f"{m.layers}"
    height, width = data.frame_sides
    parts = ", ".join(f"{n} {count_parameters(p) / 1e6:.1f}" for n, p in model.named_children())
    student = estimate_by_depth(options, codec)
    others, step_flops, kept = _of_distillation(options, codec, model, student)
    lines = [
        f"{m.type}, {model.width} wide, {layers} layers, {width}x{height}, {data.frames} latent "
        f"frames of {model.tokens_per_frame(*latent_shape(codec, options)[1:])} tokens",
        f"  parameters   {count_parameters(model) / 1e6:.1f} M"
        + (f" ({parts})" if m.is_separable else ""),
    ]
    if isinstance(model, CausalWorldModel):
        past = data.frames - 1
        encode, denoise = frame_flops(
            model, latent_shape(codec, options), options.wan.text_length, past
        )
        branches = 2 if r.guidance != "none" and r.guidance_scale != 1 else 1
        total = branches * (encode + r.steps * denoise)
        lines.append(
            f"  a frame      {total / 1e12:.3g} TFLOP after {past} others: once "
            f"{encode / 1e12:.3g}, in each of {r.steps} steps {denoise / 1e12:.3g}"
            + (", all twice for guidance" if branches == 2 else "")
        )
    accumulated = options.train.gradient_accumulation
    lines += [
        f"  a step       {accumulated * step_flops / 1e12:.4g} TFLOP a process, "
        f"{accumulated} x {options.train.batch_size} clips",
        f"  memory       {_memory(others, kept)}",
    ]
    return "\n".join(lines)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def estimate_by_depth(options: Options, codec: WanCodec) -> StepEstimate:
    """Estimate a step as `estimate_step`, from models of one and two layers of either kind."""
    names = ("encoder_layers", "decoder_layers", "layers")
    depths = {name: depth for name in names if (depth := getattr(options.model, name))}

    def shallow(**layers: int) -> StepEstimate:
        sizes: dict[str, Any] = {**dict.fromkeys(depths, 1), **layers}
        model = replace(options.model, **sizes)
        wan = replace(options.wan, decoder_first=0)  # one layer costs as much as another
        return estimate_step(replace(options, model=model, wan=wan), codec, counts_scores=False)

    one = shallow()
    flops, kept = one.flops, one.activation_bytes
    for name, depth in depths.items():
        two = shallow(**{name: 2})
        flops += (depth - 1) * (two.flops - one.flops)
        kept += (depth - 1) * (two.activation_bytes - one.activation_bytes)
    return replace(one, flops=flops, activation_bytes=kept)


@torch.no_grad()
def frame_flops(
    model: CausalWorldModel, shape: tuple[int, int, int], text_length: int, past: int
) -> tuple[int, int]:
    """Count the work of a chunk of frames in a rollout, of a Wan that has no memory.

    Args:
        shape: (C, h, w), of a frame's latents.
        text_length: tokens of the text, whose keys are there already.
        past: frames before it.

    Returns:
        What comes once, and what comes in every denoising step.
    """
    chunk = model.chunk_frames
    chunks = past // chunk - 1 + model.start_slots  # held before the newest is encoded
    tokens = model.tokens_per_frame(*shape[1:]) * chunk
    with torch.device("meta"):
        cache = KVCache(model, 1, Window(chunks + 2), tokens)
        cache.frames = chunks
        frame = torch.empty(1, chunk, *shape)
        ids = torch.zeros(1, 1, dtype=torch.long)
        modulation = model.precompute_modulation(ids[0], torch.empty(1))
        text = torch.empty(1, text_length, model.config.text_dim)
        cache.text = model.precompute_text(text)
        with FlopCounterMode(display=False) as once:
            denoiser = model.begin_frame(frame, ids, ids, cache, modulation, noise=frame)
        with FlopCounterMode(display=False) as each:
            denoiser(frame, 0)
    return once.get_total_flops(), each.get_total_flops()


def _of_distillation(
    options: Options, codec: WanCodec, model: torch.nn.Module, student: StepEstimate
) -> tuple[float, float, float]:
    """Add to a student's costs those of the networks beside it.

    Returns:
        Bytes that are sharded, FLOPs of a step on `train.batch_size` clips, and bytes that are not.
    """
    d, own = options.distill, count_parameters(model)
    passes = 4 if options.train.gradient_checkpointing else 3  # a backward pass is two forward ones
    forward, guided = student.flops / passes, 1 if d.guidance_scale == 1 else 2
    working = 2 * own  # the weights in bf16
    kept = student.activation_bytes + _block_bytes(options, codec) + working
    sharded, flops = 20.0 * own, float(student.flops)  # weights, gradients, two moments, average
    weak = 4 * (d.weak_teacher is not None)  # bytes a parameter: weights alone, as a teacher
    if d.method == "consistency":
        return sharded + (8 + weak) * own, flops + (guided + 1) * forward, kept
    if d.method == "none":
        return sharded, flops, kept
    m = options.model
    teacher = replace(m, type="bidirectional_wan", layers=WAN_LAYERS, **NO_LAYERS)
    both = replace(options, model=teacher, flow=replace(options.flow, noise_draws=1))
    critic = estimate_by_depth(both, codec)
    count, forward = _critic_parameters(both, codec), critic.flops / passes
    rolled_out, cached = _rollout(options, codec)
    # A critic has weights, gradients and moments, a teacher weights alone.
    sharded += (16 + 4 + weak) * count
    updated = flops + (guided + 1) * forward  # a student's update
    flops = rolled_out + critic.flops + updated / d.critic_updates
    return sharded, flops, kept + critic.activation_bytes + cached


NO_LAYERS: dict[str, Any] = {"encoder_layers": 0, "decoder_layers": 0, "encoder_frame": "shift"}


def _critic_parameters(options: Options, codec: WanCodec) -> int:
    with torch.device("meta"):
        return count_parameters(build_wan(options, codec.channels, codec.downsampling))


def _rollout(options: Options, codec: WanCodec) -> tuple[float, float]:
    """Count the FLOPs of a student's rollouts in training, and the bytes of its cache in bf16."""
    with torch.device("meta"):
        model = build_wan(options, codec.channels, codec.downsampling)
    assert isinstance(model, CausalWorldModel)
    frames, clips = options.data.frames, options.train.batch_size
    # The work grows linearly from frame to frame. On average, half of the steps are taken.
    shape, length = latent_shape(codec, options), options.wan.text_length
    costs = [frame_flops(model, shape, length, past) for past in (1, frames - 1)]
    once, each = (sum(parts) / 2 for parts in zip(*costs, strict=True))
    flops = clips * frames * (once + (options.rollout.steps + 1) / 2 * each)
    tokens = model.tokens_per_frame(*shape[1:])
    return flops, clips * 2 * 2 * model.cached_layers * frames * tokens * model.width


def _block_bytes(options: Options, codec: WanCodec) -> int:
    """Count what one block keeps while its backward pass runs, of the half with more tokens."""
    if not options.train.gradient_checkpointing:
        return 0
    train = replace(options.train, gradient_checkpointing=False)
    m, sizes = options.model, []
    name = "decoder_layers" if m.is_separable else "layers"
    for depth in (1, 2):
        layers: dict[str, Any] = {"encoder_layers": min(m.encoder_layers, 1), name: depth}
        shallow = replace(m, **layers)
        wan = replace(options.wan, decoder_first=0)
        found = estimate_step(
            replace(options, model=shallow, wan=wan, train=train), codec, counts_scores=False
        )
        sizes.append(found.activation_bytes)
    return sizes[1] - sizes[0]


def _memory(sharded: float, kept: float) -> str:
    """Say what each of some GPUs holds, where FSDP2 shards over them what can be."""
    of_gpus = []
    for count in GPUS:
        total = sharded / count + kept
        note = "" if total <= GPU_BYTES else ": too much"
        of_gpus.append(f"{count} GPU{'s' * (count > 1)} {total / 1e9:.1f} GB{note}")
    return (
        f"about {', '.join(of_gpus)} (each of 80 GB; {sharded / 1e9:.1f} GB sharded by FSDP2, "
        f"{kept / 1e9:.1f} GB on every one)"
    )


def miniature(options: Options, folder: Path) -> Options:
    """Shrink an experiment to one step of a tiny Wan on noise, with all files below `folder`."""
    m, d = options.model, options.distill
    frames = 3 * options.wan.chunk_frames
    depths = ("encoder_layers", "decoder_layers") if m.is_separable else ("layers",)
    two: dict[str, Any] = dict.fromkeys(depths, 2)
    given = [min(n, 1) for n in options.flow.prefix_frames]
    options = replace(
        options,
        output_root=str(folder / "experiments"),
        init_from=str(folder / "start") if options.init_from else None,
        model=replace(m, heads=2, **two),
        wan=replace(
            options.wan,
            head_dim=12,
            ffn_dim=32,
            text_dim=32,
            text_length=8,
            decoder_first=min(options.wan.decoder_first, 1),
        ),
        data=replace(
            options.data,
            root=str(folder / "data"),
            train_list="prompts.txt" if options.data.source == "prompts" else "train.json",
            val_list="train.json",
            frame_size=32,
            frame_width=48,
            resize_shorter=None,
            frames=frames,
        ),
        autoencoder=replace(options.autoencoder, path=str(folder / "start/vae")),
        flow=replace(options.flow, prefix_frames=given),
        distill=replace(
            d,
            teacher=None if d.method == "none" else str(folder / "teacher"),
            context_frames=min(d.context_frames, 1),
            window_frames=None,
            critic_updates=1,  # the only step updates the student too
        ),
        train=replace(
            options.train,
            steps=1,
            batch_size=1,
            gradient_accumulation=1,
            workers=0,
            sample_every=min(options.train.sample_every, 1),
            trackers=[],
        ),
        optim=replace(options.optim, warmup_steps=0),
        rollout=replace(options.rollout, steps=2, window=0, sink_frames=0),
        eval=replace(options.eval, context_frames=0, new_frames=frames, videos=1),
    )
    _write_weights(options, folder)
    _write_data(options)
    return options


def _write_weights(options: Options, folder: Path) -> None:
    """Write a random model to start from, a teacher, and the autoencoder of both."""
    torch.manual_seed(options.seed)
    vae = AutoencoderKLWan(base_dim=4, **LATENTS)
    channels, downsampling = vae.config.z_dim, vae.config.scale_factor_spatial
    model = build_wan(options, channels, downsampling)
    SCDWanPipeline(model, vae).save_pretrained(folder / "start")
    if options.distill.method == "dmd":
        kind = replace(options.model, type="bidirectional_wan", layers=2, **NO_LAYERS)
        model = build_wan(replace(options, model=kind), channels, downsampling)
        assert isinstance(model, BidirectionalWan)
    SCDWanPipeline(model, vae).save_pretrained(folder / "teacher")


def _write_data(options: Options) -> None:
    """Write prompts and their embeddings, and clips of latents with both and with actions."""
    root, wan = Path(options.data.root), options.wan
    rng = np.random.default_rng(options.seed)
    codec = build_codec(options)
    shape, frames = latent_shape(codec, options), options.data.frames
    texts = {prompt: prompt for prompt in (wan.negative_prompt.strip(), *CAPTIONS)}
    prompts = write_prompt_list(root, "noise", wan.text_length, wan.negative_prompt, texts)
    for file in prompts.files.values():
        tokens = rng.normal(size=(4, wan.text_dim)).astype(np.float32)
        write_embedding(root / EMBEDDINGS / file, torch.from_numpy(tokens))
    (root / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    entries = []
    for number, caption in enumerate(CAPTIONS):
        name = f"{number}.safetensors"
        latents = torch.from_numpy(rng.normal(size=(frames, *shape)).astype(np.float32))
        write_latents(root / name, latents, encoding_name(options))
        pictures = 1 + (frames - 1) * codec.frames_per_latent
        actions = rng.integers(max(options.model.num_conditions, 1), size=pictures)
        np.savez(root / f"{number}.npz", actions=actions)
        actions_in = f"{number}.npz"
        entries.append(ClipEntry(latent_path=name, action_path=actions_in, caption=caption))
    write_list(root / "train.json", entries)
