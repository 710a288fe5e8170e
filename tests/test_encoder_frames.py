"""How an SCD's encoder meets the frame to come: from the frame before it, or by a first look."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from scd.analysis.probe import probe_checkpoint
from scd.distill.consistency import ConsistencyObjective
from scd.distill.teacher import clean_frames
from scd.errors import ScdError
from scd.evaluation.evaluate import evaluate_checkpoint
from scd.flow.noise import draw_noise
from scd.flow.objective import LEVELS, FlowObjective, errors_by_level
from scd.flow.sampler import noise_levels
from scd.models import SCD, BidirectionalDiT, CausalDiT, masks, teacher_forcing
from scd.models.load import load_checkpoint_for_use
from scd.models.world_model import FirstLook, FrameDenoiser
from scd.options import DistillOptions, FlowOptions, Options, RolloutOptions, load_options
from scd.pipeline import SCDPipeline
from scd.rollout import Rollout, continue_videos, engine
from scd.training.build import make_objective
from scd.training.launch import run_experiment
from scd.training.run_log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

B, F, C, H, W = 2, 5, 4, 4, 6
N = 6  # tokens of a frame
NEW, STEPS = 3, 2
FRAMES = ["shift", "noise", "joint"]
LOOKING = ["noise", "joint"]
TOLERANCE = 1e-4  # absolute, fp32; measured: about 3e-6


def make(encoder_frame: str, **config) -> SCD:
    torch.manual_seed(0)
    sizes = {"channels": C, "patch_size": 2, "heads": 1, "encoder_layers": 2, "decoder_layers": 1}
    action = {"condition": "action", "num_conditions": 3}
    model = SCD(**{**sizes, **action, "encoder_frame": encoder_frame, **config})
    for parameter in model.parameters():  # nothing starts at zero, so everything has a say
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, FirstLook]:
    g = torch.Generator().manual_seed(1)
    latents, noisy, looks = torch.randn(3, B, F, C, H, W, generator=g)
    times, look_times = 1000 * torch.rand(2, B, F, generator=g)
    actions = torch.randint(0, 3, (B, F), generator=g)
    return latents, noisy, times, actions, FirstLook(looks, look_times)


def last_frames(look: FirstLook, count: int) -> FirstLook:
    return FirstLook(*(values[:, -count:] for values in look))


def rolled(
    model: SCD, settings: RolloutOptions, context: Tensor, actions: Tensor, new: int = NEW
) -> tuple[Tensor, Tensor | None]:
    """Frames of a rollout with a generator for each sample, and what the encoder saw of them."""
    known = context.shape[1]
    generators = [torch.Generator().manual_seed(number) for number in range(len(context))]
    rollout = Rollout(model, settings, known + new)
    rollout.reset(context, actions[:, :known], generator=generators)
    looks, begin_frame = [], model.begin_frame

    def begin(*args: Any) -> FrameDenoiser:
        looks.append(args[-1][: len(context), 0])  # without those of condition guidance
        return begin_frame(*args)

    with patch.object(rollout.model, "begin_frame", begin):
        frames = [rollout.step(actions[:, number]) for number in range(known, known + new)]
    seen = torch.stack(looks, dim=1) if model.takes_first_look else None
    return torch.stack(frames, dim=1), seen


# --- The network under teacher forcing


@torch.no_grad()
@pytest.mark.parametrize("frame", LOOKING)
@pytest.mark.parametrize("first_frame", [False, True])
def test_causal_to_the_bit(inputs, frame, first_frame):
    """A later frame, clean or looked at, moves nothing before it; an action its frame and all
    after it."""
    latents, noisy, times, actions, look = inputs
    model = make(frame, first_frame=first_frame)
    first = model.first_predicted
    look = last_frames(look, F - first)
    before = model.velocity(latents, noisy, times, actions, first_look=look)
    assert before.shape == (B, F - first, C, H, W)

    def moved(latents=latents, actions=actions, look=look) -> list[bool]:
        after = model.velocity(latents, noisy, times, actions, first_look=look)
        return (after != before).flatten(2).any(-1)[0].tolist()

    for j in range(F):
        changed = latents.clone()
        changed[:, j] += 1
        assert moved(latents=changed) == [i > j for i in range(first, F)], j
        other = actions.clone()
        other[:, j] = (other[:, j] + 1) % 3
        assert moved(actions=other) == [i >= j for i in range(first, F)], j
        if j >= first:  # a look is seen by its own frame alone
            seen = look.noisy.clone()
            seen[:, j - first] += 1
            expected = [i == j for i in range(first, F)]
            assert moved(look=look._replace(noisy=seen)) == expected, j
            level = look.timesteps.clone()
            level[:, j - first] += 100
            assert moved(look=look._replace(timesteps=level)) == expected, j


@torch.no_grad()
def test_contexts_are_what_a_dense_model_has_at_its_noisy_frames(inputs):
    """The same weights, without the norm's modulation: nothing but the decoder is new."""
    latents, _, _, actions, look = inputs
    torch.manual_seed(2)
    layers = {"channels": C, "patch_size": 2, "heads": 1, "condition": "action"}
    dense = CausalDiT(**layers, num_conditions=3, layers=2).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = make("noise")
    own = {name: dense.state_dict().get(name) for name in model.encoder.state_dict()}
    model.encoder.load_state_dict(own)
    for parameter in model.encoder.norm_out.parameters():
        parameter.zero_()
    seen: list[Tensor] = []
    dense.norm_out.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    look = last_frames(look, F - 1)
    dense(latents, look.noisy[:, None], look.timesteps[:, None], actions)
    contexts = model.encoder(latents[:, :-1], actions, first_look=look)
    assert (contexts - seen[0][:, F - 1 :]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("frame", LOOKING)
def test_k_draws_share_one_encoder_pass(inputs, frame):
    latents, noisy, times, actions, look = inputs
    model = make(frame)
    look = last_frames(look, F - 1)
    drawn = torch.stack([noisy, noisy.flip(1)], dim=1)[:, :, 1:]
    levels = torch.stack([times, times.flip(1)], dim=1)[:, :, 1:]
    passes: list[int] = []
    model.encoder.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    together = model(latents, drawn, levels, actions, first_look=look)
    assert passes == [B]
    for k in range(2):
        one = slice(k, k + 1)
        alone = model(latents, drawn[:, one], levels[:, one], actions, first_look=look)
        assert (together[:, one] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_only_the_last_frames_are_looked_at(inputs):
    """As a replay does, whose given frames have no context."""
    latents, noisy, times, actions, look = inputs
    model = make("noise")
    every, some = last_frames(look, F - 1), last_frames(look, 2)
    drawn = noisy[:, None, 1:], times[:, None, 1:]
    whole = model(latents, *drawn, actions, first_look=every)
    part = model(latents, *(x[:, :, -2:] for x in drawn), actions, first_look=some)
    assert (whole[:, :, -2:] - part).abs().max() < 1e-5


# --- Rollouts


@torch.no_grad()
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("known", [0, 1, 3])
@pytest.mark.parametrize(("guidance", "scale"), [("none", 1.0), ("condition", 1.7)])
def test_a_cached_rollout_equals_teacher_forcing(inputs, frame, known, guidance, scale):
    """On the same history, from the same noise, under a first look at pure noise."""
    *_, actions, _ = inputs
    model = make(frame, first_frame=known < 2)
    context = torch.randn(B, known, C, H, W, generator=torch.Generator().manual_seed(4))
    actions = torch.cat([actions, actions], dim=1)[:, : known + NEW]
    settings = RolloutOptions(STEPS, guidance=guidance, guidance_scale=scale)
    new, seen = rolled(model, settings, context, actions)
    assert (seen is None) == (frame == "shift")
    # A frame's noise is drawn before what the encoder sees of it.
    generators = [torch.Generator().manual_seed(number) for number in range(B)]
    history, null = context, torch.full_like(actions, model.null_condition)
    for i in range(NEW):
        x = torch.stack([torch.randn(C, H, W, generator=g) for g in generators])[:, None]
        look = None
        if seen is not None:
            drawn = torch.stack([torch.randn(C, H, W, generator=g) for g in generators])
            assert torch.equal(drawn, seen[:, i])
            look = FirstLook(drawn[:, None], torch.full((B, 1), 1000.0))
        until = known + i + 1
        for sigma, following in pairwise(noise_levels(STEPS)):
            frames, times = torch.cat([history, x], dim=1), torch.full((B, 1, 1), 1000 * sigma)

            def predict(given: Tensor, frames=frames, x=x, times=times, look=look) -> Tensor:
                return model(frames, x[:, None], times, given, first_look=look)[:, 0]

            v = predict(actions[:, :until])
            if guidance == "condition":
                without = predict(null[:, :until])
                v = without + scale * (v - without)
            x = x + (following - sigma) * v
        history = torch.cat([history, x], dim=1)
    assert (new - history[:, known:]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "consistency", "first_frame_steps": 3},
        {"guidance": "condition", "guidance_scale": 1.7},
        {"guidance": "context", "guidance_scale": 1.7},
        {"window": 3},
        {"window": 3, "sink_frames": 1},
    ],
)
@pytest.mark.parametrize("known", [0, 4])
def test_one_joint_pass_equals_two(inputs, settings, known):
    """Within 1e-5 (fp32), also where the window slides."""
    latents, *_, actions, _ = inputs
    actions = torch.cat([actions, actions], dim=1)
    settings = RolloutOptions(STEPS, **{"guidance": "none", **settings})
    frames, passes = [], []
    for frame in LOOKING:
        model, counted = make(frame, first_frame=not known), []
        model.encoder.blocks[0].register_forward_hook(
            lambda module, args, out, counted=counted: counted.append(out.shape[1])
        )
        frames.append(rolled(model, settings, latents[:, :known], actions, 6)[0])
        passes.append(counted[1:] if known else counted)  # after the prefill
    assert (frames[0] - frames[1]).abs().max() < 1e-5
    assert [len(sizes) for sizes in passes] == [12 if known else 11, 6]
    assert sum(passes[0]) == sum(passes[1])


@torch.no_grad()
@pytest.mark.parametrize("frame", LOOKING)
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("first_frame", [False, True])
def test_a_sliding_window_shows_so_many_past_frames(monkeypatch, frame, kept, first_frame):
    """Against attention under an explicit mask; positions keep counting."""
    model, window, frames = make(frame, first_frame=first_frame), 4, 9
    g = torch.Generator().manual_seed(5)
    video = torch.randn(B, frames, C, H, W, generator=g)
    actions = torch.randint(0, 3, (B, frames + 1), generator=g)
    settings = RolloutOptions(1, "consistency", guidance="none", window=window, sink_frames=kept)
    found, contexts = {}, []
    for known in range(2, frames + 1):
        rollout = Rollout(model, settings)
        rollout.reset(video[:, :known], actions[:, :known], generator=g)
        hook = model.decoder.register_forward_pre_hook(lambda _, args: contexts.append(args[1]))
        look = rollout.step_to_exit(0, actions[:, known]).first_look
        hook.remove()
        found[known] = contexts[-1], look

    def masked(q, k, v, tokens_per_frame, clean_frames, first, block_mask, history_gradient):
        number = torch.tensor([*range(clean_frames), *range(first, clean_frames + 1)])
        number = number.repeat_interleave(N)
        token = torch.arange(len(number))
        mask = masks.clean_context(N, clean_frames, first)(token[:, None], token[None])
        near = number[:, None] - number[None] <= window - kept
        mask = mask & (near | (number[None] < kept))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    monkeypatch.setattr(teacher_forcing, "clean_context_attention", masked)
    for known, (context, seen) in found.items():
        look = FirstLook.pure(seen[:, None])
        expected = model.encoder(video[:, :known], actions[:, : known + 1], first_look=look)
        assert (context - expected).abs().max() < TOLERANCE, known


@pytest.mark.parametrize("frame", LOOKING)
@pytest.mark.parametrize("guidance", ["none", "context", "condition"])
def test_a_sample_does_not_depend_on_its_batch(inputs, frame, guidance):
    latents, *_, actions, _ = inputs
    model, settings = make(frame), RolloutOptions(STEPS, guidance=guidance, guidance_scale=1.5)

    def run(rows: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(int(row)) for row in rows]
        given = latents[rows, :2], NEW, actions[rows]
        return continue_videos(model, settings, *given, generator=generators)

    both, swapped = run(torch.tensor([0, 1])), run(torch.tensor([1, 0]))
    assert (both - swapped.flip(0)).abs().max() < TOLERANCE
    assert (run(torch.tensor([1])) - both[1:]).abs().max() < TOLERANCE
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("frame", LOOKING)
def test_action_vectors(inputs, frame):
    """One-hot vectors are actions, also in the looks."""
    latents, *_, actions, _ = inputs
    settings, frames = RolloutOptions(STEPS, guidance="none"), []
    for condition in ("action", "action_vector"):
        given = actions
        if condition == "action_vector":
            given = torch.nn.functional.one_hot(actions, 3)
        model = make(frame, condition=condition)
        frames.append(rolled(model, settings, latents[:, :2], given)[0])
    assert (frames[0] - frames[1]).abs().max() < TOLERANCE


def test_compiled_steps_change_nothing(inputs, monkeypatch):
    """The path of tensors that CUDA captures: a graph of one frame's steps makes the next."""
    latents, *_, actions, _ = inputs
    captured, frames = [], []
    monkeypatch.setattr(
        engine, "graphed", lambda function, given: captured.append(given) or function
    )
    for wanted in (False, True):
        model = make("noise")
        model.decoder.compile(backend="aot_eager")
        settings = RolloutOptions(STEPS, guidance="none", compile=wanted)
        frames.append(rolled(model, settings, latents[:, :2], actions)[0])
    assert (frames[0] - frames[1]).abs().max() < TOLERANCE
    assert len(captured) == 1


# --- Objectives


def objective_of(frame: str, **flow) -> FlowObjective:
    return make_objective(make(frame), FlowOptions(**flow), 0)


def test_first_looks_are_noisy_and_change_no_other_draw(inputs):
    latents, *_ = inputs
    options = FlowOptions(noise_draws=2)
    draws = draw_noise(options, 3, [4, 5], latents, (N, 64), looks=True)
    without = draw_noise(options, 3, [4, 5], latents, (N, 64))
    alone = draw_noise(options, 3, [5], latents[1:], (N, 64), looks=True)
    for name in draws._fields:
        drawn = getattr(draws, name)
        assert torch.equal(drawn[1:], getattr(alone, name)), name
        if name not in ("look_level", "look_noise"):
            assert torch.equal(drawn, getattr(without, name)), name
    assert without.first_look(latents, 1) is None and without.pure_look(1) is None
    videos = latents[:1].expand(400, -1, -1, -1, -1)
    many = draw_noise(options, 3, list(range(400)), videos, None, looks=True)
    levels = many.look_level
    assert levels.min() >= 0.8 and levels.max() <= 1
    assert levels.min() < 0.801 and levels.max() > 0.999 and abs(levels.mean() - 0.9) < 0.005
    look, pure = draws.first_look(latents, 1), draws.pure_look(1)
    sigma = draws.look_level[:, 1:]
    mixed = sigma[..., None, None, None] * draws.look_noise[:, 1:]
    mixed = mixed + (1 - sigma[..., None, None, None]) * latents[:, 1:]
    assert torch.equal(look.noisy, mixed) and torch.equal(look.timesteps, 1000 * sigma)
    assert torch.equal(pure.noisy, draws.look_noise[:, 1:])
    assert pure.timesteps.unique().tolist() == [1000]


@torch.no_grad()
@pytest.mark.parametrize("frame", LOOKING)
def test_the_loss_is_the_velocity_error_under_the_drawn_looks(inputs, frame):
    latents, _, _, actions, _ = inputs
    made = objective_of(frame, noise_draws=2, context_noise=0.0, condition_dropout=0.0)
    draws = draw_noise(made.options, 0, [0, 1], latents, None, looks=True)
    sigma = torch.sigmoid(draws.level)[:, :, 1:]
    level = sigma[..., None, None, None]
    noisy = level * draws.noise[:, :, 1:] + (1 - level) * latents[:, None, 1:]
    look = draws.first_look(latents, 1)
    velocity = made.model(latents, noisy, 1000 * sigma, actions, first_look=look)
    expected = (velocity - (draws.noise - latents[:, None])[:, :, 1:]).square().mean()
    batch = {"sample": [0, 1], "latents": latents, "actions": actions}
    assert torch.allclose(made(batch)["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("frame", LOOKING)
@pytest.mark.parametrize("self_forcing_prob", [0.0, 1.0])
def test_every_parameter_learns(inputs, frame, self_forcing_prob):
    """And under gradient checkpointing the same."""
    latents, _, _, actions, _ = inputs
    made = objective_of(frame, condition_dropout=0.5, self_forcing_prob=self_forcing_prob)
    batch = {"sample": [0, 1], "step": 1, "latents": latents, "actions": actions}
    gradients = []
    for checkpointing in (False, True):
        made.model.set_gradient_checkpointing(checkpointing)
        made.model.zero_grad()
        made(batch)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in made.model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name


@torch.no_grad()
def test_errors_by_level_are_under_one_look(inputs):
    latents, noisy, _, actions, look = inputs
    model, look = make("noise"), FirstLook.pure(look.noisy[:, 1:])
    noise = noisy[:, None, 1:]
    errors = errors_by_level(model, latents, actions, noise, first_look=look)
    for number, sigma in enumerate(LEVELS):
        x = sigma * noise + (1 - sigma) * latents[:, None, 1:]
        times = torch.full((B, 1, F - 1), 1000 * sigma)
        v = model(latents, x, times, actions, first_look=look)[:, 0]
        expected = (v - (noise[:, 0] - latents[:, 1:])).square().mean(dim=(2, 3, 4))
        assert torch.allclose(errors[:, number], expected, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("of_teacher", FRAMES)
def test_consistency_distillation_looks_at_pure_noise(inputs, of_teacher, scale):
    """Teacher, target and student at the same; a teacher of the other kind needs none."""
    latents, _, _, actions, _ = inputs
    student, teacher = make("noise"), make(of_teacher, sigma_min=0.1)
    for parameter in teacher.parameters():
        parameter.mul_(0.9)
    options = Options(seed=3, distill=DistillOptions(levels=4, shift=2.0, guidance_scale=scale))
    options.flow = FlowOptions(noise_draws=1, condition_dropout=0.0)
    objective = ConsistencyObjective(student, teacher, options)
    draws = draw_noise(options.flow, 3, [0, 1], latents, None, looks=True)
    place = torch.rand(B, 1, F, generator=torch.Generator().manual_seed(4))
    found = objective.loss(latents, actions, draws, place)
    look = FirstLook.pure(draws.look_noise[:, 1:])
    levels = torch.tensor([1.0, 6 / 7, 2 / 3, 0.4, 0.0])  # 1, 3/4, 1/2, 1/4, 0 shifted by 2
    number = (place[:, :, 1:] * 4).long()
    sigma, following = levels[number], levels[number + 1]
    s, f = sigma[..., None, None, None], following[..., None, None, None]
    noisy = s * draws.noise[:, :, 1:] + (1 - s) * latents[:, None, 1:]

    def velocity(model: SCD, x: Tensor, levels: Tensor, conditions: Tensor = actions) -> Tensor:
        seen = look if model.takes_first_look else None
        return model(latents, x, 1000 * levels, conditions, first_look=seen)

    null = velocity(teacher, noisy, sigma, torch.full_like(actions, 3))
    v = null + scale * (velocity(teacher, noisy, sigma) - null)
    stepped = noisy - (s - f) * v
    target = clean_frames(stepped, velocity(student, stepped, following), 1000 * following)
    own = clean_frames(noisy, velocity(student, noisy, sigma), 1000 * sigma)
    torch.testing.assert_close(found, (own - target).square().mean(), rtol=1e-4, atol=1e-6)
    # What it draws itself has looks, whichever of the two needs them.
    batch = {"sample": [0, 1], "latents": latents, "actions": actions}
    assert objective(batch)["loss"].isfinite()
    assert ConsistencyObjective(teacher, student, options)(batch)["loss"].isfinite()


# --- Training, loading, refusals


@pytest.fixture
def options(doom_root: Path, tmp_path: Path, fresh_accelerate: None) -> Callable[..., Options]:
    small = [
        *(f"data.root={doom_root}", f"output_root={tmp_path}", "train.mixed_precision=fp32"),
        *("data.source=video", "data.frames=4", "autoencoder.path=null", "model.patch_size=16"),
        *("model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"),
        *("train.compile=false", "train.batch_size=2", "train.workers=0", "train.log_every=1"),
        *("eval.context_frames=4", "eval.new_frames=2", "eval.videos=2", "eval.comparisons=[]"),
    ]
    return lambda *own: load_options("options/scd_doom.yml", [*small, *own])


@pytest.mark.parametrize("frame", LOOKING)
def test_a_run_is_trained_validated_exported_and_evaluated(options, tmp_path, frame):
    history = ["flow.self_forcing_prob=0.5", "flow.history_noise_max=0.1"]
    run = options(
        f"model.encoder_frame={frame}", "train.steps=3", "train.val_loss_every=3", *history
    )
    run_experiment(run)
    log = read_log(run.output / "log.jsonl")
    assert [entry["loss"] > 0 for entry in log if "loss" in entry] == [True] * 3
    (held_out,) = [entry for entry in log if "val_loss" in entry]
    assert (
        torch.tensor([value for key, value in held_out.items() if "loss" in key]).isfinite().all()
    )
    exported = run.output / "exported"
    evaluate_checkpoint(exported, None, [], [], False)
    loaded = load_checkpoint_for_use(exported)
    assert loaded.model.config.encoder_frame == loaded.options.model.encoder_frame == frame
    assert SCDPipeline.from_pretrained(exported).transformer.config.encoder_frame == frame
    # One network in two passes or in one; another one with the clean frame alone.
    other = load_checkpoint_for_use(exported, None, ["model.encoder_frame=joint"])
    assert other.model.config.encoder_frame == "joint"
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    with pytest.raises(ScdError, match=f"encoder_frame is {frame} in the checkpoint, shift in"):
        load_checkpoint_for_use(exported, None, ["model.encoder_frame=shift"])
    with pytest.raises(ScdError, match=f"encoder_frame={frame} cannot be probed"):
        probe_checkpoint(exported, None, [], "2", 3, 0)


def test_a_model_from_before_the_option_shifts(tmp_path):
    model = make("shift", first_frame=True)
    config = {key: value for key, value in model.config.items() if key != "encoder_frame"}
    old = SCD.from_config(config)
    assert old.config.encoder_frame == "shift" and not old.takes_first_look
    assert old.state_dict().keys() == model.state_dict().keys()
    assert (old.start_slots, old.noisy_slots) == (1, 0)
    assert load_options("options/scd_doom.yml").model.encoder_frame == "shift"
    assert "encoder.start" not in make("noise", first_frame=True).state_dict()


def test_refusals(inputs):
    latents, noisy, times, actions, _ = inputs
    with pytest.raises(ScdError, match="encoder_frame=noise needs a first look"):
        make("noise").velocity(latents, noisy, times, actions)
    with pytest.raises(ScdError, match="no context without a first look"):
        make("joint").encode(latents, actions)
    with pytest.raises(ScdError, match=r"encoder_frame=noise contradicts model\.type=causal_dit"):
        load_options("options/causal_dit_doom.yml", ["model.encoder_frame=noise"])
    with pytest.raises(ScdError, match=r"model\.encoder_frame is 'nois'.*did you mean 'noise'"):
        load_options("options/scd_doom.yml", ["model.encoder_frame=nois"])


def test_a_model_refuses_what_it_does_not_take(inputs):
    latents, noisy, times, actions, look = inputs
    sizes = {"channels": C, "patch_size": 2, "heads": 1, "condition": "action"}
    dense = [kind(**sizes, num_conditions=3, layers=1) for kind in (CausalDiT, BidirectionalDiT)]
    drawn = latents, noisy[:, None, 1:], times[:, None, 1:], actions
    given = {
        "perturbation": torch.zeros(B, F - 1, N, 64),
        "first_look": last_frames(look, F - 1),
        "text": torch.zeros(B, 2, 8),
    }
    for model, refused in ((make("shift"), ["first_look", "text"]), *((d, given) for d in dense)):
        for name in refused:
            with pytest.raises(ScdError, match=f"takes no {name.replace('_', ' ')}"):
                model(*drawn, **{name: given[name]})
