"""Which options models of Wan's blocks can have, and which no others can; see `rules.py`."""

from collections.abc import Callable
from typing import get_args

from scd.options.schema import Options, WanEncoderFrame, WanFusion, WanOptions

Rule = tuple[Callable[[Options], bool], str]
"""A predicate that must hold, and what to say otherwise, with options in braces."""

NO_WAN: list[Rule] = [
    (
        lambda o: o.wan == WanOptions(),
        "wan: model.type={model.type} is no Wan, and has none of these options",
    ),
    (
        lambda o: o.data.source != "prompts",
        "data.source=prompts: only a Wan makes videos of prompts",
    ),
    (
        lambda o: o.data.frame_width is None,
        "data.frame_width={data.frame_width}: the frames of a {model.type} are squares",
    ),
]

WAN: list[Rule] = [
    (
        lambda o: o.data.source != "video",
        "data.source=video: a Wan is trained on latents (./scripts/encode.sh) or on prompts",
    ),
    (
        lambda o: o.autoencoder.path is not None,
        "model.type={model.type} needs autoencoder.path, Wan's autoencoder",
    ),
    (
        lambda o: o.model.condition in ("none", "action"),
        "model.condition={model.condition}: a Wan has a text, and at most one action a frame",
    ),
    (
        lambda o: o.flow.prediction == "velocity",
        "flow.prediction={flow.prediction}: Wan predicts velocities",
    ),
    (
        lambda o: o.model.encoder_frame in get_args(WanEncoderFrame),
        "model.encoder_frame={model.encoder_frame}: an scd_wan's noise makes one pass already, so "
        "write noise",
    ),
    (
        lambda o: not o.model.is_separable or o.model.fusion in get_args(WanFusion),
        "model.fusion={model.fusion}: an scd_wan has " + " or ".join(get_args(WanFusion)),
    ),
    (
        lambda o: not o.model.is_separable or o.wan.decoder_first < o.model.decoder_layers,
        "wan.decoder_first={wan.decoder_first} leaves none of model.decoder_layers="
        "{model.decoder_layers} from Wan's end",
    ),
    (
        lambda o: o.model.is_separable or o.model.first_frame,
        "model.first_frame=false: a {model.type} always learns frame 0",
    ),
    (
        lambda o: o.wan.chunk_frames == 1 or o.model.type == "causal_wan",
        "wan.chunk_frames={wan.chunk_frames}: only a causal_wan has chunks",
    ),
    (
        lambda o: o.data.frames % o.wan.chunk_frames == 0,
        "data.frames={data.frames} are no whole chunks of wan.chunk_frames={wan.chunk_frames}",
    ),
    (
        lambda o: o.wan.chunk_frames == 1 or o.flow.self_forcing_prob == 0,
        "wan.chunk_frames={wan.chunk_frames} with flow.self_forcing_prob={flow.self_forcing_prob}, "
        "which makes single frames anew",
    ),
    (
        lambda o: o.wan.chunk_frames == 1 or o.distill.method != "dmd",
        "wan.chunk_frames={wan.chunk_frames} with distill.method=dmd, which leaves the denoising "
        "of every frame by itself",
    ),
    (
        lambda o: o.data.frame_stride == 1,
        "data.frame_stride={data.frame_stride}: a latent of a Wan is of neighbouring pictures",
    ),
    (
        lambda o: o.optim.muon_lr is None,
        "optim.muon_lr={optim.muon_lr}: a Wan is trained by AdamW alone",
    ),
    (
        lambda o: o.train.snapshot_every == 0,
        "train.snapshot_every={train.snapshot_every}: `scd ema` cannot read a Wan",
    ),
    (
        lambda o: (
            not (
                o.data.source == "prompts"
                and (
                    o.distill.method != "dmd"
                    or o.distill.context_frames > 0
                    or o.distill.adversarial_weight > 0
                    or not o.distill.self_rollout
                )
            )
        ),
        "data.source=prompts has no videos: only distill.method=dmd learns without any, with "
        "distill.self_rollout=true, distill.context_frames=0 and distill.adversarial_weight=0",
    ),
    (
        lambda o: (
            not o.train.sample_every or (o.model.first_frame and not o.model.is_bidirectional)
        ),
        "train.sample_every={train.sample_every}: only causal Wans with model.first_frame=true "
        "make samples while they are trained",
    ),
    (
        lambda o: o.train.val_loss_every == 0 or o.data.source == "latents",
        "train.val_loss_every={train.val_loss_every} needs videos, and data.source="
        "{data.source} has none",
    ),
    (
        lambda o: not (o.data.source == "prompts" and o.model.has_actions),
        "data.source=prompts has no actions, but model.condition={model.condition}",
    ),
]
