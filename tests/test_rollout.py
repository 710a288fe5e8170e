"""The rollout engine against the plain network, and against itself in other forms."""

import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from scd.errors import ScdError
from scd.flow.sampler import noise_levels
from scd.models import SCD, CausalDiT, WorldModel, encoder
from scd.options import RolloutOptions
from scd.rollout import Rollout, cache, continue_videos, engine, generate
from scd.utils import precision
from tests.test_model import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, NEW, C, H, W = 2, 4, 3, 4, 4, 6
STEPS = 4
TOLERANCE = 5e-5  # absolute, fp32; measured: about 3e-6


def plain(steps, **settings):
    """Settings without guidance."""
    return RolloutOptions(steps, guidance="none", **settings)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(3)
    context = torch.randn(B, K, C, H, W, generator=g)
    noise = torch.randn(B, NEW, C, H, W, generator=g)
    return context, noise, torch.randint(0, 3, (B, K + NEW), generator=g)


@torch.no_grad()
def plain_rollout(model, context, noise, actions, guidance="none", scale=1.0):
    """Without cache: the encoder over the whole history for every frame."""
    frames = context
    levels = noise_levels(STEPS)
    for i in range(noise.shape[1]):
        known = frames.shape[1]
        conditions = actions[:, 1 : known + 1]
        null = torch.full_like(conditions, model.null_condition)
        positive = model.encoder(frames, conditions)[:, -1:]
        negative = model.encoder(frames, null)[:, -1:]
        x = noise[:, i : i + 1]
        for sigma, following in pairwise(levels):
            t = torch.full((B, 1), sigma * 1000)
            v = model.decode(x, t, positive, conditions[:, -1:])
            if guidance == "condition":
                v_negative = model.decode(x, t, negative, null[:, -1:])
                v = v_negative + scale * (v - v_negative)
            x = x + (following - sigma) * v
        frames = torch.cat([frames, x], dim=1)
    return frames[:, context.shape[1] :]


@pytest.mark.parametrize(
    ("guidance", "scale"), [("none", 1.0), ("condition", 1.7), ("condition", 0.5)]
)
def test_cached_equals_uncached(model, inputs, guidance, scale):
    context, noise, actions = inputs
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
    expected = plain_rollout(model, context, noise, actions, guidance, scale)
    assert (new - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_consistency_written_out(model, inputs, scale):
    """Every step but the last adds noise that is drawn after the frame's initial noise."""
    context, _, actions = inputs
    settings = RolloutOptions(
        STEPS, "consistency", "even", 5.0, guidance="condition", guidance_scale=scale
    )
    seed = torch.Generator().manual_seed(7)
    new = continue_videos(model, settings, context, NEW, actions, generator=seed)
    seed, frames, levels = torch.Generator().manual_seed(7), context, noise_levels(STEPS, "even", 5)
    for i in range(NEW):
        conditions = actions[:, 1 : K + i + 1]
        null = torch.full_like(conditions, model.null_condition)
        positive, negative = (model.encoder(frames, c)[:, -1:] for c in (conditions, null))
        x = torch.randn(B, C, H, W, generator=seed)[:, None]
        fresh = torch.randn(B, STEPS - 1, C, H, W, generator=seed)
        for step, sigma in enumerate(levels[:-1]):
            t = torch.full((B, 1), sigma * 1000)
            v = model.decode(x, t, negative, null[:, -1:])
            v = v + scale * (model.decode(x, t, positive, conditions[:, -1:]) - v)
            x = x - sigma * v
            if step < STEPS - 1:
                x = (1 - levels[step + 1]) * x + levels[step + 1] * fresh[:, step : step + 1]
        frames = torch.cat([frames, x], dim=1)
    assert (new - frames[:, K:]).abs().max() < TOLERANCE


@torch.no_grad()
def test_context_guidance_written_out(model, inputs):
    """The negative branch is the same context with η·ζ added before the modulation."""
    context, noise, actions = inputs
    scale, eta = 2.0, 0.3
    new = continue_videos(
        model,
        RolloutOptions(STEPS, guidance_scale=scale, guidance_noise=eta),
        context,
        1,
        actions[:, : K + 1],
        noise=noise[:, :1],
        generator=torch.Generator().manual_seed(5),
    )
    zeta = torch.randn(B, 6, model.width, generator=torch.Generator().manual_seed(5))
    conditions = actions[:, 1 : K + 1]
    positive = model.encoder(context, conditions)[:, -1:]
    perturbation = torch.zeros(B, K, 6, model.width)
    perturbation[:, -1] = eta * zeta
    negative = model.encoder(context, conditions, perturbation=perturbation)[:, -1:]
    x = noise[:, :1]
    levels = noise_levels(STEPS)
    for sigma, following in pairwise(levels):
        t = torch.full((B, 1), sigma * 1000)
        plus, minus = (model.decode(x, t, c, actions[:, K : K + 1]) for c in (positive, negative))
        x = x + (following - sigma) * (minus + scale * (plus - minus))
    assert (new - x).abs().max() < TOLERANCE


def test_streaming_equals_batch(model, inputs):
    context, noise, actions = inputs
    whole = generate(model, context, actions=actions, num_frames=NEW, num_steps=STEPS, noise=noise)
    for b in range(B):
        one = slice(b, b + 1)
        rollout = Rollout(model, plain(STEPS), K + NEW)
        rollout.reset(context[one], actions[one, :K])
        for i in range(NEW):
            frame = rollout.step(actions[one, K + i], noise[one, i])
            assert (frame - whole[one, i]).abs().max() < TOLERANCE


@pytest.mark.parametrize("solver", ["euler", "consistency"])
@pytest.mark.parametrize("guidance", ["none", "context", "condition"])
def test_a_sample_does_not_depend_on_its_batch(model, inputs, guidance, solver):
    """Same seed, same video."""
    context, _, actions = inputs
    settings = RolloutOptions(STEPS, solver, guidance=guidance, guidance_scale=1.5)

    def run(rows):
        generators = [torch.Generator().manual_seed(int(row)) for row in rows]
        return continue_videos(
            model, settings, context[rows], NEW, actions[rows], generator=generators
        )

    both, swapped = run(torch.tensor([0, 1])), run(torch.tensor([1, 0]))
    assert (both - swapped.flip(0)).abs().max() < TOLERANCE
    assert (run(torch.tensor([1])) - both[1:]).abs().max() < TOLERANCE
    assert (both[0] - both[1]).abs().max() > 0.1


def test_stream_and_reset(model, inputs):
    context, _, actions = inputs
    rollout = Rollout(model, plain(STEPS), K + NEW)

    def run():
        rollout.reset(context, actions[:, :K], generator=torch.Generator().manual_seed(1))
        return torch.stack(list(rollout.stream(actions[:, K:].T)), dim=1)

    assert torch.equal(run(), run())


def test_a_later_action_does_not_change_an_earlier_frame(model, inputs):
    context, noise, actions = inputs
    changed = actions.clone()
    changed[:, K + 1] = (changed[:, K + 1] + 1) % 3
    common = {"num_frames": NEW, "num_steps": STEPS, "noise": noise}
    before = generate(model, context, actions=actions, **common)
    after = generate(model, context, actions=changed, **common)
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1] != after[:, 1]).any()


def test_prefill_in_chunks_equals_at_once(model, inputs):
    """A cache filled frame by frame holds what one pass writes."""
    context, _, actions = inputs
    at_once = cache.KVCache(model, B, cache.Window(K), 6)
    by_frame = cache.KVCache(model, B, cache.Window(K), 6)
    with torch.no_grad():
        table = model.encoder.precompute_modulation(torch.arange(4))
        modulation = table[actions[:, :K]]
        whole = model.encoder.prefill(context, modulation, at_once)
        for i in range(K):
            part = slice(i, i + 1)
            single = model.encoder.prefill(context[:, part], modulation[:, part], by_frame)
            assert (single - whole[:, part]).abs().max() < TOLERANCE
        contexts = model.encoder.context(whole, modulation)
        assert (contexts - model.encoder(context, actions[:, :K])).abs().max() < TOLERANCE
    assert at_once.frames == by_frame.frames == K
    assert (at_once.keys - by_frame.keys).abs().max() < TOLERANCE


@pytest.mark.parametrize("solver", ["euler", "consistency"])
def test_compiled_steps_change_nothing(model, inputs, solver):
    """The path of tensors that CUDA captures; here the graph is the function itself."""
    context, noise, actions = inputs
    frames = []
    compiled = make_model()
    compiled.decoder.compile(backend="aot_eager")
    for candidate, wanted in ((model, False), (compiled, True)):
        settings = RolloutOptions(STEPS, solver, guidance_scale=1.5, compile=wanted)
        seed = torch.Generator().manual_seed(2)
        frames.append(
            continue_videos(candidate, settings, context, NEW, actions, noise=noise, generator=seed)
        )
    assert (frames[0] - frames[1]).abs().max() < TOLERANCE
    dense = CausalDiT(channels=C, heads=1, layers=1)
    with pytest.raises(ScdError, match="can be compiled"):
        Rollout(dense, RolloutOptions(STEPS, guidance="none", compile=True), 8)


def make_dense():
    torch.manual_seed(0)
    model = CausalDiT(C, heads=1, layers=2, condition="action", num_conditions=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("exit_step", range(STEPS))
@pytest.mark.parametrize("make", [make_model, make_dense])
def test_an_exit_is_what_teacher_forcing_predicts(inputs, make, exit_step):
    """On the same history, from the same noisy frame; it becomes the history of the next frame."""
    context, noise, actions = inputs
    model, levels = make(), noise_levels(STEPS, "even", 5.0)
    rollout = Rollout(model, plain(STEPS, solver="consistency", spacing="even", shift=5.0), K + NEW)
    rollout.reset(context, actions[:, :K], generator=torch.Generator().manual_seed(3))
    history, seed = context, torch.Generator().manual_seed(3)
    for i in range(NEW):
        frame, noisy, sigma, look = rollout.step_to_exit(exit_step, actions[:, K + i], noise[:, i])
        assert look is None
        assert noisy.shape == frame.shape == (B, C, H, W) and sigma == levels[exit_step]
        # The same noise is drawn whatever the exit, and the noisy frame holds that of its level.
        fresh = torch.randn(B, STEPS - 1, C, H, W, generator=seed)
        clips = torch.cat([history, noisy[:, None]], dim=1)
        if exit_step == 0:
            assert torch.equal(noisy, noise[:, i])
        times = torch.full((B, 1, K + i), 1000 * sigma)
        velocity = model(clips, clips[:, None, 1:], times, actions[:, : K + i + 1])[:, 0, -1]
        assert (frame - (noisy - sigma * velocity)).abs().max() < 1e-4
        if exit_step:
            before = (noisy - sigma * fresh[:, exit_step - 1]) / (1 - sigma)
            x = noise[:, i]
            for step, (level, following) in enumerate(pairwise(levels[: exit_step + 1])):
                clips[:, -1] = x
                times = torch.full((B, 1, K + i), 1000 * level)
                v = model(clips, clips[:, None, 1:], times, actions[:, : K + i + 1])[:, 0, -1]
                clean = x - level * v
                x = (1 - following) * clean + following * fresh[:, step]
            assert (before - clean).abs().max() < 1e-3
        history = torch.cat([history, frame[:, None]], dim=1)


def test_temperature_scales_the_noise(model, inputs):
    context, _, actions = inputs
    seed = torch.Generator().manual_seed(3)
    drawn = torch.randn(B, C, H, W, generator=seed)
    made = continue_videos(
        *(model, plain(STEPS, temperature=0.5), context, 1, actions[:, : K + 1]),
        generator=seed.manual_seed(3),
    )
    given = continue_videos(
        *(model, plain(STEPS), context, 1, actions[:, : K + 1]), noise=0.5 * drawn[:, None]
    )
    assert torch.equal(made, given)


@pytest.mark.parametrize("guidance", ["none", "condition", "context"])
def test_the_last_exit_is_the_frame(model, inputs, guidance):
    """To the bit, also where the first frame has more steps; then an exit is one of its steps."""
    context, _, actions = inputs
    settings = RolloutOptions(2, "consistency", first_frame_steps=3, guidance=guidance)
    rollout = Rollout(model, settings, K + NEW)

    def reset():
        rollout.reset(context, actions[:, :K], generator=torch.Generator().manual_seed(3))

    reset()
    frames = [rollout.step(actions[:, K + i]) for i in range(2)]
    reset()
    exits = [rollout.step_to_exit(2 - i, actions[:, K + i]) for i in range(2)]
    assert all(torch.equal(frame, left.frame) for frame, left in zip(frames, exits, strict=True))
    assert [left.sigma for left in exits] == [rollout.first_levels[2], rollout.levels[1]]


def test_exits_that_are_refused(model, inputs, monkeypatch):
    context, _, actions = inputs

    def exit_at(step, **settings):
        rollout = Rollout(model, plain(2, **settings), K + NEW)
        rollout.reset(context, actions[:, :K])
        rollout.step_to_exit(step, actions[:, K])

    with pytest.raises(ScdError, match=r"needs rollout\.solver=consistency, not euler"):
        exit_at(0)
    for step in (-1, 2):
        with pytest.raises(ScdError, match=rf"exit_step={step} is not one .* steps 0\.\.1"):
            exit_at(step, solver="consistency")
    monkeypatch.setattr(SCD, "compile_steps", lambda model: None)
    with pytest.raises(ScdError, match=r"cannot be used with rollout\.compile"):
        exit_at(0, solver="consistency", compile=True)


@pytest.mark.parametrize("solver", ["multistep", "consistency"])
@pytest.mark.parametrize("kind", ["scd", "dense", "vectors"])
def test_first_frame_has_steps_of_its_own(inputs, kind, solver):
    """It is a rollout's of so many steps to the bit, and every later frame one's of the others."""
    context, noise, actions = inputs
    model = make_dense() if kind == "dense" else make_model()
    if kind == "vectors":
        model = make_model(condition="action_vector")
        actions = torch.nn.functional.one_hot(actions, 3)
    settings = plain(2, solver=solver, spacing="even", shift=3.0)
    rollouts = [
        Rollout(model, replace(settings, **changes), K + NEW)
        for changes in ({"first_frame_steps": 5}, {"steps": 5}, {})
    ]
    for _ in range(2):  # after another reset, it is the first frame again
        for rollout in rollouts:
            rollout.reset(context, actions[:, :K])
        for i in range(NEW):
            frames = []
            for rollout in rollouts:
                rollout._generator = torch.Generator().manual_seed(i)
                frames.append(rollout.step(actions[:, K + i], noise[:, i]))
            mixed, five, two = frames
            assert torch.equal(mixed, five if i == 0 else two)
            assert (five - two).abs().max() > 1e-3
            for rollout in rollouts[1:]:  # the same history for all
                rollout._newest = mixed[:, None]


def test_steps_of_the_first_frame_are_not_captured(model, inputs, monkeypatch):
    """The graph is that of the frames to come, and makes what they are without one."""
    context, noise, actions = inputs
    captured = []
    monkeypatch.setattr(
        engine, "graphed", lambda function, given: captured.append(given) or function
    )
    monkeypatch.setattr(SCD, "compile_steps", lambda model: None)  # slow, and not what is shown
    frames = []
    for wanted in (False, True):
        settings = plain(2, solver="consistency", first_frame_steps=3, compile=wanted)
        seed = torch.Generator().manual_seed(2)
        frames.append(
            continue_videos(model, settings, context, NEW, actions, noise=noise, generator=seed)
        )
    assert torch.equal(*frames)
    assert [given[0].shape[1] for given in captured] == [2]  # noises of two steps, once


def test_guidance_only_on_an_interval_of_noise_levels(model, inputs):
    """Steps from other levels run the positive branch alone."""
    context, noise, actions = inputs

    def rolled(interval, scale=3.0):
        batches = []
        hook = model.decoder.register_forward_pre_hook(
            lambda _, given: batches.append(len(given[0]))
        )
        settings = RolloutOptions(
            4, guidance="condition", guidance_scale=scale, guidance_interval=interval
        )
        new = continue_videos(model, settings, context, 1, actions[:, : K + 1], noise=noise[:, :1])
        hook.remove()
        return new, batches

    everywhere, batches = rolled([0.0, 1.0])
    assert batches == [2 * B] * 4
    nowhere, batches = rolled([0.9, 0.95])
    assert batches == [B] * 4
    unguided, _ = rolled([0.0, 1.0], scale=1.0)
    assert (nowhere - unguided).abs().max() < TOLERANCE
    between, batches = rolled([0.3, 0.7])  # levels 1, 0.667, 0.334, 0.001
    assert batches == [B, 2 * B, 2 * B, B]
    assert (between - everywhere).abs().max() > 1e-3 < (between - nowhere).abs().max()


def test_labels_and_no_condition(inputs):
    context, noise, _ = inputs
    for config, given in (
        ({"condition": "label", "num_conditions": 5}, {"labels": torch.tensor([1, 4])}),
        ({"condition": "none", "num_conditions": 0}, {}),
    ):
        model = make_model(**config)
        new = generate(
            model,
            context,
            num_frames=NEW,
            num_steps=STEPS,
            guidance_scale=1.5,
            noise=noise,
            **given,
        )
        assert new.shape == (B, NEW, C, H, W)
        assert torch.isfinite(new).all()


def test_bf16_model_stays_near_fp32(inputs):
    context, noise, actions = inputs
    common = {"num_frames": NEW, "num_steps": STEPS, "noise": noise, "actions": actions}
    exact = generate(make_model(), context, **common)
    rough = generate(make_model().to(torch.bfloat16), context, **common)
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.05


def test_precision_of_a_rollout(monkeypatch: pytest.MonkeyPatch, inputs) -> None:
    """`bf16` is what a copy of the model in bf16 does; the model itself stays as it is."""
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    context, _, actions = inputs
    model, copied = make_model(), make_model().to(torch.bfloat16)
    made = {}
    for name, used, wanted in (("named", model, "bf16"), ("copied", copied, "fp32")):
        rollout = Rollout(used, RolloutOptions(STEPS, guidance="none", precision=wanted), K + NEW)
        rollout.reset(context, actions[:, :K], generator=torch.Generator().manual_seed(0))
        made[name] = torch.stack(list(rollout.stream(actions[:, K:].T)))
        assert rollout.precision == "bf16"
    assert torch.equal(made["named"], made["copied"])
    assert model.dtype == torch.float32
    # No TF32 on a CPU, and no bf16 where it is slow: not even of weights in bf16.
    assert Rollout(model, RolloutOptions(precision="tf32"), 2).precision == "fp32"
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    slow = [Rollout(model, RolloutOptions(precision="auto"), 2), Rollout(copied, plain(1), 2)]
    assert [(r.precision, r.model.dtype) for r in slow] == [("fp32", torch.float32)] * 2


@pytest.mark.parametrize("prediction", ["data", "velocity"])
@pytest.mark.parametrize("kind", ["scd", "causal_dit"])
def test_what_is_divided_by_sigma_is_not_rounded(
    monkeypatch: pytest.MonkeyPatch, kind: str, prediction: str
) -> None:
    """Of a model in bf16, or under autocast, the stream of tokens is float32 where the prediction
    is the clean frame; its last norm and Linear always."""
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    model = _of_kind(kind, prediction)
    core = model.decoder if kind == "scd" else model
    seen: dict[str, set[torch.dtype]] = {"block": set(), "norm": set(), "out": set()}
    core.blocks[-1].register_forward_pre_hook(lambda _, args: seen["block"].add(args[0].dtype))
    core.norm_out.register_forward_pre_hook(lambda _, args: seen["norm"].add(args[0].dtype))
    core.unembed.register_forward_hook(lambda _, args, out: seen["out"].add(out.dtype))
    latents = torch.randn(1, 3, C, H, W)
    with torch.autocast("cpu", torch.bfloat16):
        model.velocity(latents, latents, torch.full((1, 3), 500.0))
    generate(model.bfloat16(), latents, num_frames=1, num_steps=2, guidance="none")
    of_blocks = torch.float32 if prediction == "data" else torch.bfloat16
    assert seen == {"block": {of_blocks}, "norm": {torch.float32}, "out": {torch.float32}}


def _of_kind(kind: str, prediction: str) -> WorldModel:
    torch.manual_seed(0)
    if kind == "scd":
        return SCD(C, heads=1, encoder_layers=1, decoder_layers=2, prediction=prediction).eval()
    return CausalDiT(C, heads=1, layers=2, prediction=prediction).eval()


def test_refusals(model, inputs):
    context, noise, actions = inputs
    common = {"num_frames": NEW, "num_steps": STEPS}
    with pytest.raises(ScdError, match="one a context frame and one a new frame"):
        generate(model, context, actions=actions[:, :-1], **common)
    with pytest.raises(ScdError, match="noise is"):
        generate(model, context, actions=actions, noise=noise[:, 1:], **common)
    with pytest.raises(ScdError, match="guidance is 'foo'"):
        generate(model, context, actions=actions, guidance="foo", **common)
    for wrong in ({"solver": "heun"}, {"spacing": "evn"}):  # not Euler without a word
        with pytest.raises(ScdError, match="not one of"):
            Rollout(model, RolloutOptions(STEPS, **wrong), K)
    unconditional = make_model(condition="none", num_conditions=0)
    with pytest.raises(ScdError, match="needs a model with a condition"):
        generate(unconditional, context, guidance="condition", guidance_scale=2.0, **common)
    rollout = Rollout(model, plain(1), K + 1)
    with pytest.raises(ScdError, match="before reset"):
        rollout.step()
    rollout.reset(context, actions[:, :K])
    rollout.step(actions[:, K])
    rollout.step(actions[:, K + 1])  # encodes the last frame that fits
    with pytest.raises(ScdError, match="is full"):
        rollout.step(actions[:, K + 2])


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("first_frame", [False, True])
def test_a_sliding_window_equals_the_frames_it_shows(kept, first_frame):
    """Every frame of a stream longer than its window, against attention under an explicit mask.

    A query sees, in every layer, the newest frames of the window and the first ones that are kept;
    positions keep counting.
    """
    model = make_model(first_frame=first_frame)
    window, frames = 4, 11
    g = torch.Generator().manual_seed(8)
    video = torch.randn(B, frames + 1, C, H, W, generator=g)
    actions = torch.randint(0, 3, (B, frames + 1), generator=g)
    rollout = Rollout(model, plain(1, window=window, sink_frames=kept))
    start = 1 - model.first_predicted
    seen = []
    for known in range(2, frames + 1):
        rollout.reset(video[:, :known], actions[:, :known])
        hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        rollout.step(actions[:, known])
        hook.remove()

    index = torch.arange(frames + start)
    shown = index[None] > index[:, None] - (window + start if not kept else window - kept)
    if kept:
        shown |= index[None] < kept + start
    mask = (shown & (index[None] <= index[:, None])).repeat_interleave(6, 0).repeat_interleave(6, 1)

    def masked(q, k, v, **_):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "block_causal_attention", masked)
        expected = model.encoder(video[:, :-1], actions[:, model.first_predicted :])
    for known, context in zip(range(2, frames + 1), seen, strict=True):
        one = expected[:, known - model.first_predicted : known - model.first_predicted + 1]
        assert (context - one).abs().max() < TOLERANCE, known


@torch.no_grad()
def test_the_history_is_nobody_elses(inputs):
    """What a caller does to its context, or to frames that were given out, changes nothing."""
    context, _, actions = inputs
    frames = []
    for spoil in (False, True):
        rollout, mine = Rollout(make_model(), plain(2, window=8)), context.clone()
        rollout.reset(mine, actions[:, :K], generator=torch.Generator().manual_seed(1))
        made = []
        for i in range(2):
            if spoil:
                mine.zero_()
            made.append((frame := rollout.step(actions[:, K + i])).clone())
            if spoil:
                frame.zero_()
        frames.append(torch.stack(made))
    assert torch.equal(*frames)


@torch.no_grad()
def test_a_refused_reset_leaves_no_video(inputs):
    context, _, actions = inputs
    rollout = Rollout(make_model(), plain(1, window=8))
    rollout.reset(context, actions[:, :K])
    old = weakref.ref(rollout.cache)
    for wrong in (
        lambda: rollout.reset(context, actions[:, :K], labels=torch.zeros(B)),
        lambda: rollout.reset(context, actions[:, : K - 1]),
        lambda: rollout.reset(context[:, :, :1], actions[:, :K]),
        lambda: rollout.reset(context[0], actions[:, :K]),
        lambda: rollout.reset(context, actions[:, :K].float()),
    ):
        with pytest.raises(ScdError):
            wrong()
    assert old() is None
    rollout.reset(context, actions[:, :K])
    with pytest.MonkeyPatch.context() as patch:  # too late for the checks

        def fails(*_):
            raise torch.OutOfMemoryError("no memory")

        patch.setattr(rollout, "_prefill", fails)
        with pytest.raises(torch.OutOfMemoryError):
            rollout.reset(context, actions[:, :K])
    with pytest.raises(ScdError, match="step before reset"):
        rollout.step(actions[:, K])


@torch.no_grad()
def test_noise_that_does_not_fit(inputs):
    context, _, actions = inputs
    rollout = Rollout(make_model(), plain(1, window=8))
    rollout.reset(context, actions[:, :K])
    with pytest.raises(ScdError, match="noise has shape"):  # one for all samples
        rollout.step(actions[:, K], torch.randn(1, C, H, W))
    generators = [torch.Generator() for _ in range(B + 1)]  # a list of one is for all
    rollout.reset(context, actions[:, :K], generator=generators)
    with pytest.raises(ScdError, match=f"{B + 1} generators for {B} samples"):
        rollout.step(actions[:, K])
    with pytest.raises(ScdError, match="at least one frame"):
        continue_videos(make_model(), plain(1), context, 0, actions[:, :K])


@torch.no_grad()
def test_small_integers_are_actions(inputs):
    context, _, actions = inputs
    both = [
        continue_videos(make_model(), plain(1), context, 1, given, generator=fixed)
        for given in (actions[:, : K + 1], actions[:, : K + 1].to(torch.uint8))
        for fixed in [torch.Generator().manual_seed(0)]
    ]
    assert torch.equal(*both)


def test_wrong_labels_are_refused(inputs):
    context, _, _ = inputs
    labelled = make_model(condition="label", num_conditions=5)
    with pytest.raises(ScdError, match=r"0\.\.5"):
        Rollout(labelled, plain(1), 8).reset(context, labels=torch.tensor([1, 500]))
    with pytest.raises(ScdError, match="actions given"):
        Rollout(labelled, plain(1), 8).reset(context, torch.zeros(B, K, dtype=torch.long))
    unconditional = make_model(condition="none", num_conditions=0)
    with pytest.raises(ScdError, match="labels given"):
        Rollout(unconditional, plain(1), 8).reset(context, labels=torch.tensor([3, 3]))


@torch.no_grad()
def test_a_stream_without_end(inputs):
    """Constant memory and no drift: 60 frames through a window of 4, two streams side by side."""
    context, _, actions = inputs
    model = make_model()
    streams = [Rollout(model, plain(1, window=4, sink_frames=kept)) for kept in (0, 1)]
    alone = Rollout(model, plain(1, window=4))
    for rollout in (*streams, alone):
        rollout.reset(context, actions[:, :K], generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        frame, _ = [rollout.step(actions[:, 0]) for rollout in streams]
    for _ in range(60):
        single = alone.step(actions[:, 0])
    assert torch.equal(frame, single) and torch.isfinite(frame).all()
    assert streams[0].cache.frames == K - 1 + 60
    assert streams[0].cache.keys.shape[3] == 4 * 6


def test_windows_that_cannot_be():
    for bad in (
        {"frames": 0},
        {"frames": 2, "sink_frames": 2},
        {"frames": 2, "when_full": "wrap"},
    ):
        with pytest.raises(ScdError):
            cache.Window(**bad)
