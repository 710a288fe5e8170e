"""Count what a step of post-training costs: of the student, and of the networks beside it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from scd.models.world_model import CausalWorldModel
from scd.options import ModelOptions, Options
from scd.training.build import AnyCodec, build_network, latent_shape
from scd.training.step_cost import StepEstimate, estimate_by_depth, frame_flops

WAN_LAYERS = 30  # of 1.3B, for a teacher


@dataclass(frozen=True)
class DistillationCost:
    """The costs of a step of one process, on `train.batch_size` clips.

    Attributes:
        tokens: of the clips that are scored, each counted once.
        student: FLOPs of its update: with a gradient, and by teacher and critic without one.
        student_every: steps from one such update to the next.
        rollout: FLOPs of generating the clips, in every step.
        critic: FLOPs of the critic's update, in every step.
        networks: parameters of each network beside the student.
        state_bytes: of the student, weights, gradients, Adam's moments and average; of the others
            what they have of these. In float32.
        activation_bytes: kept for the backward passes, and the rollout's key-value cache.
    """

    tokens: int
    student: float
    student_every: int
    rollout: float
    critic: float
    networks: dict[str, int]
    state_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> float:
        """Those of a step, on average."""
        return self.rollout + self.critic + self.student / self.student_every


def distillation_cost(
    options: Options,
    codec: AnyCodec,
    teacher: ModelOptions | None = None,
    counts_scores: bool = True,
) -> DistillationCost:
    """Count a step of `distill.method`, without an adversarial term and resampled histories.

    Args:
        teacher: its kind and sizes, which are a weak teacher's too; None: for consistency
            distillation the student's, otherwise `teacher_options`.
        counts_scores: see `estimate_step`.
    """
    d, o = options.distill, options
    frames = d.window_frames or o.data.frames
    o = replace(o, data=replace(o.data, frames=frames))
    if d.method == "dmd":  # a replay and a score have one noise a frame
        o = replace(o, flow=replace(o.flow, noise_draws=1))
    own = _count_parameters(o, codec)
    student = estimate_by_depth(o, codec, counts_scores)
    consistency = d.method == "consistency"
    kind = teacher or (o.model if consistency else teacher_options(o.model))
    of_teacher = replace(o, model=kind)
    score = student if kind == o.model else estimate_by_depth(of_teacher, codec, counts_scores)
    count = _count_parameters(of_teacher, codec)
    guided = 1 if d.guidance_scale == 1 else 2
    weak = {} if d.weak_teacher is None else {"weak teacher": count}
    if consistency:
        networks = {"teacher": count, "moving average": own, **weak}
        without = guided * _forward(of_teacher, score) + _forward(o, student)
        return DistillationCost(
            tokens=student.tokens,
            student=student.flops + without,
            student_every=1,
            rollout=0,
            critic=0,
            networks=networks,
            state_bytes=20 * own + 4 * sum(networks.values()),
            activation_bytes=student.activation_bytes,
        )
    generated, cached = _rollout(options, codec)
    return DistillationCost(
        tokens=student.tokens,
        student=student.flops + (guided + 1) * _forward(of_teacher, score),
        student_every=d.critic_updates,
        rollout=generated if d.self_rollout else _forward(o, student),
        critic=score.flops,
        networks={"teacher": count, "critic": count, **weak},
        # A critic has weights, gradients and moments, a teacher weights alone.
        state_bytes=20 * own + (16 + 4) * count + 4 * sum(weak.values()),
        activation_bytes=student.activation_bytes + score.activation_bytes + cached,
    )


def describe_networks(cost: DistillationCost) -> str:
    return ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in cost.networks.items())


def describe_shares(cost: DistillationCost, batches: int = 1) -> str:
    """Say what the FLOPs of a step of so many batches are; nothing where all steps are alike."""
    if not cost.critic:
        return ""
    parts = (cost.rollout, cost.critic, cost.student)
    rollout, critic, student = (batches * flops / 1e12 for flops in parts)
    return (
        f", on average: rollouts {rollout:.3g}, critic {critic:.3g}, in one of "
        f"{cost.student_every} steps the student {student:.3g}"
    )


def teacher_options(m: ModelOptions) -> ModelOptions:
    """Describe the bidirectional teacher that is assumed: as deep as a student, or Wan 1.3B."""
    layers = WAN_LAYERS if m.is_wan else m.encoder_layers + m.decoder_layers + m.layers
    kind: dict[str, Any] = {"type": "bidirectional_wan" if m.is_wan else "bidirectional_dit"}
    return replace(
        m, **kind, layers=layers, encoder_layers=0, decoder_layers=0, encoder_frame="shift"
    )


def _forward(options: Options, step: StepEstimate) -> float:
    """Take a forward pass out of a step: a backward pass is as much as two of them."""
    return step.flops / (4 if options.train.gradient_checkpointing else 3)


def _count_parameters(options: Options, codec: AnyCodec) -> int:
    with torch.device("meta"):
        return build_network(options, codec).num_parameters()


def _rollout(options: Options, codec: AnyCodec) -> tuple[float, int]:
    """Count the FLOPs of a step's rollouts, and the bytes of their key-value cache.

    With `distill.window_frames`, that is one to where the window begins, on average, and one in it.
    """
    with torch.device("meta"):
        model = build_network(options, codec)
    assert isinstance(model, CausalWorldModel)
    d, r, all_frames = options.distill, options.rollout, options.data.frames
    frames, shape = d.window_frames or all_frames, latent_shape(codec, options)
    known, clips = d.context_frames, options.train.batch_size
    per_frame = [
        frame_flops(model, shape, past, options.wan.text_length) for past in (1, all_frames - 1)
    ]

    def at(past: float) -> tuple[float, float]:
        """Interpolate: a frame's work grows by as much with each frame that it sees."""
        share = (min(past, r.window or past) - 1) / max(all_frames - 2, 1)
        (once, each), (last_once, last_each) = per_frame
        return once + share * (last_once - once), each + share * (last_each - each)

    def continuing(last: float) -> float:
        """Count the frames after the context up to `last`; half of the steps are taken on average.

        The newest given frame is encoded with the first new one.
        """
        given = max(known - 1, 0) * at(known / 2)[0]
        once, each = at((known + last - 1) / 2)
        return given + (last - known) * (once + (r.steps + 1) / 2 * each)

    starts = (all_frames - frames) // known if d.window_frames else 0
    further = sum(continuing(known + n * known) for n in range(1, starts + 1)) / (starts + 1)
    kept = min(all_frames, r.window or all_frames) * model.tokens_per_frame(*shape[1:])
    value = 4 if r.precision in ("fp32", "tf32") else 2
    cache = 2 * value * model.cached_layers * kept * model.width
    return clips * (further + continuing(frames)), clips * cache
