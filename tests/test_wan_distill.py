"""What the stages of training ask of Wans: replays, fewer frames, the teacher, dropped prompts."""

import pytest
import torch
from torch import Tensor, nn

from scd.distill.self_rollout import Generated, replay, roll_out
from scd.distill.teacher import GuidedTeacher
from scd.errors import ScdError
from scd.flow.objective import FlowObjective, dropped_text
from scd.models.world_model import FirstLook
from scd.options import FlowOptions, RolloutOptions
from scd.wan import BidirectionalWan, CausalWan, SCDWan
from tests.test_wan import (
    CONCAT,
    EXACT,
    MIDDLE,
    NOISE,
    SHIFT,
    SPLITS,
    TEXT,
    B,
    C,
    F,
    H,
    T,
    W,
    disturbed,
    make,
    name,
    singles,
    tiny_wan,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = RolloutOptions(
    3, "consistency", "even", 5.0, 4, guidance="none", guidance_scale=1.0
)  # the first frame has a step more
FROM_TEXT = [{}, *({**split, "first_frame": True} for split in SPLITS)]


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, ...]:
    """Clean and noisy frames, noise levels and a text, in double precision."""
    generator = torch.Generator().manual_seed(2)
    latents, noisy = torch.randn(2, B, F, C, H, W, generator=generator, dtype=torch.float64)
    times = 1000 * torch.rand(B, F, generator=generator, dtype=torch.float64)
    return latents, noisy, times, torch.randn(B, T, TEXT, generator=generator).double()


def rolled_out(
    model, inputs, known: int, exit_at: float
) -> tuple[Generated, Tensor | None, Tensor]:
    latents, _, _, text = singles(*inputs)
    actions = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]]) if model.config.num_actions else None
    generators = [torch.Generator().manual_seed(seed) for seed in range(B)]
    context, new = latents[:, :known], F - known
    rollout = roll_out(model, SETTINGS, context, new, exit_at, actions, None, generators, text)
    return rollout, actions, text


@pytest.mark.parametrize("exit_at", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("config", "known"),
    [*((config, 0) for config in FROM_TEXT), *((config, 2) for config in [{}, *SPLITS])],
    ids=lambda value: name(value) if isinstance(value, dict) else str(value),
)
def test_a_replay_equals_its_rollout(inputs, config, known, exit_at):
    model = make(config, num_actions=3)
    rollout, actions, text = rolled_out(model, inputs, known, exit_at)
    assert rollout.frames.shape == (B, F - known, C, H, W)
    assert (rollout.first_look is None) == (config.get("encoder_frame") != "noise")
    for history_gradient in (True, False):
        with torch.no_grad():
            frames = replay(model, rollout, actions, history_gradient, text)
        torch.testing.assert_close(frames, rollout.frames, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        other = replay(model, rollout, actions, True, text + 1)
    assert (other - rollout.frames).abs().max() > 1e-2


@pytest.mark.parametrize("config", FROM_TEXT, ids=name)
def test_without_history_gradient_a_frame_teaches_only_its_own_passes(inputs, config):
    model = make(config)
    rollout, _, text = rolled_out(model, inputs, 0, 0.5)
    embedding = (model.encoder if config else model).patch_embedding
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    embedding.register_forward_hook(watch)
    reached = []
    for history_gradient in (True, False):
        seen.clear()
        replay(model, rollout, None, history_gradient, text)[:, -1].sum().backward()
        moved = seen[0].grad.unflatten(0, (B, -1)).abs().amax(dim=(0, 2, 3, 4, 5)) > 0
        reached.append(moved.tolist())
    clean = F - 1
    if config.get("encoder_frame") == "shift":  # the own pass is that over frame i - 1
        assert reached == [[True] * clean, [False] * (clean - 1) + [True]]
    else:  # clean frames come first in one sequence with noisy ones
        assert reached[0][:clean] == [True] * clean and reached[1][:clean] == [False] * clean
        assert reached[0][clean:] == reached[1][clean:] == [False] * (F - 1) + [True]


@torch.no_grad()
@pytest.mark.parametrize("config", [*FROM_TEXT, {"chunk_frames": 2}], ids=name)
def test_the_last_frames_alone(inputs, config):
    """F' noisy frames after F - F' given ones are the last of F noisy frames."""
    latents, noisy, times, text = inputs
    chunk = config.get("chunk_frames", 1)
    model = make(config, num_actions=3 if chunk == 1 else 0).double()
    actions = torch.tensor([[0, 1, 2, 0]] * B) if chunk == 1 else None
    look = FirstLook(noisy.flip(0), times.flip(1)) if model.takes_first_look else None
    whole = model(latents, noisy[:, None], times[:, None], actions, first_look=look, text=text)
    for count in range(chunk, F, chunk):
        last = slice(F - count, None)
        found = model(
            latents,
            noisy[:, None, last],
            times[:, None, last],
            actions,
            first_look=look and FirstLook(*(part[:, last] for part in look)),
            text=text,
        )
        assert (found - whole[:, :, last]).abs().max() < EXACT


def test_the_last_frames_are_whole_chunks(inputs):
    latents, noisy, times, text = inputs
    model = make({"chunk_frames": 2}).double()
    with pytest.raises(ScdError, match="3 noisy frames are no whole chunks of 2"):
        model(latents, noisy[:, None, 1:], times[:, None, 1:], None, text=text)


@torch.no_grad()
def test_the_bidirectional_model_is_diffusers_own(inputs):
    """Of a whole clip at one noise level; and given frames are clean tokens at timestep 0."""
    latents, noisy, _, text = singles(*inputs)
    wan = tiny_wan()
    model, level = BidirectionalWan.from_wan(wan), torch.tensor([300.0, 800.0])
    times = level[:, None].repeat(1, F)
    expected = wan(noisy.transpose(1, 2), level, text).sample.transpose(1, 2)
    found = model.velocity(latents, noisy, times, text=text)
    assert (found - expected).abs().max() < 1e-5 < expected.std()
    clip = torch.cat([latents[:, :2], noisy[:, 2:]], dim=1)
    times[:, :2] = 0
    tokens = times.repeat_interleave(model.tokens_per_frame(H, W), dim=1)
    expected = wan(clip.transpose(1, 2), tokens, text).sample.transpose(1, 2)[:, 2:]
    times[:, :2] = -1
    given = model.velocity(latents, noisy, times, text=text)[:, 2:]
    fewer = model(latents, noisy[:, None, 2:], times[:, None, 2:], None, text=text)[:, 0]
    assert (given - expected).abs().max() < 1e-5 and (fewer - expected).abs().max() < 1e-5
    times[:, :3] = -1  # more given than noisy frames
    given = model.velocity(latents, noisy, times, text=text)[:, 2:]
    fewer = model(latents, noisy[:, None, 3:], times[:, None, 3:], None, text=text)[:, 0]
    assert (given[:, 1:] - fewer).abs().max() < 1e-5
    times[:, 2] = level
    given = model.velocity(latents, noisy, times, text=text)[:, 2:]
    acting = BidirectionalWan.from_wan(wan, num_actions=3)
    actions = torch.tensor([[0, 1, 2, 0]] * B)
    assert torch.equal(acting.velocity(latents, noisy, times, actions, text=text)[:, 2:], given)
    with torch.no_grad():
        disturbed(acting.action_embedding)
    moved = acting.velocity(latents, noisy, times, actions, text=text)[:, 2:]
    assert (moved - given).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("actions", [False, True])
def test_guidance_leads_away_from_no_prompt_and_no_action(inputs, actions):
    latents, noisy, times, text = inputs
    model = make(SHIFT | CONCAT | {"first_frame": True}, num_actions=3 if actions else 0).double()
    given = torch.tensor([[0, 1, 2, 0]] * B) if actions else None
    drawn, empty = (latents, noisy[:, None], times[:, None]), torch.zeros_like(text[:1])
    found = GuidedTeacher(model, 3.0)(*drawn, given, text=text, null_text=empty)
    null = torch.full_like(given, 3) if actions else None
    positive = model(*drawn, given, text=text)
    negative = model(*drawn, null, text=empty.expand_as(text))
    assert (found - (negative + 3 * (positive - negative))).abs().max() < EXACT


@pytest.mark.parametrize("config", [{}, SHIFT | CONCAT, NOISE | MIDDLE], ids=name)
def test_the_flow_matching_loss_of_a_wan(inputs, config):
    """Of velocities ε − x, under the clip's own text, or under none where it is dropped."""
    latents, _, _, text = singles(*inputs)
    model, seen = make(config), []
    batch = {"sample": [3, 4], "latents": latents, "text": text, "null_text": 0 * text[:1]}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    for dropout in (0.0, 1.0):
        seen.clear()
        options = FlowOptions(noise_draws=2, context_noise=0.0, condition_dropout=dropout)
        loss = FlowObjective(model, options, 0)(batch)["loss"]
        ((history, noisy, times, *_), more), first = seen[0], model.first_predicted
        assert torch.equal(more["text"], text if dropout == 0 else 0 * text)
        sigma, clean = times[..., None, None, None] / 1000, latents[:, None, first:]
        target = (noisy - clean) / sigma  # ε − x
        with torch.no_grad():
            velocity = model(history, noisy, times, None, **more)
        torch.testing.assert_close(loss, (velocity - target).square().mean(), rtol=1e-3, atol=1e-4)
        if (look := more["first_look"]) is not None:  # of high noise, and other than the draws'
            assert (look.timesteps > 800).all()
            apart = (look.noisy - noisy[:, 0]).flatten(2).std(dim=2)
            assert (apart > 0.5).all()


def test_prompts_are_dropped_clip_by_clip(inputs):
    text = inputs[3]
    batch = {"text": text, "null_text": torch.ones_like(text[:1])}
    found = dropped_text(batch, torch.tensor([False, True]))
    assert torch.equal(found[0], text[0]) and (found[1] == 1).all()
    assert dropped_text({}, torch.tensor([True])) is None


def test_types_of_models():
    assert isinstance(make({}), CausalWan) and isinstance(make(SPLITS[0]), SCDWan)
    assert [make(split).takes_first_look for split in SPLITS] == [False, False, True, True]
