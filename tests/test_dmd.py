"""Distribution matching on own rollouts: replay, gradients, cadence, exits, resuming, processes."""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scd.distill.critic import Critic, early_features, relativistic_loss
from scd.distill.dmd import (
    DMDObjective,
    Given,
    Noising,
    draw_exit,
    draw_start,
    loss_with_gradient,
    matching_gradient,
    trains_student,
)
from scd.distill.self_rollout import Generated, replay, roll_out, teacher_forced
from scd.errors import ScdError
from scd.models import SCD, BidirectionalDiT, CausalDiT, CausalWorldModel
from scd.models.world_model import FirstLook
from scd.options import Options, RolloutOptions, load_training_options
from scd.rollout import continue_videos
from scd.training.checkpoint import load_checkpoint
from scd.training.launch import run_experiment
from scd.training.resume import refuse_other_run, run_identity
from scd.training.run_log import read_log
from scd.utils.seeding import generator as seeded
from scd.utils.seeding import uniform_per_sample
from tests.test_training import assert_same_state

KNOWN, NEW = 3, 4
SIZES = {"channels": 3, "patch_size": 2, "heads": 1, "num_conditions": 4}
SETTINGS = RolloutOptions(
    steps=3, solver="consistency", spacing="even", shift=2.0, guidance="none", guidance_scale=1.0
)


def make(
    kind: str, prediction: str = "data", seed: int = 1, layers: int = 2, condition: str = "action"
) -> CausalWorldModel:
    torch.manual_seed(seed)
    frames = {"scd": "shift", "scd noise": "noise", "scd joint": "joint"}
    how = {**SIZES, "prediction": prediction, "condition": condition}
    if kind in frames:
        parts = {"encoder_layers": layers, "decoder_layers": 1, "encoder_frame": frames[kind]}
        model = SCD(**how, **parts)
    else:
        types = {"causal": CausalDiT, "bidirectional": BidirectionalDiT}
        model = types[kind](**how, layers=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_clip() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, KNOWN + NEW, 3, 4, 4, generator=generator)
    return latents, torch.randint(0, 4, (2, KNOWN + NEW), generator=generator)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in (7, 8)]


def rolled_out(model: CausalWorldModel, exit_step: int) -> tuple[Generated, Tensor]:
    latents, actions = make_clip()
    context = latents[:, :KNOWN]
    exit_at = (exit_step + 0.5) / SETTINGS.steps
    rollout = roll_out(model, SETTINGS, context, NEW, exit_at, actions, None, generators())
    return rollout, actions


# --- Rollout and replay


@pytest.mark.parametrize("kind", ["scd", "scd noise", "causal"])
def test_teacher_forced_clips_come_from_real_frames(kind: str) -> None:
    """Each is the model's clean frame of the real one under noise, after the real ones before."""
    model, (clip, actions) = make(kind), make_clip()
    settings = replace(SETTINGS, steps=2, temperature=0.5)
    made = teacher_forced(model, settings, clip, KNOWN, 0.5, actions, generators())
    level = 2 / 3  # 1/2, shifted by 2
    assert made.timesteps.unique().tolist() == pytest.approx([1000 * level])
    noise = 0.5 * torch.stack([torch.randn(NEW, 3, 4, 4, generator=g) for g in generators()])
    torch.testing.assert_close(made.noisy, level * noise + (1 - level) * clip[:, KNOWN:])
    changed = clip.clone()
    changed[:, KNOWN] += 1  # the first new frame: seen by those after it, and by itself as noise
    other = teacher_forced(model, settings, changed, KNOWN, 0.5, actions, generators())
    moved = (other.frames - made.frames).abs().amax(dim=(0, 2, 3, 4))
    assert (moved > 1e-3).all()
    last = clip.clone()
    last[:, -1] += 1
    other = teacher_forced(model, settings, last, KNOWN, 0.5, actions, generators())
    torch.testing.assert_close(other.frames[:, :-1], made.frames[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(replay(model, made, actions), made.frames, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exit_step", range(SETTINGS.steps))
@pytest.mark.parametrize("prediction", ["data", "velocity"])
@pytest.mark.parametrize("kind", ["scd", "scd noise", "scd joint", "causal"])
def test_a_replay_equals_its_rollout(kind: str, prediction: str, exit_step: int) -> None:
    model = make(kind, prediction)
    rollout, actions = rolled_out(model, exit_step)
    assert rollout.frames.shape == rollout.noisy.shape == (2, NEW, 3, 4, 4)
    levels = [1.0, 0.8, 0.5]  # 1, 2/3, 1/3 shifted by 2
    assert rollout.timesteps.flatten().tolist() == pytest.approx([1000 * levels[exit_step]] * 8)
    frames = replay(model, rollout, actions)
    torch.testing.assert_close(frames, rollout.frames, rtol=1e-4, atol=1e-4)


def test_a_rollout_that_leaves_at_the_last_step_is_the_one_of_use() -> None:
    model = make("scd")
    rollout, actions = rolled_out(model, SETTINGS.steps - 1)
    context = rollout.history[:, :KNOWN]
    used = continue_videos(model, SETTINGS, context, NEW, actions, generator=generators())
    torch.testing.assert_close(used, rollout.frames, rtol=0, atol=0)


def test_a_first_frame_with_more_steps_is_replayed_from_its_own_exit() -> None:
    model, (latents, actions) = make("scd"), make_clip()
    settings, context = replace(SETTINGS, first_frame_steps=6), latents[:, :KNOWN]
    rollout = roll_out(model, settings, context, NEW, 0.9, actions, None, generators())
    levels = [2 / 7, 0.5, 0.5, 0.5]  # 1/6 and 1/3, shifted by 2: the last step of either list
    assert rollout.timesteps[0].tolist() == pytest.approx([1000 * level for level in levels])
    frames = replay(model, rollout, actions)
    torch.testing.assert_close(frames, rollout.frames, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["scd", "scd noise", "scd joint"])
def test_a_window_that_shows_every_frame_changes_nothing(kind: str) -> None:
    """The smallest that the options allow."""
    model, (latents, actions) = make(kind), make_clip()
    context, rollouts = latents[:, :KNOWN], []
    for window in (0, KNOWN + NEW - 1):
        settings = replace(SETTINGS, window=window)
        rollouts.append(roll_out(model, settings, context, NEW, 0.5, actions, None, generators()))
    torch.testing.assert_close(rollouts[0].frames, rollouts[1].frames, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        replay(model, rollouts[1], actions), rollouts[1].frames, rtol=1e-4, atol=1e-4
    )


def test_a_rollout_records_what_the_encoder_saw() -> None:
    """Pure noise, drawn after that of each frame's steps; under other noise the replay is other."""
    model = make("scd noise")
    rollout, actions = rolled_out(model, 1)
    drawn = []
    for each in generators():
        looks = []
        for _ in range(NEW):
            torch.randn(3, 4, 4, generator=each)
            torch.randn(SETTINGS.steps - 1, 3, 4, 4, generator=each)
            looks.append(torch.randn(3, 4, 4, generator=each))
        drawn.append(torch.stack(looks))
    assert rollout.first_look is not None
    assert torch.equal(rollout.first_look.noisy, torch.stack(drawn))
    assert rollout.first_look.timesteps.unique().tolist() == [1000]
    other = rollout._replace(first_look=FirstLook.pure(rollout.first_look.noisy.flip(1)))
    moved = replay(model, other, actions) - rollout.frames
    assert (moved.abs().amax(dim=(2, 3, 4)) > 1e-2).all()
    assert rolled_out(make("scd"), 1)[0].first_look is None


@pytest.mark.parametrize("kind", ["scd", "scd noise"])
def test_the_last_frame_teaches_how_history_is_written(kind: str) -> None:
    model = make(kind)
    rollout, actions = rolled_out(model, 1)
    replay(model, rollout, actions)[:, -1].sum().backward()
    written = model.encoder.blocks[0].attention.qkv.weight.grad
    assert written is not None and written.abs().max() > 1e-4
    assert not rollout.frames.requires_grad and not rollout.noisy.requires_grad


@pytest.mark.parametrize("kind", ["scd", "scd noise", "causal"])
def test_without_history_gradient_a_frame_teaches_only_its_own_passes(kind: str) -> None:
    model = make(kind)
    rollout, actions = rolled_out(model, 1)
    frames = [replay(model, rollout, actions, on) for on in (True, False)]
    torch.testing.assert_close(frames[1], frames[0], rtol=1e-5, atol=1e-5)
    # The history as an input: which frames does the last one have a gradient to?
    embedded = model.embed if kind == "causal" else model.encoder.embed
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    embedded.register_forward_hook(watch)
    reached = []
    for on in (True, False):
        seen.clear()
        replay(model, rollout, actions, on)[:, -1].sum().backward()
        gradient = seen[0].grad
        assert gradient is not None
        reached.append((gradient.abs().amax(dim=(0, 2, 3)) > 0).tolist())
    clean = KNOWN + NEW - 1
    if kind == "scd":  # the own pass is that over frame i - 1, else over i noisy
        assert reached[0] == [True] * clean
        assert reached[1] == [False] * (clean - 1) + [True]
    else:  # clean frames come first in one sequence with noisy ones
        assert reached[0][:clean] == [True] * clean
        assert not any(reached[1][:clean])
        assert reached[1][clean:] == [False] * (NEW - 1) + [True]


# --- Gradients


def test_the_gradient_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    frames, real, fake = torch.randn(3, 2, NEW, 3, 4, 4, generator=generator)
    frames.requires_grad_(True)
    gradient = matching_gradient(frames.detach(), real, fake)
    for sample in range(2):
        scale = (frames[sample] - real[sample]).abs().mean()
        expected = (fake[sample] - real[sample]) / scale
        torch.testing.assert_close(gradient[sample], expected)
    loss_with_gradient(frames, gradient).backward()
    torch.testing.assert_close(frames.grad, gradient / gradient.numel(), rtol=1e-5, atol=1e-8)


def test_what_is_not_finite_is_no_gradient() -> None:
    same = torch.ones(1, NEW, 3, 4, 4)
    assert matching_gradient(same, same, 2 * same).abs().max() == 0  # divided by zero
    real = same.clone()
    real[0, 0, 0, 0, 0] = math.nan
    assert matching_gradient(2 * same, real, same).abs().max() == 0


@pytest.mark.parametrize("away_from", ["null condition", "weak teacher"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["bidirectional", "scd", "causal"])
def test_clips_are_scored_by_teacher_and_critic_after_their_context(
    kind: str, scale: float, away_from: str
) -> None:
    """A bidirectional one sees all frames under noise, a causal one the generated ones before."""
    student, teacher, critic = make("scd"), make(kind), make(kind, seed=2)
    weak = make(kind, seed=4) if away_from == "weak teacher" else None
    options = options_of(guidance_scale=scale)
    objective = DMDObjective(student, teacher, Critic(critic, False), options, weak)
    latents, actions = make_clip()
    context, frames = latents[:, :KNOWN], latents[:, KNOWN:]
    score = Noising(torch.tensor([0.3, 0.9]), torch.randn(2, NEW, 3, 4, 4))
    gradient = objective.gradient(Given(context, actions), frames, score)
    sigma = score.sigma[:, None, None, None, None]
    noisy = sigma * score.noise + (1 - sigma) * frames
    given = torch.cat([context, noisy], dim=1)
    times = (1000 * score.sigma)[:, None].repeat(1, KNOWN + NEW)
    times[:, :KNOWN] = -1

    def clean(model: CausalWorldModel, conditions: Tensor) -> Tensor:
        with torch.no_grad():
            velocity = model.velocity(latents, given, times, conditions)[:, KNOWN - 1 :]
        return noisy - sigma * velocity

    real, worse = clean(teacher, actions), clean(teacher, torch.full_like(actions, 4))
    if weak is not None:
        worse = clean(weak, actions)
    real = worse + scale * (real - worse)
    expected = matching_gradient(frames, real, clean(critic, actions))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_with_equal_scores_the_student_is_left_alone() -> None:
    teacher = make("bidirectional")
    objective = DMDObjective(make("scd"), teacher, Critic(teacher, False), options_of())
    latents, actions = make_clip()
    score = Noising(torch.tensor([0.3, 0.9]), torch.randn(2, NEW, 3, 4, 4))
    gradient = objective.gradient(Given(latents[:, :KNOWN], actions), latents[:, KNOWN:], score)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_the_critic_loses_nothing_by_the_true_velocity(prediction: str) -> None:
    critic = make("bidirectional", prediction)
    objective = DMDObjective(
        make("scd"), make("bidirectional"), Critic(critic, False), options_of()
    )
    latents, actions = make_clip()
    context, frames = latents[:, :KNOWN], latents[:, KNOWN:]
    score = Noising(torch.tensor([0.02, 0.9]), torch.randn(2, NEW, 3, 4, 4))
    noisy, times = score.add_to(frames)
    clip = torch.cat([context, torch.zeros_like(frames)], dim=1)
    loss, _ = objective.critic_loss(Given(context, actions), frames, score)
    velocity = critic(clip, noisy, times, actions)[:, 0]
    sigma = score.sigma[:, None, None, None, None]
    wanted = score.noise - frames
    if prediction == "data":  # the model divides by at least sigma_min
        wanted = wanted * sigma / sigma.clamp(min=critic.config.sigma_min)
    torch.testing.assert_close(loss, (velocity - wanted).square().mean(), rtol=1e-4, atol=1e-5)


def options_of(steps: int = 3, critic_updates: int = 2, **distill: object) -> Options:
    options = Options(seed=3)
    settings = replace(SETTINGS, steps=steps)
    distilled = replace(
        options.distill,
        method="dmd",
        context_frames=KNOWN,
        critic_updates=critic_updates,
        **distill,
    )
    return replace(options, distill=distilled, rollout=settings)


# --- One step of the objective


def objective_of(student: str = "scd", **distill: float) -> DMDObjective:
    teacher = make("bidirectional").requires_grad_(False)
    options = options_of(**distill)
    torch.manual_seed(0)
    critic = Critic(make("bidirectional", seed=2), options.distill.adversarial_weight > 0)
    return DMDObjective(make(student), teacher, critic, options)


@pytest.mark.parametrize("student", ["scd", "scd joint"])
def test_student_and_critic_learn_by_turns_from_their_own_losses(student: str) -> None:
    latents, actions = make_clip()
    batch = {"latents": latents, "actions": actions, "sample": [0, 1]}
    for step, learning in ((1, ("critic",)), (2, ("critic", "model"))):
        objective = objective_of(student=student)
        values = objective({**batch, "step": step})
        values["loss"].backward()
        learns = {n.split(".")[0] for n, p in objective.named_parameters() if p.grad is not None}
        assert learns == set(learning)
        assert ("dmd_gradient" in values) == (step == 2)
    assert values["replay_error"] < 1e-4
    # The critic's gradient is that of its own loss alone.
    own = objective_of(critic_updates=100, student=student)
    own({**batch, "step": 2})["loss"].backward()
    for one, other in zip(objective.critic.parameters(), own.critic.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


def test_the_controls_change_what_the_student_learns() -> None:
    """Own rollouts or real histories, with the gradient through the history or without."""
    latents, actions = make_clip()
    batch = {"latents": latents, "actions": actions, "sample": [0, 1], "step": 2}
    gradients = []
    for own in (True, False):
        for through in (True, False):
            objective = objective_of(self_rollout=own, history_gradient=through)
            values = objective(batch)
            values["loss"].backward()
            assert values["replay_error"] < 1e-4
            gradients.append(objective.model.encoder.blocks[0].attention.qkv.weight.grad)
    assert all(gradient.norm() > 0 for gradient in gradients)
    for one, other in combinations(gradients, 2):
        assert (one - other).norm() > 0.1 * other.norm()


def test_a_batch_is_the_mean_of_its_clips() -> None:
    objective = objective_of()
    latents, actions = make_clip()
    losses = []
    for which, samples in ((slice(0, 2), [5, 9]), (slice(0, 1), [5]), (slice(1, 2), [9])):
        batch = {"latents": latents[which], "actions": actions[which], "sample": samples}
        losses.append(objective({**batch, "step": 2})["loss"])
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2, rtol=1e-4, atol=1e-5)


def test_what_each_loss_of_a_step_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Critic and teacher see own clips, each under noise of its own; the head real ones as well."""
    clips, shift, lowest, highest = 12, 3.0, 0.4, 0.8
    objective = objective_of(adversarial_weight=0.5, shift=shift, score_range=[lowest, highest])
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(clips, KNOWN + NEW, 3, 4, 4, generator=generator)
    actions = torch.randint(0, 4, (clips, KNOWN + NEW), generator=generator)
    samples, asked, answers = list(range(clips)), defaultdict(list), defaultdict(list)

    def spy(name: str, plain: Callable) -> None:
        def spied(*args):
            asked[name].append(args)
            answers[name].append(plain(*args))
            return answers[name][-1]

        monkeypatch.setattr(objective, name, spied)

    for name in ("critic_loss", "gradient", "logits"):
        spy(name, getattr(objective, name))
    batch = {"latents": latents, "actions": actions, "sample": samples, "step": 2}
    values = objective(batch)
    seeds = [seeded("cpu", 3, "rollout", sample) for sample in samples]
    own = roll_out(
        objective.model, SETTINGS, latents[:, :KNOWN], NEW, draw_exit(3, 2), actions, None, seeds
    ).frames
    (critic,), (score,), judged = (asked[name] for name in ("critic_loss", "gradient", "logits"))
    shown = [(critic, own), (score, own), (judged[0], latents[:, KNOWN:]), (judged[1], own)]
    for (given, frames, _), expected in shown:
        assert torch.equal(given.context, latents[:, :KNOWN])
        assert torch.equal(given.conditions, actions)
        torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)
    for (_, _, noising), stream in ((critic, "critic"), (score, "score")):
        level = uniform_per_sample((), samples, latents.device, 3, f"{stream} level")
        shifted = (shift * level / (1 + (shift - 1) * level)).clamp(lowest, highest)
        torch.testing.assert_close(noising.sigma, shifted)
        assert {lowest, highest} < {round(value, 6) for value in shifted.tolist()}
    assert judged[0][2] is judged[1][2]
    noises = [args[2].noise for args in (critic, score, judged[0])]
    for one, other in combinations(noises, 2):
        assert (one * other).mean().abs() < 0.1  # of 2304 normal numbers: 5 standard deviations
        assert abs(one.std() - 1) < 0.1
    low = judged[0][2].sigma
    assert 0.02 < low.min() < 0.15 and 0.35 < low.max() < 0.5
    real, fake = answers["logits"]
    discriminator = torch.log(1 + torch.exp(fake - real)).mean()
    torch.testing.assert_close(values["discriminator_loss"], discriminator.detach())


def test_the_student_goes_against_the_gradient_of_its_clips(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, (latents, actions) = objective_of(), make_clip()
    gradients, plain = [], objective.gradient
    monkeypatch.setattr(
        objective, "gradient", lambda *a: (gradients.append(plain(*a)), gradients[-1])[1]
    )
    batch = {"latents": latents, "actions": actions, "sample": [0, 1], "step": 2}
    objective(batch)["loss"].backward()
    seeds = [seeded("cpu", 3, "rollout", sample) for sample in (0, 1)]
    context, exit_at = latents[:, :KNOWN], draw_exit(3, 2)
    made = roll_out(objective.model, SETTINGS, context, NEW, exit_at, actions, None, seeds)
    frames, (gradient,) = replay(objective.model, made, actions), gradients
    parameters = list(objective.model.parameters())
    expected = torch.autograd.grad(frames, parameters, gradient / gradient.numel())
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)


def test_a_label_is_as_an_action_that_all_frames_have() -> None:
    """In the rollout to a later window, and in the window itself."""
    losses, (latents, actions) = [], make_clip()
    latents, labels = latents.repeat(1, 2, 1, 1, 1)[:, :8], actions[:, 0]
    given = {"action": {"actions": labels[:, None].expand(-1, 8)}, "label": {"label": labels}}
    options = options_of(window_frames=KNOWN + 2)
    options.data.frames = 8
    step = next(step for step in range(2, 40, 2) if draw_start(options, step) == KNOWN)
    for condition, batch in given.items():
        student = make("scd", condition=condition)
        teacher, critic = (make("causal", seed=s, condition=condition) for s in (2, 3))
        objective = DMDObjective(student, teacher, Critic(critic, False), options)
        values = objective({"latents": latents, **batch, "sample": [0, 1], "step": step})
        assert values["replay_error"] < 1e-4
        losses.append(values["loss"])
    torch.testing.assert_close(*losses)


def test_only_the_head_learns_to_tell_generated_from_real_clips() -> None:
    latents, actions = make_clip()
    batch = {"latents": latents, "actions": actions, "sample": [0, 1]}
    gradients = []
    for weights in ({}, {"adversarial_weight": 0.5}):
        objective = objective_of(**weights)
        values = objective({**batch, "step": 2})
        values["loss"].backward()
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    plain, adversarial = gradients
    heads = {name for name in adversarial if name.startswith("critic.head.")}
    assert len(heads) == 6 and adversarial.keys() - heads == plain.keys()
    assert 0.3 < values["discriminator_loss"] < 1.5  # log 2 for a head that knows nothing
    for name in plain:
        same = torch.equal(plain[name], adversarial[name])
        assert same == name.startswith("critic.score."), name


@pytest.mark.parametrize(("layers", "first"), [(2, 1), (3, 2), (5, 2), (6, 3)])
@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_features_come_from_the_first_blocks_alone(kind: str, layers: int, first: int) -> None:
    """They are those of a whole pass, to the bit; the model keeps all its blocks."""
    model, (latents, actions) = make(kind, layers=layers), make_clip()
    noisy, times = latents[:, None, KNOWN:], torch.full((2, 1, NEW), 300.0)
    outputs: list[list[Tensor]] = [[] for _ in range(layers)]
    for block, kept in zip(model.blocks, outputs, strict=True):
        block.register_forward_hook(lambda block, inputs, out, kept=kept: kept.append(out))
    features = early_features(model, latents, noisy, times, actions)
    assert [len(kept) for kept in outputs] == first * [1] + (layers - first) * [0]
    model(latents, noisy, times, actions)
    assert [len(kept) for kept in outputs] == first * [2] + (layers - first) * [1]
    assert torch.equal(features, outputs[first - 1][1][:, -NEW:])


def test_the_students_gradient_is_the_weighted_sum_of_both() -> None:
    latents, actions = make_clip()
    batch = {"latents": latents, "actions": actions, "sample": [0, 1], "step": 2}
    found = []
    for matching, adversarial in ((1, 0), (0, 1), (0.25, 0.5)):
        objective = objective_of(matching_weight=matching, adversarial_weight=adversarial)
        objective(batch)["loss"].backward()
        found.append([p.grad for p in objective.model.parameters()])
    for alone, judged, both in zip(*found, strict=True):
        torch.testing.assert_close(both, 0.25 * alone + 0.5 * judged, rtol=1e-3, atol=1e-6)


def test_the_adversarial_gradient_is_that_of_the_generators_loss() -> None:
    objective = objective_of(adversarial_weight=0.5).double()
    latents, actions = make_clip()
    context, frames = latents[:, :KNOWN].double(), latents[:, KNOWN:].double()
    score = Noising(torch.tensor([0.3, 0.9]).double(), torch.randn(2, NEW, 3, 4, 4).double())
    given = Given(context, actions)
    real = objective.logits(given, torch.randn_like(frames), score)
    gradient = objective.adversarial_gradient(given, frames.clone(), score, real)

    def loss(moved: Tensor) -> Tensor:
        own = objective.logits(given, moved, score)
        return torch.log(1 + torch.exp(real - own)).mean()

    direction = torch.randn_like(frames)
    step = 1e-3
    with torch.no_grad():
        slope = (loss(frames + step * direction) - loss(frames - step * direction)) / (2 * step)
    expected = (gradient * direction).sum() / frames.numel()
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in objective.parameters())


def test_the_head_tells_blurred_from_real_clips_of_the_same_contexts() -> None:
    """Within thirty steps, in clips that it has not seen."""
    objective = objective_of(adversarial_weight=1)
    adam = torch.optim.Adam(objective.critic.head.parameters(), lr=3e-3, betas=(0.0, 0.999))
    for step in range(31):
        clips = torch.randn(8, KNOWN + NEW, 3, 4, 4)
        context, real = clips[:, :KNOWN], clips[:, KNOWN:]
        look = Noising(0.02 + 0.48 * torch.rand(8), torch.randn_like(real))
        logits = [objective.logits(Given(context), x, look) for x in (real, 0.7 * real)]
        loss = relativistic_loss(*logits)
        if step < 30:
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert loss < 0.3  # chance is log 2


# --- Windows of long rollouts


def windowed(window_frames: int, frames: int) -> DMDObjective:
    objective = objective_of(window_frames=window_frames)
    objective.options.data.frames = frames
    return objective


def test_a_later_window_follows_own_frames_under_its_own_keys() -> None:
    objective, (latents, actions) = windowed(5, KNOWN + NEW), make_clip()
    clips = {"latents": latents, "actions": actions}
    first = objective.window(clips, 0, 0.9, generators())
    assert torch.equal(first["latents"], latents[:, :5])
    assert torch.equal(first["actions"], actions[:, :5])
    later = objective.window(clips, 2, 0.9, generators())
    context = latents[:, :KNOWN]
    own = continue_videos(
        objective.model, SETTINGS, context, 2, actions[:, :5], generator=generators()
    )
    given, rest = later["latents"].split([KNOWN, 2], dim=1)
    torch.testing.assert_close(given, torch.cat([context[:, 2:], own], 1), rtol=0, atol=0)
    assert torch.equal(rest, latents[:, 5:])
    assert torch.equal(later["actions"], actions[:, 2:])


def test_windows_begin_all_over_a_clip_as_the_step_says() -> None:
    options = windowed(KNOWN + 2, 3 * KNOWN + 2).options
    starts = [draw_start(options, step) for step in range(300)]
    assert starts == [draw_start(options, step) for step in range(300)]
    assert set(starts) == {0, KNOWN, 2 * KNOWN}
    assert {starts.count(start) for start in starts} <= set(range(70, 131))
    assert draw_start(options_of(), 1) == 0


def test_a_window_is_learned_from_as_a_clip_is() -> None:
    """That at the beginning exactly; of one further on, the replay equals the rollout."""
    objective, (latents, actions) = windowed(KNOWN + 2, 2 * KNOWN + 2), make_clip()
    long = {"latents": latents.repeat(1, 2, 1, 1, 1)[:, :8], "actions": actions.repeat(1, 2)[:, :8]}
    short = {key: value[:, :5] for key, value in long.items()}
    steps = {draw_start(objective.options, step): step for step in range(2, 40, 2)}
    assert set(steps) == {0, KNOWN}
    losses = []
    for step in steps.values():
        others = {"sample": [0, 1], "step": step}
        values = objective({**long, **others})
        assert values["replay_error"] < 1e-4
        losses.append((values["loss"], objective_of()({**short, **others})["loss"]))
    assert torch.equal(*losses[list(steps).index(0)])
    assert not torch.equal(*losses[list(steps).index(KNOWN)])


def test_exits_are_uniform_and_depend_on_the_step_alone() -> None:
    exits = [int(4 * draw_exit(3, step)) for step in range(400)]
    assert exits == [int(4 * draw_exit(3, step)) for step in range(400)]
    assert {exits.count(step) for step in range(4)} <= set(range(70, 131))
    options = options_of()
    assert [trains_student(options, step) for step in (1, 2, 3, 4)] == [False, True, False, True]


# --- Training


SMALL = [
    *("train.mixed_precision=fp32", "data.source=video", "autoencoder.path=null"),
    *("model.patch_size=16", "model.heads=1", "train.batch_size=2", "train.save_every=1"),
    *("train.log_every=1", "train.workers=0", "eval.context_frames=4", "eval.new_frames=2"),
    *("eval.videos=2", "eval.comparisons=[]", "train.compile=false", "data.frames=6"),
    "train.keep_checkpoints=9",
]
STUDENT = ["model.encoder_layers=1", "model.decoder_layers=1"]


class Trained(NamedTuple):
    """What a student can start from, and learn from."""

    base: Path
    teacher: Path

    def checkpoint(self, which: str) -> Path:
        return getattr(self, which) / "checkpoints/step-00000001/ema.safetensors"


@pytest.fixture(scope="module")
def trained(doom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    here = [*SMALL, f"data.root={doom_root}", f"output_root={root}", "train.steps=1"]
    dense = ["init_from=null", "flow.prefix_frames=[2,4]", "model.layers=1"]
    for name, file, own in (
        ("base", "scd_doom", STUDENT),
        ("teacher", "bidirectional_dit_doom", dense),
    ):
        options = load_training_options(f"options/{file}.yml", [*here, f"name={name}", *own])
        run_experiment(options)
    return Trained(root / "base", root / "teacher")


@pytest.fixture
def options(doom_root: Path, trained: Trained, tmp_path: Path, fresh_accelerate: None):
    own = ["distill.context_frames=2", "distill.critic_updates=2", "optim.lr=1e-3"]
    weights = trained.checkpoint("base"), trained.checkpoint("teacher")
    places = [f"init_from={weights[0]}", f"distill.teacher={weights[1]}"]
    places += [f"data.root={doom_root}", f"output_root={tmp_path}"]
    return lambda *further: load_training_options(
        "options/scd_doom_distilled.yml", [*SMALL, *STUDENT, *own, *places, *further]
    )


@pytest.mark.parametrize(
    "further",
    [
        pytest.param(["distill.adversarial_weight=0"], id="matching", marks=pytest.mark.slow),
        pytest.param(["distill.adversarial_weight=0.1"], id="adversarial"),
        pytest.param(
            ["data.frames=8", "distill.window_frames=6", "rollout.window=5"],
            id="windows",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(options, further, tmp_path: Path) -> None:
    whole = options("name=whole", "train.steps=4", *further)
    run_experiment(whole)
    for steps in (1, 3, 4):
        run_experiment(options("name=parts", f"train.steps={steps}", *further))
    assert_same_state(*(tmp_path / name / "checkpoints" for name in ("whole", "parts")))
    # The critic moves in every step, the student and its average in every second one.
    folder = whole.output / "checkpoints"
    states = [load_checkpoint(folder / f"step-{step:08d}") for step in (1, 2, 3, 4)]
    name = "decoder.unembed.weight"
    moved = [not torch.equal(a.model[name], b.model[name]) for a, b in pairwise(states)]
    assert moved == [True, False, True]
    averaged = [not torch.equal(a.ema[name], b.ema[name]) for a, b in pairwise(states)]
    assert averaged == [True, False, True]
    critics = [state.critic["model"]["score.unembed.weight"] for state in states]
    assert all(not torch.equal(a, b) for a, b in pairwise(critics))
    log = read_log(whole.output / "log.jsonl")
    assert all(entry["critic_loss"] > 0 for entry in log if "loss" in entry)
    assert [entry["step"] for entry in log if "dmd_gradient" in entry] == [2, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.context_frames=6", "leaves none"),
        ("rollout.guidance=condition rollout.guidance_scale=1.5", "without guidance"),
        ("rollout.guidance_scale=1.5", "does nothing with rollout.guidance=none"),
        ("distill.matching_weight=0", "learn nothing"),
        ("rollout.window=4", "sees fewer"),
        ("rollout.compile=true", r"set rollout\.compile=false"),
        ("distill.window_frames=7", "at most data.frames=6"),
        ("distill.window_frames=2", "must be more than distill.context_frames=2"),
        ("model.type=bidirectional_dit", "contradicts"),
        ("flow.self_forcing_prob=0.5", "it learns from rollouts already"),
        ("flow.encoder_input=noisy", "of teacher forcing alone"),
        ("distill.self_rollout=false rollout.first_frame_steps=3", "none is the first"),
    ],
)
def test_options_that_cannot_work_are_refused(override: str, message: str, options) -> None:
    with pytest.raises(ScdError, match=message):
        options(*override.split())


@pytest.mark.parametrize(
    "override",
    ["distill.method=consistency", "distill.self_rollout=false", "distill.adversarial_weight=1"],
)
def test_windows_are_of_own_rollouts(override: str, options) -> None:
    with pytest.raises(ScdError, match="on own rollouts"):
        options("distill.window_frames=5", override)


def test_windows_begin_in_the_middle_of_a_video(options) -> None:
    """There is no first frame with steps of its own, nor a Wan's latent of a single picture."""
    with pytest.raises(ScdError, match="not the first of a video"):
        options("distill.window_frames=5", "rollout.first_frame_steps=3")
    windows = ["distill.window_frames=8", "distill.context_frames=2", "data.source=latents"]
    with pytest.raises(ScdError, match="begins with a latent of a single picture"):
        load_training_options("options/scd_wan_distilled.yml", windows)


def test_a_run_goes_on_with_its_teacher_and_its_steps(
    options, trained: Trained, tmp_path: Path
) -> None:
    """The teacher may be moved; another one, or other rollouts, are another run."""
    run_experiment(options("name=run", "train.steps=1"))
    other = f"distill.teacher={trained.base}/exported"
    for override, difference in (
        ("rollout.steps=1", "rollout.steps was 2, is 1"),
        ("rollout.shift=5", "rollout.shift was 2.7, is 5"),
        ("rollout.temperature=0.5", "rollout.temperature was 1.0, is 0.5"),
        ("rollout.precision=bf16", "rollout.precision was fp32, is bf16"),
        (other, "the weights at distill.teacher are others"),
    ):
        with pytest.raises(ScdError, match=f"belongs to another run: {difference}"):
            run_experiment(options("name=run", "train.steps=2", override))
    same = tmp_path / "ema.safetensors"
    shutil.copy(trained.checkpoint("teacher"), same)
    slower = "distill.critic_lr=1e-6"  # rates may change
    run_experiment(options("name=run", "train.steps=2", f"distill.teacher={same}", slower))


def weakened(checkpoint: Path, copy: Path) -> Path:
    """Write a checkpoint whose weights are a little smaller, which makes a worse model."""
    with safe_open(checkpoint, "pt") as file:
        tensors = {name: 0.9 * file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, copy, file.metadata())
    return copy


def test_a_run_leads_away_from_the_weak_teacher_it_began_with(
    options, trained: Trained, tmp_path: Path
) -> None:
    weak = weakened(trained.checkpoint("teacher"), tmp_path / "weak.safetensors")

    def guided(*overrides: str) -> Options:
        return options("distill.guidance_scale=2", f"distill.weak_teacher={weak}", *overrides)

    run_experiment(guided("name=guided", "train.steps=2"))
    run_experiment(options("name=plain", "train.steps=2"))
    gradients = [
        read_log(tmp_path / name / "log.jsonl")[-1]["dmd_gradient"] for name in ("guided", "plain")
    ]
    assert gradients[0] != gradients[1]
    with pytest.raises(ScdError, match="a bidirectional and a causal model, but the weak one must"):
        run_experiment(guided("name=mixed", f"distill.weak_teacher={trained.checkpoint('base')}"))
    other = guided("name=guided", "train.steps=4")
    other.distill.weak_teacher = other.distill.teacher
    with pytest.raises(ScdError, match=r"the weights at distill\.weak_teacher are others"):
        run_experiment(other)
    run_experiment(guided("name=guided", "train.steps=3"))
    # Nor can one begin in a run of a version that knew none.
    saved, now = (run_identity(o, 1) for o in (options("distill.guidance_scale=2"), guided()))
    del saved["distill.weak_teacher"], saved["options"]["distill"]["weak_teacher"]
    with pytest.raises(ScdError, match=r"the weights at distill\.weak_teacher are others"):
        refuse_other_run(saved, now, "checkpoint")


def test_a_run_keeps_the_temperature_that_it_began_with_before_the_option(options) -> None:
    saved, now = (run_identity(o, 1) for o in (options(), options("rollout.temperature=0.5")))
    del saved["options"]["rollout"]["temperature"]
    refuse_other_run(saved, run_identity(options(), 1), "checkpoint")
    with pytest.raises(ScdError, match=r"rollout\.temperature was 1\.0, is 0\.5"):
        refuse_other_run(saved, now, "checkpoint")


@pytest.mark.parametrize("kind", ["scd", "causal"])
def test_a_causal_score_of_a_frame_depends_on_no_later_one(kind: str) -> None:
    critic = Critic(make(kind, seed=2), False)
    objective = DMDObjective(make("scd"), make(kind), critic, options_of())
    latents, actions = make_clip()
    score = Noising(torch.tensor([0.3, 0.9]), torch.randn(2, NEW, 3, 4, 4))

    def gradient(clip: Tensor) -> Tensor:
        found = objective.gradient(Given(clip[:, :KNOWN], actions), clip[:, KNOWN:], score)
        return found / found[:, :1].abs().amax(dim=(1, 2, 3, 4), keepdim=True)  # one scale a clip

    changed = latents.clone()
    changed[:, -1] += 1
    before, after = gradient(latents), gradient(changed)
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=1e-4, atol=1e-5)
    assert (after[:, -1] - before[:, -1]).abs().max() > 1e-2


def test_the_student_s_own_base_can_be_its_teacher(options, trained: Trained) -> None:
    causal = trained.checkpoint("base")
    run = options(f"distill.teacher={causal}", "train.steps=3", "train.log_every=3")
    run_experiment(run)
    # Of step 2, the student's: step 3 is the critic's alone.
    assert read_log(run.output / "log.jsonl")[-1]["dmd_gradient"] > 0
    with pytest.raises(ScdError, match="needs the features of"):
        run_experiment(
            options(f"distill.teacher={causal}", "name=head", "distill.adversarial_weight=0.1")
        )
