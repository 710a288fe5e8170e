"""Distribution matching distillation (DMD) on a student's own rollouts.

The student generates clips, each frame after its own earlier ones, exactly as in use. A frozen
teacher (the real score) and a critic that is trained on those clips (the fake score) denoise them;
the difference of their clean frames says how to change the clips so that the critic's distribution
becomes the teacher's (arXiv 2405.14867; on self-generated video, arXiv 2506.08009).

Bidirectional scores denoise the generated frames of a clip together. Causal ones (as in LongLive 2,
arXiv 2605.18739) denoise each after the clean generated ones before it, under the teacher-forcing
mask: the teacher can then be the model that the student was made from.

The rollout has no gradient. It records the noisy input of every frame at the denoising step where
it stopped; one parallel pass of the student over the finished clip, which is its ordinary training
forward, gives the same frames with a gradient, also through the generated history (arXiv
2607.20368). In an SCD, writing the history and denoising have parameters of their own.

Rollouts that are longer than what a teacher scores are matched window by window: a window begins
somewhere in the student's own rollout, and its given frames are own ones (streaming long tuning,
arXiv 2509.22622). So the student learns to go on from what it makes of a video after a while.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scd.distill.critic import Critic, early_features, input_gradient, relativistic_loss
from scd.distill.teacher import clean_frames, guided_velocity
from scd.errors import ScdError
from scd.flow.sampler import noise_levels
from scd.models.world_model import MAX_TIMESTEP, CausalWorldModel, FirstLook, WorldModel
from scd.options import Options, RolloutOptions
from scd.rollout import Rollout
from scd.utils.precision import without_autocast
from scd.utils.seeding import generator, normal_per_sample, uniform_per_sample
from scd.utils.sharding import unsharded

# Noise levels at which a discriminator looks. Above them, clips of a mean and real ones are alike.
DISCRIMINATOR_RANGE = (0.02, 0.5)


class Generated(NamedTuple):
    """What a student generated after its context, and what every frame was made from."""

    frames: Tensor  # (B, F', C, H, W)
    history: Tensor  # (B, K + F', C, H, W): the clip whose earlier frames each frame saw
    noisy: Tensor  # (B, F', C, H, W): the last noisy input
    timesteps: Tensor  # (B, F')
    first_look: FirstLook | None = None  # what the student's encoder saw of them, if it does


class Score(NamedTuple):
    """A noise level for each clip, and noise: what clips are scored at, or the critic learns at."""

    sigma: Tensor  # (B,)
    noise: Tensor  # (B, F', C, H, W)

    def add_to(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Noise frames (B, F', C, H, W); return them and their timesteps, with one draw (K = 1)."""
        sigma = self.sigma[:, None, None, None, None]
        noisy = sigma * self.noise + (1 - sigma) * frames
        times = (MAX_TIMESTEP * self.sigma)[:, None].expand(frames.shape[:2])
        return noisy[:, None], times[:, None]


@torch.no_grad()
def roll_out(
    model: CausalWorldModel,
    settings: RolloutOptions,
    context: Tensor,
    new_frames: int,
    exit_at: float,
    actions: Tensor | None,
    labels: Tensor | None,
    generators: list[torch.Generator],
    text: Tensor | None = None,
) -> Generated:
    """Continue videos as in use, but leave every frame's denoising after one of its steps.

    Args:
        settings: of the student's rollouts, with the consistency solver.
        context: (B, K, C, H, W).
        exit_at: the step, as a share of the frame's steps in [0, 1): the first new frame may have
            more steps than the others.
        actions: (B, K + new_frames) or (B, K + new_frames, V).
        labels: (B,).
        generators: one for each sample.
        text: (B, T, text_dim), for a student that `has_text`.
    """
    known = context.shape[1]
    with without_autocast(context.device), unsharded(model):
        rollout = Rollout(model, settings, known + new_frames)
        past = None if actions is None else actions[:, :known]
        rollout.reset(context, past, labels, generators, text)
        frames, noisy, levels, looks = [], [], [], []
        for frame in range(known, known + new_frames):
            action = None if actions is None else actions[:, frame]
            steps = settings.steps
            if frame == known and settings.first_frame_steps:
                steps = settings.first_frame_steps
            frames.append(rollout.step(action, exit_step=int(exit_at * steps)))
            noisy.append(rollout.exit_input)
            levels.append(rollout.exit_level)
            if model.takes_first_look:
                looks.append(rollout.first_look)
    generated = torch.stack(frames, dim=1)
    timesteps = MAX_TIMESTEP * torch.tensor(levels, device=context.device)
    return Generated(
        generated,
        torch.cat([context, generated], dim=1),
        torch.stack(noisy, dim=1),
        timesteps.expand(len(context), -1),
        FirstLook.pure(torch.stack(looks, dim=1)) if looks else None,
    )


@torch.no_grad()
def teacher_forced(
    model: CausalWorldModel,
    settings: RolloutOptions,
    clip: Tensor,
    known: int,
    exit_at: float,
    conditions: Tensor | None,
    generators: list[torch.Generator],
    text: Tensor | None = None,
) -> Generated:
    """Generate every frame after `known` from real ones: its history, and itself under noise.

    The arguments are those of `roll_out`, with whole clips (B, K + F', C, H, W).
    """
    real = clip[:, known:]
    levels = noise_levels(settings.steps, settings.spacing, settings.shift)
    level = levels[int(exit_at * settings.steps)]
    noise, look = (
        torch.stack([torch.randn(real.shape[1:], generator=g) for g in generators]).to(real)
        for _ in range(2)
    )
    noisy = level * settings.temperature * noise + (1 - level) * real
    times = torch.full(real.shape[:2], MAX_TIMESTEP * level, device=real.device)
    first_look = FirstLook.pure(look) if model.takes_first_look else None
    generated = Generated(real, clip, noisy, times, first_look)
    generated = generated._replace(frames=replay(model, generated, conditions, text=text))
    torch.clear_autocast_cache()  # see `ConsistencyObjective.loss`
    return generated


def replay(
    model: CausalWorldModel,
    generated: Generated,
    conditions: Tensor | None,
    history_gradient: bool = True,
    text: Tensor | None = None,
) -> Tensor:
    """Compute generated frames (B, F', C, H, W) once more, in parallel and with gradient.

    Args:
        conditions, text: of the whole clip.
        history_gradient: see `WorldModel.forward`.
    """
    noisy, times = generated.noisy[:, None], generated.timesteps[:, None]
    velocity = model(
        generated.history,
        noisy,
        times,
        conditions,
        history_gradient=history_gradient,
        first_look=generated.first_look,
        text=text,
    )  # (B, 1, F', C, H, W)
    return clean_frames(noisy, velocity, times)[:, 0]  # (B, F', C, H, W)


def matching_gradient(frames: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Compute the gradient (x̂_fake − x̂_real) / mean|x − x̂_real| of the distribution's distance.

    All are (B, F', C, H, W); the mean is over a sample. What is not finite counts as no gradient.
    """
    scale = (frames - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return ((fake - real) / scale).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def loss_with_gradient(frames: Tensor, gradient: Tensor) -> Tensor:
    """Compute ½·mean‖x − sg(x − g)‖², whose gradient at x is g over the number of values."""
    return 0.5 * (frames - (frames - gradient).detach()).square().mean()


class DMDObjective(nn.Module):
    """The losses of a student and of its critic on fresh clips of it, for the training loop.

    The clips are own rollouts, or, without `distill.self_rollout`, generated by teacher forcing.
    The student's loss comes in every `distill.critic_updates`-th step, the critic's in all. They
    share no parameter, so one backward pass serves both.
    """

    def __init__(
        self,
        model: CausalWorldModel,
        teacher: WorldModel,
        critic: Critic,
        options: Options,
        weak_teacher: WorldModel | None = None,
    ):
        super().__init__()
        if options.rollout.compile:
            raise ScdError(
                "rollout.compile with distill.method=dmd: its rollouts leave the denoising after "
                "any step, and a graph has no such exit; set rollout.compile=false for the training"
            )
        self.model = model
        self.teacher = teacher
        self.weak_teacher = weak_teacher
        self.critic = critic
        self.options = options

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute both losses of clips as `with_scaled_latents` gives them.

        Args:
            batch: see `FlowObjective.forward`, and `step`, the number of the training step.
        """
        options, d = self.options, self.options.distill
        samples, step = [int(number) for number in batch["sample"]], int(batch["step"])
        exit_at = draw_exit(options.seed, step)
        generators = [generator("cpu", options.seed, "rollout", sample) for sample in samples]
        batch = self.window(batch, draw_start(options, step), exit_at, generators)
        latents, known = batch["latents"], d.context_frames
        context = latents[:, :known]
        actions, labels, text = (batch.get(key) for key in ("actions", "label", "text"))
        conditions = self.model.frame_conditions(latents.shape[:2], actions, labels)
        if d.self_rollout:
            generated = roll_out(
                self.model,
                options.rollout,
                context,
                latents.shape[1] - known,
                exit_at,
                actions,
                labels,
                generators,
                text,
            )
        else:
            generated = teacher_forced(
                self.model, options.rollout, latents, known, exit_at, conditions, generators, text
            )
        loss, values = self.critic_loss(
            context, generated.frames, conditions, self._draw("critic", batch), text
        )
        real_logits = None
        if d.adversarial_weight:
            look = self._draw_look(batch)
            real_logits, fake_logits = (
                self.logits(context, frames, conditions, look, text)
                for frames in (latents[:, known:], generated.frames)
            )
            discriminator = relativistic_loss(real_logits, fake_logits)
            values["discriminator_loss"] = discriminator.detach()
            loss = loss + discriminator
        if trains_student(options, step):
            frames = replay(self.model, generated, conditions, d.history_gradient, text)
            score = self._draw("score", batch)
            gradient = torch.zeros_like(frames)
            if d.matching_weight:
                null_text = batch.get("null_text")
                matching = self.gradient(
                    context, frames.detach(), conditions, score, text, null_text
                )
                values["dmd_gradient"] = matching.abs().mean()
                gradient = gradient + d.matching_weight * matching
            if real_logits is not None:
                adversarial = self.adversarial_gradient(
                    context, frames.detach(), conditions, look, real_logits, text
                )
                values["adversarial_gradient"] = adversarial.abs().mean()
                gradient = gradient + d.adversarial_weight * adversarial
            loss = loss + loss_with_gradient(frames, gradient)
            values["replay_error"] = (frames.detach() - generated.frames).abs().max()
        return {"loss": loss, **values}

    def window(
        self,
        batch: dict[str, Tensor],
        start: int,
        exit_at: float,
        generators: list[torch.Generator],
    ) -> dict[str, Tensor]:
        """Cut the window of `distill.window_frames` frames out of clips that begins at `start`.

        Further into a clip, the window's given frames are own ones, continued as in use from the
        clip's first frames to there.
        """
        frames, known = self.options.distill.window_frames, self.options.distill.context_frames
        if frames is None:
            return batch
        latents, actions = batch["latents"], batch.get("actions")
        given = latents[:, :known]
        if start:
            past = None if actions is None else actions[:, : known + start]
            own = roll_out(
                self.model,
                self.options.rollout,
                given,
                start,
                exit_at,
                past,
                batch.get("label"),
                generators,
                batch.get("text"),
            )
            given = own.history[:, start:]
        cut = {"latents": torch.cat([given, latents[:, start + known : start + frames]], dim=1)}
        if actions is not None:
            cut["actions"] = actions[:, start : start + frames]
        return {**batch, **cut}

    @torch.no_grad()
    def gradient(
        self,
        context: Tensor,
        frames: Tensor,
        conditions: Tensor | None,
        score: Score,
        text: Tensor | None = None,
        null_text: Tensor | None = None,
    ) -> Tensor:
        """Score generated frames (B, F', C, H, W) after their context; see `matching_gradient`.

        Args:
            text, null_text: see `guided_velocity`.
        """
        clip = torch.cat([context, frames], dim=1)
        noisy, times = score.add_to(frames)
        scale = self.options.distill.guidance_scale
        texts = text, null_text
        v_real = guided_velocity(
            self.teacher, clip, noisy, times, conditions, scale, None, *texts, self.weak_teacher
        )
        v_fake = self.critic.score(clip, noisy, times, conditions, text=text)
        real, fake = (clean_frames(noisy, v, times)[:, 0] for v in (v_real, v_fake))
        torch.clear_autocast_cache()  # see `ConsistencyObjective.loss`
        return matching_gradient(frames, real, fake)

    def adversarial_gradient(
        self,
        context: Tensor,
        frames: Tensor,
        conditions: Tensor | None,
        look: Score,
        real_logits: Tensor,
        text: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient of the generator's loss at generated frames (B, F', C, H, W).

        Args:
            real_logits: (B,), of the real clips with the same context.
        """
        frames = frames.requires_grad_(True)
        clip = torch.cat([context, frames.detach()], dim=1)
        features = early_features(self.teacher, clip, *look.add_to(frames), conditions, text)
        own_logits = self.critic.judge(features)
        return input_gradient(relativistic_loss(own_logits, real_logits.detach()), frames)

    def logits(
        self,
        context: Tensor,
        frames: Tensor,
        conditions: Tensor | None,
        look: Score,
        text: Tensor | None = None,
    ) -> Tensor:
        """Judge frames (B, F', C, H, W) after their context: logits (B,), see `Critic.judge`."""
        with torch.no_grad():
            clip = torch.cat([context, frames], dim=1)
            features = early_features(self.teacher, clip, *look.add_to(frames), conditions, text)
        torch.clear_autocast_cache()  # see `ConsistencyObjective.loss`
        return self.critic.judge(features)

    def critic_loss(
        self,
        context: Tensor,
        frames: Tensor,
        conditions: Tensor | None,
        score: Score,
        text: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the critic's flow-matching loss on generated frames (B, F', C, H, W).

        Returns:
            The loss, and what to log.
        """
        clip = torch.cat([context, frames], dim=1)
        noisy, times = score.add_to(frames)
        velocity = self.critic.score(clip, noisy, times, conditions, text=text)[:, 0]
        model = self.critic.score
        if model.prediction == "velocity":
            target = score.noise - frames
        else:  # with the same bound as the model divides by
            sigma = score.sigma.clamp(min=model.sigma_min)[:, None, None, None, None]
            target = (noisy[:, 0] - frames) / sigma
        loss = (velocity - target).square().mean()
        return loss, {"critic_loss": loss.detach()}

    def _draw(self, stream: str, batch: dict[str, Tensor]) -> Score:
        """Draw noise levels, uniform before their shift, and noise, sample by sample."""
        d = self.options.distill
        uniform, noise = self._draw_uniform(stream, batch)
        sigma = d.shift * uniform / (1 + (d.shift - 1) * uniform)
        return Score(sigma.clamp(*d.score_range), noise)

    def _draw_look(self, batch: dict[str, Tensor]) -> Score:
        """Draw noise levels at which the discriminator looks, uniform, and noise."""
        uniform, noise = self._draw_uniform("discriminator", batch)
        lowest, highest = DISCRIMINATOR_RANGE
        return Score(lowest + (highest - lowest) * uniform, noise)

    def _draw_uniform(self, stream: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Draw uniform numbers (B,) and noise (B, F', C, H, W), sample by sample."""
        seed, latents = self.options.seed, batch["latents"]
        samples = [int(number) for number in batch["sample"]]
        uniform = uniform_per_sample((), samples, latents.device, seed, f"{stream} level")
        shape = (latents.shape[1] - self.options.distill.context_frames, *latents.shape[2:])
        return uniform, normal_per_sample(shape, samples, latents.device, seed, f"{stream} noise")


def trains_student(options: Options, step: int) -> bool:
    """Whether the student is updated in a step, from 1: in the last of every few of the critic."""
    return step % options.distill.critic_updates == 0


def draw_start(options: Options, step: int) -> int:
    """Draw where the windows of all clips begin: a multiple of the number of their given frames."""
    d = options.distill
    if d.window_frames is None:
        return 0
    starts = (options.data.frames - d.window_frames) // d.context_frames + 1
    drawn = torch.randint(starts, (), generator=generator("cpu", options.seed, "window", step))
    return d.context_frames * int(drawn)


def draw_exit(seed: int, step: int) -> float:
    """Draw where all frames on all processes leave their denoising, see `roll_out`."""
    return float(torch.rand((), generator=generator("cpu", seed, "exit", step)))
