"""What a training step of a world model takes, worked out on tensors that have no memory."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from scd.models.autoencoder import Codec
from scd.models.load import build_world_model
from scd.models.world_model import WorldModel
from scd.options import Options
from scd.utils.precision import DTYPES, resolve_precision


@dataclass
class StepEstimate:
    """Of one process: sizes of a step of `train.batch_size` clips."""

    parameters: dict[str, int]  # of each part
    tokens: int  # of the clips, each once
    flops: int  # forward and backward, matrix products and attention only
    state_bytes: int  # weights, gradients, Adam's moments and averages, in float32
    activation_bytes: int  # kept for the backward pass

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def estimate_step(options: Options, codec: Codec) -> StepEstimate:
    """Count one forward and backward pass at the options' true shapes."""
    with torch.device("meta"):
        model = build_world_model(options, codec)
    model.set_gradient_checkpointing(options.train.gradient_checkpointing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(options.train.mixed_precision, device)
    # Past diffusers' own `to`, which warns of what does not matter here.
    nn.Module.to(model, DTYPES[precision])
    kept: dict[int, int] = {}  # storage -> bytes; a tensor is saved once for all that need it
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
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
    side = options.data.frame_size // codec.downsampling
    return StepEstimate(
        parameters={name: size for name, size in sizes.items() if size},
        tokens=options.train.batch_size * options.data.frames * model.tokens_per_frame(side, side),
        flops=counter.get_total_flops(),
        state_bytes=total * 4 * (5 + averages),
        activation_bytes=sum(kept.values()),
    )


class ClipCost(NamedTuple):
    """Of one clip in a training step."""

    tokens: int  # each once, however often it is noised
    flops: int  # see `StepEstimate`, without what gradient checkpointing computes a second time


def clip_cost(options: Options, codec: Codec) -> ClipCost:
    """Count what the model itself asks for, by which training speed is judged.

    Attention counts for the keys that a query may see. A frozen autoencoder and a history of the
    model's own frames (`flow.self_forcing_prob`) are left out.

    Every further layer costs as much as the second: counting all twelve of the dense baseline, on
    300 frames, would keep a run from starting for a minute.
    """
    train = replace(options.train, batch_size=1, gradient_checkpointing=False)
    names = ("encoder_layers", "decoder_layers", "layers")
    depths = {name: depth for name in names if (depth := getattr(options.model, name))}

    def count(**layers: int) -> StepEstimate:
        shallow: dict[str, Any] = {**dict.fromkeys(depths, 1), **layers}
        model = replace(options.model, **shallow)
        return estimate_step(replace(options, model=model, train=train), codec)

    one = count()
    further = {name: count(**{name: 2}).flops - one.flops for name in depths if depths[name] > 1}
    flops = one.flops + sum((depths[name] - 1) * more for name, more in further.items())
    return ClipCost(one.tokens, flops)


def counterpart(options: Options) -> Options:
    """The other kind of model with the same width and number of layers, for comparison."""
    m = options.model
    if m.type == "scd":
        layers = m.encoder_layers + m.decoder_layers
        other = replace(m, type="causal_dit", layers=layers, encoder_layers=0, decoder_layers=0)
    else:
        decoder = max(m.layers // 3, 1)  # the paper's share: 4 of 12
        other = replace(
            m, type="scd", layers=0, encoder_layers=m.layers - decoder, decoder_layers=decoder
        )
    return replace(options, model=other)


def _inputs(model: WorldModel, options: Options, codec: Codec) -> dict[str, Tensor | None]:
    b, f, k = options.train.batch_size, options.data.frames, options.flow.noise_draws
    size = options.data.frame_size // codec.downsampling
    predicted = f - model.first_predicted
    with torch.device("meta"):
        latents = torch.empty(b, f, codec.channels, size, size)
        noisy = torch.empty(b, k, predicted, codec.channels, size, size)
        timesteps = torch.empty(b, k, predicted)
        conditions = model.null_conditions((b, f))
        tokens = model.tokens_per_frame(size, size)
        perturbation = torch.empty(b, predicted, tokens, model.width, dtype=model.dtype)
    return {
        "latents": latents,
        "noisy": noisy,
        "timesteps": timesteps,
        "conditions": conditions if options.model.condition != "none" else None,
        "perturbation": perturbation if model.has_context else None,
    }
