"""Causal consistency distillation: its loss against the formula, its target, its training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scd.distill.consistency import ConsistencyObjective
from scd.distill.teacher import load_teacher
from scd.errors import ScdError
from scd.flow.noise import draw_noise
from scd.models import SCD, CausalDiT, CausalWorldModel
from scd.models.autoencoder import PixelCodec, load_codec
from scd.models.load import build_world_model, load_checkpoint_for_use
from scd.options import Options, load_options, load_training_options
from scd.rollout.resampling import own_history
from scd.training.distillation_task import DistillationTask
from scd.training.launch import run_experiment
from scd.training.resume import refuse_other_run, run_identity
from scd.training.run_log import read_log
from tests.test_training import assert_same_state

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

FRAMES = 5
SIZES = {"channels": 3, "patch_size": 2, "heads": 1, "condition": "action", "num_conditions": 4}


def perturbed(model: CausalWorldModel, seed: int) -> CausalWorldModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def make_scd(seed: int, prediction: str = "data") -> SCD:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    model = perturbed(SCD(**SIZES, **layers, prediction=prediction), seed)
    assert isinstance(model, SCD)
    return model


UNCONDITIONED = "model.condition=none model.num_conditions=0 eval.swapped_actions=[]"


def options_of(**distill: object) -> Options:
    options = Options(seed=3)
    flow = replace(options.flow, noise_draws=2, condition_dropout=0.5)
    return replace(options, flow=flow, distill=replace(options.distill, **distill))


def make_clip() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, FRAMES, 3, 4, 4, generator=generator)
    return latents, torch.randint(0, 4, (2, FRAMES), generator=generator)


@pytest.mark.parametrize("away_from", ["null condition", "weak teacher"])
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("prediction", ["data", "velocity"])
@pytest.mark.parametrize("own", [False, True])
def test_the_loss_is_that_of_the_formula(
    prediction: str, scale: float, away_from: str, own: bool
) -> None:
    student, average = make_scd(1, prediction), make_scd(2, prediction)
    torch.manual_seed(0)
    teacher = perturbed(CausalDiT(**SIZES, layers=2, prediction=prediction), 3)
    weak = perturbed(CausalDiT(**SIZES, layers=1, prediction=prediction), 5)
    weak = weak if away_from == "weak teacher" else None
    options = options_of(levels=4, shift=2.0, guidance_scale=scale)
    objective = ConsistencyObjective(student, teacher, options, weak)
    objective.set_target(dict(average.named_parameters()))
    latents, actions = make_clip()
    history = torch.randn_like(latents) if own else latents
    draws = draw_noise(options.flow, 0, [0, 1], latents, None)
    draws = draws._replace(drop_condition=torch.tensor([False, True]))
    place = torch.rand(2, 2, FRAMES, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found = objective.loss(latents, actions, draws, place, history=history if own else None)
    conditions = torch.stack([actions[0], torch.full_like(actions[1], 4)])
    levels = [1.0, 6 / 7, 2 / 3, 0.4, 0.0]  # 1, 3/4, 1/2, 1/4, 0 shifted by 2
    errors = []
    for k in range(2):
        number = (place[:, k, 1:] * 4).long()
        sigma = torch.tensor(levels)[number]
        following = torch.tensor(levels)[number + 1]
        s, f = (level[..., None, None, None] for level in (sigma, following))
        noisy = s * draws.noise[:, k, 1:] + (1 - s) * latents[:, 1:]
        with torch.no_grad():
            times = 1000 * sigma[:, None]
            v = teacher(history, noisy[:, None], times, conditions)[:, 0]
            if scale != 1:
                null = torch.full_like(conditions, 4)
                other, under = (weak, conditions) if weak else (teacher, null)
                negative = other(history, noisy[:, None], times, under)[:, 0]
                v = negative + scale * (v - negative)
            stepped = noisy - (s - f) * v
            ahead = average(history, stepped[:, None], 1000 * following[:, None], conditions)[:, 0]
            own = student(history, noisy[:, None], 1000 * sigma[:, None], conditions)[:, 0]
        target = stepped - f * ahead
        # At the last level, the target is the teacher's own clean frame.
        last = following == 0
        assert last.any()
        torch.testing.assert_close(target[last], (noisy - s * v)[last])
        errors.append((noisy - s * own - target).square())
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_a_label_is_as_an_action_that_all_frames_have() -> None:
    losses, (latents, actions) = [], make_clip()
    labels = actions[:, 0]
    given = {"action": {"actions": labels[:, None].expand(-1, FRAMES)}, "label": {"label": labels}}
    for condition, batch in given.items():
        torch.manual_seed(0)
        how = {**SIZES, "condition": condition}
        teacher = perturbed(CausalDiT(**how, layers=1), 3)
        student = perturbed(SCD(**how, encoder_layers=1, decoder_layers=1), 1)
        objective = ConsistencyObjective(student, teacher, options_of(levels=4))
        losses.append(objective({"latents": latents, **batch, "sample": [0, 1]})["loss"])
    torch.testing.assert_close(*losses)


def test_only_the_student_learns() -> None:
    student, teacher = make_scd(1), make_scd(2)
    objective = ConsistencyObjective(student, teacher.requires_grad_(False), options_of(levels=4))
    latents, actions = make_clip()
    objective({"latents": latents, "actions": actions, "sample": [0, 1]})["loss"].backward()
    learns = {name for name, p in objective.named_parameters() if p.grad is not None}
    assert learns == {f"model.{name}" for name, _ in student.named_parameters()}


@pytest.mark.parametrize("self_forcing_prob", [0, 1])
def test_a_batch_is_the_mean_of_its_clips(self_forcing_prob: float) -> None:
    student, teacher = make_scd(1), make_scd(2)
    options = options_of(levels=4)
    options = replace(options, flow=replace(options.flow, self_forcing_prob=self_forcing_prob))
    objective = ConsistencyObjective(student, teacher, options)
    latents, actions = make_clip()
    losses = []
    for which, samples in ((slice(0, 2), [5, 9]), (slice(0, 1), [5]), (slice(1, 2), [9])):
        batch = {"latents": latents[which], "actions": actions[which], "sample": samples}
        losses.append(objective({**batch, "step": 1})["loss"])
    torch.testing.assert_close(losses[0], (losses[1] + losses[2]) / 2, rtol=1e-5, atol=1e-6)


def test_an_own_history_is_what_the_average_makes_in_one_step() -> None:
    student, average, teacher = make_scd(1), make_scd(2), make_scd(3)
    options = options_of(levels=4)
    options = replace(options, flow=replace(options.flow, self_forcing_prob=1.0))
    objective = ConsistencyObjective(student, teacher, options)
    objective.set_target(dict(average.named_parameters()))
    latents, actions = make_clip()
    batch = {"latents": latents, "actions": actions, "sample": [0, 1], "step": 2}
    seen: list[Tensor] = []
    for model in (student, teacher):
        model.register_forward_pre_hook(lambda model, args: seen.append(args[0]))
    objective(batch)
    expected = own_history(average, options.flow, options.seed, batch, steps=1)
    assert expected is not None and not torch.equal(expected, latents)
    assert len(seen) == 2 and all(torch.equal(history, expected) for history in seen)


# --- Training


@pytest.fixture
def options(doom_root: Path, tmp_path: Path):
    small = [
        *(f"data.root={doom_root}", f"output_root={tmp_path}"),
        *("data.source=video", "data.frames=4", "autoencoder.path=null"),
        *("model.patch_size=16", "model.heads=1"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "train.compile=false"),
        *("train.batch_size=2", "train.save_every=2", "train.log_every=1", "train.workers=0"),
        *("eval.context_frames=4", "eval.new_frames=2", "eval.videos=2", "eval.comparisons=[]"),
    ]

    def make(file: str, *overrides: str) -> Options:
        return load_options(f"options/{file}.yml", [*small, *overrides])

    base = make("scd_doom", "name=base", "train.steps=2")
    run_experiment(base)
    weights = base.output / "checkpoints/step-00000002/ema.safetensors"
    return lambda *overrides: make(
        "scd_doom_consistency", f"init_from={weights}", f"distill.teacher={weights}", *overrides
    )


def test_a_resumed_run_equals_an_uninterrupted_one(
    options, tmp_path: Path, fresh_accelerate: None
) -> None:
    own = "flow.self_forcing_prob=1"  # histories made by the average, which resumes too
    whole = options("name=whole", "train.steps=4", own)
    run_experiment(whole)
    for steps in (2, 4):
        run_experiment(options("name=halves", f"train.steps={steps}", own))
    assert_same_state(*(tmp_path / name / "checkpoints" for name in ("whole", "halves")))
    logged = [entry for entry in read_log(whole.output / "log.jsonl") if "loss" in entry]
    assert len(logged) == 4 and all(entry["loss"] > 0 and entry["tflops"] > 0 for entry in logged)
    exported = load_checkpoint_for_use(whole.output / "exported")
    assert exported.options.rollout.solver == "consistency"


def test_a_run_goes_on_with_the_average_that_its_targets_are_of(
    options, fresh_accelerate: None
) -> None:
    """Rates may change, and where nothing learns from the average, it too."""
    saved, slower, other = (
        run_identity(options(*changed), 1)
        for changed in (["optim.ema_decay=0.5"], ["optim.ema_decay=0.5", "optim.lr=1e-6"], [])
    )
    refuse_other_run(saved, slower, "checkpoint")
    with pytest.raises(ScdError, match=r"another run: optim\.ema_decay was 0\.5, is 0\.9"):
        refuse_other_run(saved, other, "checkpoint")
    for run in (saved, other):
        run["options"]["distill"]["method"] = "none"
    refuse_other_run(saved, other, "checkpoint")


@pytest.mark.parametrize("key", ["init_from", "distill.teacher", "distill.weak_teacher"])
def test_missing_weights_are_named_by_their_option(options, key: str, fresh_accelerate) -> None:
    with pytest.raises(ScdError, match=f"^{key}=nowhere: no such weights file"):
        run_experiment(options("name=refused", "distill.guidance_scale=1.5", f"{key}=nowhere"))


def test_another_teacher_does_not_fit(options, tmp_path: Path, fresh_accelerate: None) -> None:
    o = options("name=refused")
    student = build_world_model(o, PixelCodec())
    run_experiment(
        options(
            "name=other",
            "train.steps=2",
            "distill.method=none",
            "distill.teacher=null",
            "rollout.solver=euler",
            "model.patch_size=8",
            "init_from=null",
        )
    )
    other = tmp_path / "other/checkpoints/step-00000002/ema.safetensors"
    o = options("name=refused", f"distill.teacher={other}")
    with pytest.raises(ScdError, match="patch_size is 8 in the teacher, 16 in the student"):
        load_teacher(o, student, PixelCodec(), torch.device("cpu"))
    with pytest.raises(ScdError, match="no-such"):
        load_teacher(options("distill.teacher=no-such"), student, PixelCodec(), torch.device("cpu"))


def test_a_teacher_of_other_latents_or_without_frame_0_is_refused(
    options, tiny_autoencoder_path: str, fresh_accelerate: None
) -> None:
    o, cpu = options(), torch.device("cpu")
    student = build_world_model(o, PixelCodec())
    load_teacher(o, student, PixelCodec(), cpu)
    with pytest.raises(ScdError, match=r"its latents are not those of autoencoder\.path"):
        load_teacher(o, student, load_codec(tiny_autoencoder_path), cpu)
    beginner = build_world_model(options("model.first_frame=true"), PixelCodec())
    with pytest.raises(ScdError, match="the student learns frame 0"):
        load_teacher(o, beginner, PixelCodec(), cpu)


def test_a_wasted_step_is_told(options, capfd, fresh_accelerate: None) -> None:
    """Not refused: students of such a training, and the training itself, stay of use."""
    for override, told in (
        ("spacing=diffusers", True),
        ("spacing=even", False),
        ("steps=1", False),
    ):
        DistillationTask(options(f"rollout.{override}"), torch.device("cpu"))
        assert ("begins with hardly any noise" in capfd.readouterr().err) == told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distill.teacher=null", "set both, or neither"),
        ("init_from=null", "needs init_from"),
        ("rollout.solver=euler", "is sampled with rollout.solver=consistency"),
        ("distill.method=none", "set both, or neither"),
        ("distill.weak_teacher=weak", "nothing leads away from it"),
        ("distill.score_range=[0.5,0.2]", "lowest and the highest"),
        ("distill.adversarial_weight=0.1", "is of distill.method=dmd"),
        (
            f"{UNCONDITIONED} distill.guidance_scale=2",
            "away from noth",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(override: str, message: str) -> None:
    with pytest.raises(ScdError, match=message):
        load_training_options("options/scd_doom_consistency.yml", override.split())
