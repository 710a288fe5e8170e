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

from scd.data.latents import write_latents
from scd.data.lists import ClipEntry, write_list
from scd.data.prompts import EMBEDDINGS, write_embedding, write_prompt_list
from scd.models.world_model import CausalWorldModel
from scd.options import Options
from scd.training.build import build_codec, latent_shape
from scd.training.distillation_cost import describe_shares, distillation_cost, teacher_options
from scd.training.encode import encoding_name
from scd.training.step_cost import estimate_by_depth, estimate_step, frame_flops
from scd.wan.bidirectional_wan import BidirectionalWan
from scd.wan.from_options import build_wan
from scd.wan.video_codec import WanCodec
from scd.wan.wan_pipeline import SCDWanPipeline

GPUS = (1, 2, 8)
GPU_BYTES = 80e9
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
    own = count_parameters(model)
    if options.distill.method == "none":
        student = estimate_by_depth(options, codec, counts_scores=False)
        # Weights, gradients, two moments, average.
        sharded, flops, kept = 20 * own, float(student.flops), student.activation_bytes
        shares = ""
    else:
        cost = distillation_cost(options, codec, counts_scores=False)
        sharded, flops, kept = cost.state_bytes, cost.flops, cost.activation_bytes
        shares = describe_shares(cost, options.train.gradient_accumulation)
    kept += _block_bytes(options, codec) + 2 * own  # the weights in bf16
    lines = [
        f"{m.type}, {model.width} wide, {layers} layers, {width}x{height}, {data.frames} latent "
        f"frames of {model.tokens_per_frame(*latent_shape(codec, options)[1:])} tokens",
        f"  parameters   {own / 1e6:.1f} M" + (f" ({parts})" if m.is_separable else ""),
    ]
    if isinstance(model, CausalWorldModel):
        past = data.frames - 1
        shape, text_length = latent_shape(codec, options), options.wan.text_length
        encode, denoise = frame_flops(model, shape, past, text_length)
        branches = 2 if r.guidance != "none" and r.guidance_scale != 1 else 1
        total = branches * (encode + r.steps * denoise)
        lines.append(
            f"  a frame      {total / 1e12:.3g} TFLOP after {past} others: once "
            f"{encode / 1e12:.3g}, in each of {r.steps} steps {denoise / 1e12:.3g}"
            + (", all twice for guidance" if branches == 2 else "")
        )
    accumulated = options.train.gradient_accumulation
    lines += [
        f"  a step       {accumulated * flops / 1e12:.4g} TFLOP a process, "
        f"{accumulated} x {options.train.batch_size} clips{shares}",
        f"  memory       {_memory(sharded, kept)}",
    ]
    return "\n".join(lines)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
            weak_teacher=None if d.weak_teacher is None else str(folder / "teacher"),
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
        kind = replace(teacher_options(options.model), layers=2)
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
