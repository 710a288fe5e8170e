"""The dense baseline, and predicting first frames with either model."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from scd.errors import ScdError
from scd.flow.objective import FlowObjective
from scd.flow.sampler import noise_levels
from scd.models import SCD, CausalDiT, attention, cpu, masks, teacher_forcing
from scd.options import FlowOptions, RolloutOptions
from scd.rollout import Rollout, generate

B, F, C, H, W = 2, 5, 4, 4, 6
K, NEW, STEPS = 3, 2, 3
TOLERANCE = 5e-5  # absolute, fp32


def make(kind=CausalDiT, **config):
    layers = {"layers": 3} if kind is CausalDiT else {"encoder_layers": 2, "decoder_layers": 1}
    defaults = {"channels": C, "patch_size": 2, "heads": 1, "condition": "action"}
    torch.manual_seed(0)
    model = kind(**{**defaults, "num_conditions": 3, **layers, **config})
    for parameter in model.parameters():  # nothing starts at zero, so everything has a say
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    latents, noisy = torch.randn(2, B, F, C, H, W, generator=g)
    times = 1000 * torch.rand(B, F, generator=g)
    return latents, noisy, times, torch.randint(0, 3, (B, F), generator=g)


@torch.no_grad()
def test_dense_equals_a_mask_over_the_whole_sequence(inputs):
    """[clean ‖ noisy] under one explicit mask, in all ways the attention is computed."""
    n, first, heads = 3, 1, 2
    clean, frames = F - 1, F - first
    g = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, B, heads, (clean + 2 * frames) * n, 16, generator=g)
    owner = torch.tensor([0] * clean + [1] * frames + [2] * frames).repeat_interleave(n)
    frame = torch.tensor([*range(clean), *range(first, F), *range(first, F)]).repeat_interleave(n)
    sees_clean = (owner == 0) & (frame < frame[:, None])
    own = (owner == owner[:, None]) & (frame == frame[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, sees_clean | own)
    for at_once in (1, 6, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "QUERIES_AT_ONCE", at_once)
            found = attention.clean_context_attention(q, k, v, n, clean, first)
        assert (found - expected).abs().max() < 1e-5
    # What CUDA computes long sequences with.
    tokens = q.shape[2]
    admits = masks.clean_context(n, clean, first)
    blocks = attention.make_block_mask(admits, n, tokens, tokens, q.device)
    assert (flex_attention(q, k, v, block_mask=blocks) - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", [CausalDiT, SCD])
@pytest.mark.parametrize("first_frame", [False, True])
def test_causal_to_the_bit(inputs, kind, first_frame):
    """A later frame, clean or noisy, moves nothing before it; an earlier one moves what follows."""
    latents, noisy, times, actions = inputs
    model = make(kind, first_frame=first_frame)
    first = model.first_predicted
    before = model.velocity(latents, noisy, times, actions)
    assert before.shape == (B, F - first, C, H, W)
    for j in range(F):
        changed = latents.clone()
        changed[:, j] += 1
        after = model.velocity(changed, noisy, times, actions)
        moved = (after != before).flatten(2).any(-1)[0].tolist()
        assert moved == [i > j for i in range(first, F)], j
        changed = noisy.clone()
        changed[:, j] += 1
        after = model.velocity(latents, changed, times, actions)
        moved = (after != before).flatten(2).any(-1)[0].tolist()
        assert moved == [i == j for i in range(first, F)], j
        # Action i leads to frame i: to it and, through the history, to what follows.
        other = actions.clone()
        other[:, j] = (other[:, j] + 1) % 3
        after = model.velocity(latents, noisy, times, other)
        moved = (after != before).flatten(2).any(-1)[0].tolist()
        first_seen = j >= first or kind is CausalDiT  # SCD has no use for the action of frame 0
        assert moved == [i >= j and first_seen for i in range(first, F)], j


@torch.no_grad()
@pytest.mark.parametrize("kind", [CausalDiT, SCD])
@pytest.mark.parametrize("known", [0, 1, 3])
@pytest.mark.parametrize(("guidance", "scale"), [("none", 1.0), ("condition", 1.7)])
def test_cached_rollout_equals_teacher_forcing(inputs, kind, known, guidance, scale):
    """Every generated frame is what `velocity` gives without a cache, on the same history."""
    _, noise, _, actions = inputs
    model = make(kind, first_frame=known == 0 or known == 1)
    g = torch.Generator().manual_seed(4)
    context = torch.randn(B, known, C, H, W, generator=g)
    noise, actions = noise[:, :NEW], actions[:, : known + NEW]
    new = generate(
        model,
        context,
        actions=actions,
        num_frames=NEW,
        num_steps=STEPS,
        guidance=guidance,
        guidance_scale=scale,
        noise=noise,
    )
    history, null = context, torch.full_like(actions, model.null_condition)
    for i in range(NEW):
        x, n = noise[:, i : i + 1], known + i
        for sigma, following in pairwise(noise_levels(STEPS)):
            frames = torch.cat([history, x], dim=1)
            times = torch.full((B, n + 1), 1000 * sigma)
            v = model.velocity(frames, frames, times, actions[:, : n + 1])[:, -1:]
            if guidance == "condition":
                without = model.velocity(frames, frames, times, null[:, : n + 1])[:, -1:]
                v = without + scale * (v - without)
            x = x + (following - sigma) * v
        history = torch.cat([history, x], dim=1)
    assert (new - history[:, known:]).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("first_frame", [False, True])
def test_a_sliding_window_shows_so_many_past_frames(monkeypatch, kept, first_frame):
    """A noisy frame sees the window's frames and itself, as an SCD's sees the window's: against
    attention under an explicit mask, one denoising step."""
    model, window, frames, n = make(first_frame=first_frame), 4, 9, 6
    g = torch.Generator().manual_seed(5)
    video, noise = torch.randn(2, B, frames + 1, C, H, W, generator=g)
    actions = torch.randint(0, 3, (B, frames + 1), generator=g)
    rollout = Rollout(model, RolloutOptions(1, guidance="none", window=window, sink_frames=kept))
    found = {}
    for known in range(2, frames + 1):
        rollout.reset(video[:, :known], actions[:, :known])
        found[known] = rollout.step(actions[:, known], noise[:, known])

    def masked(q, k, v, tokens_per_frame, clean_frames, first, **_):
        frame = torch.tensor([*range(clean_frames), *range(first, clean_frames + 1)])
        frame = frame.repeat_interleave(n)
        token = torch.arange(len(frame))
        mask = masks.clean_context(n, clean_frames, first)(token[:, None], token[None])
        near = frame[:, None] - frame[None] <= window - kept
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask & (near | (frame[None] < kept))
        )

    monkeypatch.setattr(teacher_forcing, "clean_context_attention", masked)
    for known, frame in found.items():
        sequence = torch.cat([video[:, :known], noise[:, known : known + 1]], dim=1)
        times = torch.full((B, known + 1), 1000.0)
        v = model.velocity(sequence, sequence, times, actions[:, : known + 1])[:, -1]
        assert (frame - (noise[:, known] - v)).abs().max() < TOLERANCE, known


@torch.no_grad()
@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_k_draws_are_k_separate_passes(inputs, kind):
    latents, noisy, times, actions = inputs
    model = make(kind, first_frame=True)
    two = torch.stack([noisy, noisy.flip(1)], dim=1), torch.stack([times, times.flip(1)], dim=1)
    together = model(latents, *two, actions)
    for k in range(2):
        one = model(latents, two[0][:, k : k + 1], two[1][:, k : k + 1], actions)
        assert (together[:, k : k + 1] - one).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_trains_every_parameter(inputs, kind, prediction):
    """Also the start that first frames begin from, and under gradient checkpointing the same."""
    latents, _, _, actions = inputs
    model = make(kind, first_frame=True, prediction=prediction).train()
    objective = FlowObjective(model, FlowOptions(condition_dropout=0.5), 0)
    batch = {"sample": torch.arange(B), "latents": latents, "actions": actions}
    gradients = []
    for checkpointing in (False, True):
        model.set_gradient_checkpointing(checkpointing)
        model.zero_grad()
        objective(batch)["loss"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name


def test_sizes_are_the_published_ones():
    """B, M, L and XL: about 130, 230, 457 and 674 million parameters (FAR, arXiv 2503.19325)."""
    for heads, layers, published in ((12, 12, 130), (16, 12, 230), (16, 24, 457), (18, 28, 674)):
        with torch.device("meta"):
            model = CausalDiT(heads=heads, layers=layers)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert abs(millions / published - 1) < 0.02, (heads, layers, millions)


def test_refusals(inputs):
    with pytest.raises(ScdError, match="CausalDiT has no separate context"):
        Rollout(make(), RolloutOptions(2, guidance_scale=2.0), 4)
    nothing = torch.zeros(B, 0, C, H, W)
    for kind in (CausalDiT, SCD):
        with pytest.raises(ScdError, match="at least one context frame"):
            generate(make(kind), nothing, num_frames=1, num_steps=1)


@torch.no_grad()
def test_a_first_frame_is_sampled_under_its_label():
    """Videos from nothing: the label and the noise decide; SCD's context guidance works too."""
    for kind, guidance in ((SCD, "context"), (SCD, "condition"), (CausalDiT, "condition")):
        model = make(kind, first_frame=True, condition="label")
        noise = torch.randn(B, NEW, C, H, W, generator=torch.Generator().manual_seed(6))

        def run(labels, model=model, guidance=guidance, noise=noise):
            return generate(
                model,
                torch.zeros(B, 0, C, H, W),
                labels=labels,
                num_frames=NEW,
                num_steps=2,
                guidance=guidance,
                guidance_scale=1.5,
                noise=noise,
                generator=torch.Generator().manual_seed(7),
            )

        one, other = run(torch.tensor([0, 1])), run(torch.tensor([0, 2]))
        assert torch.equal(one[0], other[0])
        assert (one[1, 0] != other[1, 0]).any()
