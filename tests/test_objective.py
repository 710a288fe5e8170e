"""The training objective."""

from functools import partial
from itertools import combinations

import pytest
import torch

from scd.flow.noise import draw_noise
from scd.flow.objective import FlowObjective, errors_by_level
from scd.models import CausalDiT
from scd.models.world_model import FirstLook
from scd.options import FlowOptions
from scd.rollout import Rollout, resampling
from scd.rollout.resampling import Resampling, draw_resampling, resample
from scd.training.build import make_objective
from scd.utils.seeding import generator
from tests.test_model import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

B, F, C, H, W = 3, 4, 3, 4, 4
TOKENS = 4


def objective(model=None, **options) -> FlowObjective:
    return make_objective(model or make_model(channels=C), FlowOptions(**options), 0)


def draws_of(made: FlowObjective, latents, samples=(0, 1, 2), looks=False):
    shape = (TOKENS, made.model.width)
    return draw_noise(made.options, made.seed, list(samples), latents, shape, looks)


@pytest.fixture(scope="module")
def clips():
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, F, C, H, W, generator=g), torch.randint(0, 3, (B, F), generator=g)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_k_draws_are_k_separate_passes(clips, prediction):
    """One encoder pass for all draws, and every draw under the same actions (within 1e-6)."""
    latents, actions = clips
    made = objective(make_model(channels=C, prediction=prediction), noise_draws=3)
    draws = draws_of(made, latents)
    together = made.loss(latents, actions, draws)
    separate = [
        made.loss(
            latents,
            actions,
            draws._replace(level=draws.level[:, k : k + 1], noise=draws.noise[:, k : k + 1]),
        )
        for k in range(3)
    ]
    assert abs(together - sum(separate) / 3) < 1e-6 * together
    assert len({round(float(loss), 6) for loss in separate}) == 3


@torch.no_grad()
def test_loss_is_the_velocity_error_of_the_plain_model(clips):
    """Clean history, no dropout, no perturbation: exactly `model.velocity` against ε − x."""
    latents, actions = clips
    made = objective(noise_draws=1, context_noise=0.0, condition_dropout=0.0)
    draws = draws_of(made, latents)
    sigma = torch.sigmoid(draws.level[:, 0])
    level = sigma[..., None, None, None]
    noisy = level * draws.noise[:, 0] + (1 - level) * latents
    velocity = made.model.velocity(latents, noisy, sigma * 1000, actions)
    expected = (velocity - (draws.noise[:, 0] - latents)[:, 1:]).square().mean()
    assert torch.allclose(made.loss(latents, actions, draws), expected, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_a_perfect_prediction_has_no_loss(clips, prediction):
    """Nor at noise levels below `sigma_min`."""
    latents, actions = clips
    made = objective(make_model(channels=C, prediction=prediction), noise_draws=2)
    draws = draws_of(made, latents)
    draws.level[:, 0] = -5

    def perfect(noisy, context, e):
        clean = latents[:, 1:].repeat_interleave(2, dim=0)
        noise = draws.noise[:, :, 1:].flatten(0, 1)
        return clean if prediction == "data" else noise - clean

    made.model.decoder.forward = perfect
    assert made.loss(latents, actions, draws) < 1e-8


@torch.no_grad()
@pytest.mark.parametrize("self_forcing_prob", [0.0, 1.0])
def test_a_label_is_as_an_action_that_all_frames_have(clips, self_forcing_prob):
    """Also in the rollouts that resample a history."""
    latents, actions = clips
    labels, losses = actions[:, 0], []
    batch = {"latents": latents, "sample": [0, 1, 2], "step": 1}
    given = {"action": {"actions": labels[:, None].expand(-1, F)}, "label": {"label": labels}}
    for condition, conditions in given.items():
        made = objective(
            make_model(channels=C, condition=condition), self_forcing_prob=self_forcing_prob
        )
        losses.append(made({**batch, **conditions})["loss"])
    torch.testing.assert_close(*losses)


@torch.no_grad()
def test_no_level_is_measured_below_the_models_lowest(clips):
    """A velocity is divided by that one at least."""
    latents, actions = clips
    model = make_model(channels=C, prediction="data", sigma_min=0.2)
    noise = torch.randn(B, 1, F - 1, C, H, W, generator=torch.Generator().manual_seed(1))
    errors = errors_by_level(model, latents, actions, noise, levels=(0.0, 0.1, 0.2, 0.25))
    lowest = errors[:, 2:3].expand(-1, 2, -1)
    assert torch.allclose(errors[:, :2], lowest, rtol=1e-4)
    assert not torch.allclose(errors[:, 3], errors[:, 2], rtol=1e-2)


def test_draws_belong_to_the_sample_not_the_batch(clips):
    latents, _ = clips
    made = objective()
    whole = draws_of(made, latents, (4, 5, 6), looks=True)
    part = draws_of(made, latents[:1], (5,), looks=True)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[1:2], other)
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_no_two_draws_are_alike(clips):
    """Neither of one clip, nor those for different purposes (4 standard deviations)."""
    latents = clips[0][:1].expand(200, -1, -1, -1, -1)
    options = FlowOptions(noise_draws=2, encoder_input="mixed", history_noise_max=1.0)
    draws = draw_noise(options, 0, list(range(200)), latents, (3, 16), looks=True)
    normal = [*draws.noise.unbind(1), draws.look_noise, draws.context_noise.view_as(latents)]
    uniform = [*draws.prefix.unbind(1), draws.history_noise, 5 * (1 - draws.look_level[:, 0])]
    for alike in (normal, [*draws.level.unbind(1)], [12**0.5 * (u - 0.5) for u in uniform]):
        for one, other in combinations(alike, 2):
            assert abs((one * other).mean()) < 4 / one.numel() ** 0.5


def test_noise_levels_are_logit_normal(clips):
    latents, _ = clips
    made = objective(noise_draws=64)
    level = torch.cat([draws_of(made, latents[:1], (i,)).level.flatten() for i in range(20)])
    assert abs(level.mean()) < 0.05
    assert abs(level.std() - 1) < 0.05


@torch.no_grad()
def test_noise_levels_have_the_mean_and_spread_of_the_options(clips):
    """At timesteps 1000·sigmoid(mean + spread·z): the larger, the more noise."""
    latents, actions = clips
    made = objective(logit_mean=-0.5, logit_std=1.5)
    draws = draws_of(made, latents)
    times = []
    forward = made.model.forward
    made.model.forward = lambda *args, **named: (times.append(args[2]), forward(*args, **named))[1]
    made.loss(latents, actions, draws)
    expected = 1000 * torch.sigmoid(-0.5 + 1.5 * draws.level[:, :, 1:])
    torch.testing.assert_close(times[0], expected)


@torch.no_grad()
def test_encoder_input(clips):
    latents, actions = clips
    seen = {}
    for mode in ("clean", "noisy", "mixed"):
        made = objective(encoder_input=mode, clean_fraction=0.3)
        draws = draws_of(made, latents)
        seen[mode] = history_of(made, partial(made.loss, latents, actions, draws))
        clean = draws.clean_frame[:, :-1]
    many = draw_noise(
        made.options, 0, list(range(500)), latents[:1].expand(500, *latents[0].shape), None
    )
    assert abs(many.clean_frame.float().mean() - 0.3) < 0.04  # 2000 frames: 4 standard deviations
    history = latents[:, :-1]  # the last frame is nobody's
    assert torch.equal(seen["clean"], history)
    same = (seen["noisy"] == history).flatten(2).all(-1)
    assert not same.any()
    assert 0 < clean.sum() < clean.numel()
    assert torch.equal((seen["mixed"] == history).flatten(2).all(-1), clean)
    assert torch.equal(seen["mixed"][~clean], seen["noisy"][~clean])


def history_of(made: FlowObjective, compute):
    """What the encoder is shown when a loss is computed, last of all."""
    seen = []
    hook = made.model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    compute()
    hook.remove()
    return seen[-1]


@torch.no_grad()
def test_noise_in_the_history(clips):
    """One level a clip, drawn below the option's; the target stays the clean frame."""
    latents, actions = clips
    made = objective(history_noise_max=0.5)
    draws = draws_of(made, latents)
    assert (draws.history_noise > 0).all()
    assert (draws.history_noise < 0.5).all()
    assert len(set(draws.history_noise.tolist())) == B
    level = draws.history_noise[:, None, None, None, None]
    expected = level * draws.noise[:, 0] + (1 - level) * latents
    seen = history_of(made, lambda: made.loss(latents, actions, draws))
    assert torch.equal(seen, expected[:, :-1])
    silent = draws._replace(history_noise=torch.zeros(B))
    assert torch.equal(
        made.loss(latents, actions, silent), objective(made.model).loss(latents, actions, silent)
    )


# --- Histories that the model resamples

SIGMA = 0.7


def make(kind):
    if kind == "causal":
        torch.manual_seed(0)
        model = CausalDiT(C, patch_size=2, heads=1, layers=2, condition="action", num_conditions=3)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()
    return make_model(channels=C, encoder_frame=kind.split()[1])


def seeded():
    return [torch.Generator().manual_seed(number) for number in range(B)]


def batch_of(clips, samples=(4, 5, 6), step=1):
    latents, actions = clips
    return {"latents": latents, "actions": actions, "sample": list(samples), "step": step}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["scd shift", "scd noise", "scd joint", "causal"])
@pytest.mark.parametrize("given", [1, 3])
def test_a_resampled_frame_is_denoised_after_own_ones(clips, kind, given):
    """Two steps of second order from the noised real frame, by whole passes (within 1e-5)."""
    latents, actions = clips
    model = make(kind)
    made = resample(model, latents, Resampling(SIGMA, given), seeded(), actions)
    assert torch.equal(made[:, :given], latents[:, :given])
    seeds = seeded()
    noise = torch.stack([torch.randn(F - given, C, H, W, generator=seed) for seed in seeds])
    for j in range(given, F):
        x = SIGMA * noise[:, j - given] + (1 - SIGMA) * latents[:, j]
        look = None
        if model.takes_first_look:
            look = torch.stack([torch.randn(C, H, W, generator=seed) for seed in seeds])
            look = FirstLook.pure(look[:, None].repeat(1, j, 1, 1, 1))
        velocities = []
        for sigma in (SIGMA, SIGMA / 2):
            history = torch.cat([made[:, :j], x[:, None]], dim=1)
            times = torch.full((B, 1, j), 1000 * sigma)
            conditions = actions[:, : j + 1]
            velocities.append(
                model(history, history[:, None, 1:], times, conditions, first_look=look)[:, 0, -1]
            )
            newest = velocities[-1]
            x = x - SIGMA / 2 * (newest + (newest - velocities[0]) / 2)
        assert (made[:, j] - x).abs().max() < 1e-5
    near = resample(model, latents, Resampling(1e-4, given), seeded(), actions)
    assert (near - latents).abs().max() < 1e-2


@torch.no_grad()
def test_a_resampled_history(clips):
    """In the drawn share of steps; the loss is that of real frames after it."""
    latents, actions = clips
    made = objective(self_forcing_prob=0.5, self_forcing_sigma=[0.3, 0.9])
    drawn = [draw_resampling(made.options, 0, step, F) for step in range(200)]
    own = [how for how in drawn if how is not None]
    assert 70 < len(own) < 130 and {how.given for how in own} == {1, 2}
    assert 0.3 < min(how.sigma for how in own) < 0.35 < 0.85 < max(h.sigma for h in own) < 0.9
    step, plain = drawn.index(own[0]), drawn.index(None)
    batch = batch_of(clips, step=step)
    seeds = [generator("cpu", 0, "resampled", sample) for sample in batch["sample"]]
    expected = resample(made.model, latents, own[0], seeds, actions)
    assert torch.equal(history_of(made, lambda: made(batch)), expected[:, :-1])
    draws = draws_of(made, latents, batch["sample"])
    loss = made.loss(latents, actions, draws, history=expected)
    torch.testing.assert_close(made(batch)["loss"], loss)
    teacher_forced = made.loss(latents, actions, draws)
    assert loss != teacher_forced
    torch.testing.assert_close(made(batch_of(clips, step=plain))["loss"], teacher_forced)


def test_resampled_clips_do_not_depend_on_their_batch(clips):
    """Nor on the processes that share them: a step has one level, a clip its own noise."""
    latents, actions = clips
    made = objective(self_forcing_prob=1.0, self_forcing_sigma=[0.2, 0.9])
    whole = history_of(made, lambda: made(batch_of(clips)))
    part = batch_of((latents[1:2], actions[1:2]), samples=(5,))
    torch.testing.assert_close(history_of(made, lambda: made(part)), whole[1:2])
    other = history_of(made, lambda: made(batch_of(clips, step=2)))
    assert (other - whole).abs().max() > 1e-2 and not whole.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_histories_are_resampled_in_the_precision_of_the_step(clips, monkeypatch, autocast):
    precisions = []

    class Watched(Rollout):
        def __init__(self, model, settings, *rest):
            precisions.append(settings.precision)
            super().__init__(model, settings, *rest)

    monkeypatch.setattr(resampling, "Rollout", Watched)
    made = objective(self_forcing_prob=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made(batch_of(clips))
    assert precisions == ["bf16" if autocast else "fp32"]


@pytest.mark.parametrize("self_forcing_prob", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_under_autocast(clips, self_forcing_prob):
    """Though the same weights were used without gradients first, to resample the history."""
    made = objective(self_forcing_prob=self_forcing_prob)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(batch_of(clips))["loss"]
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


@torch.no_grad()
def test_condition_dropout_and_context_noise(clips):
    latents, actions = clips
    always = objective(condition_dropout=1.0)
    draws = draws_of(always, latents)
    assert draws.drop_condition.all()
    null = torch.full_like(actions, always.model.null_condition)
    assert torch.equal(always.loss(latents, actions, draws), always.loss(latents, null, draws))
    never = objective(condition_dropout=0.0)
    assert not draws_of(never, latents).drop_condition.any()
    calm, rough = objective(context_noise=0.0), objective(context_noise=1.0)
    assert calm.loss(latents, actions, draws) != rough.loss(latents, actions, draws)


def test_it_learns():
    """A few steps on one tiny clip bring the loss well down."""
    torch.manual_seed(0)
    from scd.models import SCD

    model = SCD(channels=C, patch_size=2, heads=1, encoder_layers=1, decoder_layers=1)
    made = objective(model)
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    batch = {"latents": torch.rand(2, F, C, H, W) * 2 - 1}
    losses = []
    for step in range(120):
        loss = made({"sample": torch.tensor([2 * step, 2 * step + 1]), **batch})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
