"""Work out what a training step and a frame of a rollout cost.

Costs are counted on tensors that have no memory: tokens, FLOPs, bytes.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from scd.models.world_model import CausalWorldModel, FirstLook, WorldModel
from scd.options import Options
from scd.rollout.cache import KVCache, Window
from scd.training.build import AnyCodec, build_network, latent_shape
from scd.utils.precision import DTYPES, resolve_precision


@dataclass
class StepEstimate:
    """The costs of a training step of one process, on `train.batch_size` clips."""

    parameters: dict[str, int]  # by part of the model
    tokens: int  # of the clips, each counted once
    flops: int  # forward and backward, matrix products and attention only
    state_bytes: int  # weights, gradients, Adam's moments and averages, in float32
    activation_bytes: int  # kept for the backward pass

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def estimate_step(options: Options, codec: AnyCodec, counts_scores: bool = True) -> StepEstimate:
    """Run one forward and backward pass at the options' true shapes, and count what it costs.

    Args:
        counts_scores: False: attention's scores of many queries by many keys do not count as kept,
            as with the kernels of GPUs.
    """
    with torch.device("meta"):
        model = build_network(options, codec)
    model.set_gradient_checkpointing(options.train.gradient_checkpointing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(options.train.mixed_precision, device)
    # Not diffusers' own `to`, whose warning does not matter here.
    nn.Module.to(model, DTYPES[precision])
    kept: dict[int, int] = {}  # storage -> bytes; a tensor is saved once for all that need it
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    widths = {size for p in model.parameters() for size in p.shape}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        many = tensor.ndim > 2 and min(tensor.shape[-2:]) > model.head_dim
        scores = many and tensor.shape[-1] not in widths  # queries by keys
        if storage._cdata not in parameters and (counts_scores or not scores):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**_inputs(model, options, codec)).square().mean()
        loss.backward()
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    total = sum(p.numel() for p in model.parameters())
    averages = len(options.optim.ema_sigma_rel) if options.train.snapshot_every else 0
    _, height, width = latent_shape(codec, options)
    frames = options.train.batch_size * options.data.frames
    return StepEstimate(
        parameters={name: size for name, size in sizes.items() if size},
        tokens=frames * model.tokens_per_frame(height, width),
        flops=counter.get_total_flops(),
        state_bytes=total * 4 * (5 + averages),
        activation_bytes=sum(kept.values()),
    )


def estimate_by_depth(
    options: Options, codec: AnyCodec, counts_scores: bool = True
) -> StepEstimate:
    """Estimate FLOPs and kept bytes as `estimate_step`, from models of one and two layers.

    Every further layer costs as much as the second. Parameters and state are those of one layer of
    each kind.
    """
    names = ("encoder_layers", "decoder_layers", "layers")
    depths = {name: depth for name in names if (depth := getattr(options.model, name))}

    def shallow(**layers: int) -> StepEstimate:
        sizes: dict[str, Any] = {**dict.fromkeys(depths, 1), **layers}
        model = replace(options.model, **sizes)
        wan = replace(options.wan, decoder_first=0)  # one layer costs as much as another
        return estimate_step(replace(options, model=model, wan=wan), codec, counts_scores)

    one = shallow()
    flops, kept = one.flops, one.activation_bytes
    for name, depth in depths.items():
        if depth > 1:
            two = shallow(**{name: 2})
            flops += (depth - 1) * (two.flops - one.flops)
            kept += (depth - 1) * (two.activation_bytes - one.activation_bytes)
    return replace(one, flops=flops, activation_bytes=kept)


class ClipCost(NamedTuple):
    """The cost of one clip in a training step."""

    tokens: int  # each counted once, however often it is noised
    flops: float  # as `StepEstimate`'s, without what gradient checkpointing computes a second time


def clip_cost(options: Options, codec: AnyCodec) -> ClipCost:
    """Count the tokens and FLOPs of the model itself, which MFU is based on.

    Attention counts the keys that a query may see. A frozen autoencoder and a history of the
    model's own frames (`flow.self_forcing_prob`) are left out.

    Few layers are counted (`estimate_by_depth`): all twelve of the dense baseline, on 300 frames,
    would delay a run's start by a minute.
    """
    train = replace(options.train, batch_size=1, gradient_checkpointing=False)
    found = estimate_by_depth(replace(options, train=train), codec)
    return ClipCost(found.tokens, found.flops)


@torch.no_grad()
def frame_flops(
    model: CausalWorldModel, shape: tuple[int, int, int], past: int, text_length: int = 0
) -> tuple[int, int]:
    """Count the work of a frame in a rollout, or of a chunk of frames.

    The modulation of all conditions and the keys of a text are there already.

    Args:
        model: on the meta device.
        shape: (C, h, w), of a frame's latents.
        past: frames before it, at least one (chunk).
        text_length: tokens of the text, for a model that has one.

    Returns:
        FLOPs that come once, and FLOPs that come in every denoising step.
    """
    chunk = model.chunk_frames
    chunks = past // chunk - 1 + model.start_slots  # held before the newest is encoded
    tokens = model.tokens_per_frame(*shape[1:]) * chunk
    with torch.device("meta"):
        cache = KVCache(model, 1, Window(chunks + 2), tokens)
        cache.frames = chunks
        frame = torch.empty(1, chunk, *shape)
        ids = torch.zeros(1, 1, dtype=torch.long)
        known = model.null_conditions((1, 1))[0] if model.has_vectors else ids[0]
        modulation = model.precompute_modulation(known, torch.empty(1))
        if model.has_text:
            text = torch.empty(1, text_length, model.config.text_dim)
            cache.text = model.precompute_text(text)
        with FlopCounterMode(display=False) as once:
            denoiser = model.begin_frame(frame, ids, ids, cache, modulation, noise=frame)
        with FlopCounterMode(display=False) as each:
            denoiser(frame, 0)
    return once.get_total_flops(), each.get_total_flops()


def _inputs(model: WorldModel, options: Options, codec: AnyCodec) -> dict[str, Any]:
    b, f, k = options.train.batch_size, options.data.frames, options.flow.noise_draws
    shape = latent_shape(codec, options)
    # Distribution matching scores what was generated after the context.
    given = options.distill.context_frames if options.distill.method == "dmd" else 0
    predicted = f - max(given, model.first_predicted)
    with torch.device("meta"):
        latents = torch.empty(b, f, *shape)
        noisy = torch.empty(b, k, predicted, *shape)
        timesteps = torch.empty(b, k, predicted)
        conditions = model.null_conditions((b, f))
        tokens = model.tokens_per_frame(*shape[1:])
        text = torch.empty(b, options.wan.text_length, options.wan.text_dim)
        encoded = predicted if model.takes_first_look else f - model.first_predicted
        perturbation = torch.empty(b, encoded, tokens, model.width, dtype=model.dtype)
    return {
        "latents": latents,
        "noisy": noisy,
        "timesteps": timesteps,
        "conditions": conditions if options.model.condition != "none" else None,
        "perturbation": perturbation if model.has_context else None,
        "first_look": FirstLook(noisy[:, 0], timesteps[:, 0]) if model.takes_first_look else None,
        "text": text if model.has_text else None,
    }
