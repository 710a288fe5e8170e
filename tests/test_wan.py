"""Wan as a causal and as a separable model: against diffusers' own network, and against itself."""

from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from scd.errors import ScdError
from scd.flow.sampler import noise_levels
from scd.models.attention import within_frames_attention
from scd.models.config import own_config
from scd.models.world_model import FirstLook
from scd.options import RolloutOptions
from scd.rollout import Rollout
from scd.rollout.cache import KVCache, Window
from scd.utils.precision import with_weights_in
from scd.wan import CausalWan, SCDWan

pytestmark = pytest.mark.usefixtures("one_thread")

B, F, C, H, W, T, TEXT = 2, 4, 16, 4, 6, 5, 32
LAYERS = 4
TOLERANCE = 1e-4  # absolute, fp32; velocities are about 1
EXACT = 1e-8  # absolute, fp64
SHIFT, NOISE = {"encoder_frame": "shift"}, {"encoder_frame": "noise"}
CONCAT, MIDDLE = {"fusion": "token_concat"}, {"fusion": "middle"}
SPLITS = [SHIFT | CONCAT, SHIFT | MIDDLE, NOISE | CONCAT, NOISE | MIDDLE]
FROM_NOTHING = [{**split, "first_frame": True} for split in (SPLITS[0], SPLITS[3])]
KINDS = [{}, {"chunk_frames": 2}, *SPLITS, *FROM_NOTHING]


def name(config: dict) -> str:
    return "-".join(str(value) for value in config.values()) or "causal"


def tiny_wan(**config) -> WanTransformer3DModel:
    """A random Wan in which nothing is zero or one, so that everything has a say."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": TEXT, "ffn_dim": 32}
    torch.manual_seed(0)
    wan = WanTransformer3DModel(**{**sizes, "num_layers": LAYERS, "rope_max_seq_len": 32, **config})
    return disturbed(wan)


@torch.no_grad()
def disturbed(model, std: float = 0.1):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(config: dict, disturb: bool = True, **more) -> CausalWan | SCDWan:
    """A CausalWan, or the SCDWan of a split."""
    if "encoder_frame" in config:
        sizes = {"encoder_layers": 3, "decoder_first": 1, "decoder_last": 1}
        model = SCDWan.from_wan(tiny_wan(), **{**sizes, **config, **more})
    else:
        model = CausalWan.from_wan(tiny_wan(), **config, **more)
    return disturbed(model) if disturb else model


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(2)
    latents, noisy = torch.randn(2, B, F, C, H, W, generator=g, dtype=torch.float64)
    times = 1000 * torch.rand(B, F, generator=g, dtype=torch.float64)
    text = torch.randn(B, T, TEXT, generator=g, dtype=torch.float64)
    return latents, noisy, times, text


def velocity(model, latents, noisy, times, text, actions=None) -> Tensor:
    """What a model predicts whose encoder, if it takes a first look, sees the noisy frames."""
    first = model.first_predicted
    look = FirstLook(noisy[:, first:], times[:, first:]) if model.takes_first_look else None
    return model.velocity(latents, noisy, times, actions, first_look=look, text=text)


def singles(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"attention_head_dim": 128, "num_attention_heads": 1},  # rotary of 44, 42 and 42
        {"attention_head_dim": 16, "num_attention_heads": 3},
        {"patch_size": (1, 1, 1)},
        {"patch_size": (1, 1, 2), "cross_attn_norm": False},
        {"patch_size": (1, 4, 3), "qk_norm": None},
    ],
    ids=name,
)
def test_one_frame_is_diffusers_own_output(inputs, config):
    """And so is one chunk, whose frames have noise levels of their own."""
    latents, noisy, times, text = singles(*inputs)
    wan = tiny_wan(**config)
    model = CausalWan.from_wan(wan)
    found = model.velocity(latents[:, :1], noisy[:, :1], times[:, :1], text=text)
    expected = wan(noisy[:, :1].transpose(1, 2), times[:, 0], text).sample.transpose(1, 2)
    assert (found - expected).abs().max() < 1e-5 < expected.std()
    chunk = CausalWan.from_wan(wan, chunk_frames=F).velocity(latents, noisy, times, text=text)
    tokens = times.repeat_interleave(model.tokens_per_frame(H, W), dim=1)
    expected = wan(noisy.transpose(1, 2), tokens, text).sample.transpose(1, 2)
    assert (chunk - expected).abs().max() < 1e-5 < expected.std()


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["token_concat", "middle"])
def test_an_scd_by_diffusers_own_blocks(inputs, fusion):
    """The second of two frames: encoder and decoder put together from another implementation."""
    latents, noisy, times, text = singles(*inputs)
    wan = tiny_wan()
    scd = SCDWan.from_wan(wan, 3, 1, 2, fusion=fusion)
    embedder = wan.condition_embedder
    past, present = latents[:, :1].transpose(1, 2), noisy[:, 1:2].transpose(1, 2)
    rotary = wan.rope(past)

    def embed(frame: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        e, vectors, tokens, _ = embedder(t, text)
        return wan.patch_embedding(frame).flatten(2).transpose(1, 2), e, vectors, tokens

    x, _, vectors, tokens = embed(past, torch.zeros(B))
    for block in wan.blocks[:3]:
        x = block(x, tokens, vectors.unflatten(1, (6, -1)), rotary)
    context = x
    x, e, vectors, tokens = embed(present, times[:, 1])
    vectors, n = vectors.unflatten(1, (6, -1)), x.shape[1]
    if fusion == "token_concat":
        x, twice = torch.cat([context, x], dim=1), [table.repeat(1, 2, 1, 1) for table in rotary]
        for block in (wan.blocks[0], *wan.blocks[2:]):
            x = block(x, tokens, vectors, twice)
    else:
        torch.nn.init.normal_(scd.decoder.fuse.weight, std=0.1)
        x = context + scd.decoder.fuse(wan.blocks[0](x, tokens, vectors, rotary))
        for block in wan.blocks[2:]:
            x = block(x, tokens, vectors, rotary)
    shift, scale = (wan.scale_shift_table + e[:, None]).chunk(2, dim=1)
    x = wan.proj_out(wan.norm_out(x[:, -n:]) * (1 + scale) + shift)
    x = x.reshape(B, H // 2, W // 2, 2, 2, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
    found = scd.velocity(latents[:, :2], noisy[:, :2], times[:, :2], text=text)
    assert (found[:, 0] - x).abs().max() < 1e-5 < x.std()


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS, ids=name)
def test_frames_depend_on_earlier_ones_alone(inputs, config):
    """A later frame, clean or noisy, moves nothing before it; an earlier one moves what follows."""
    latents, noisy, times, text = inputs
    model = make(config, num_actions=0 if "chunk_frames" in config else 3).double()
    actions = torch.randint(0, 3, (B, F)) if model.config.num_actions else None
    first, chunk = model.first_predicted, model.chunk_frames
    before = velocity(model, latents, noisy, times, text, actions)
    assert before.shape == (B, F - first, C, H, W)

    def moved(*arguments) -> list[bool]:
        change = (velocity(model, *arguments) - before).abs().amax(dim=(0, 2, 3, 4))
        assert ((change < 1e-12) | (change > 1e-6)).all()
        return (change > 1e-6).tolist()

    for j in range(F):
        changed = latents.clone()
        changed[:, j] += 1
        frames = range(first, F)
        found = moved(changed, noisy, times, text, actions)
        assert found == [i // chunk > j // chunk for i in frames], j
        changed = noisy.clone()
        changed[:, j] += 1
        found = moved(latents, changed, times, text, actions)
        assert found == [i // chunk == j // chunk for i in frames], j
        if actions is not None:  # action i leads to frame i
            other = actions.clone()
            other[:, j] = (other[:, j] + 1) % 3
            found = moved(latents, noisy, times, text, other)
            unused = j < first and not model.noisy_slots  # `shift` never sees the first action
            assert found == [i >= j and not unused for i in frames], j
    assert all(moved(latents, noisy, times, text + 1, actions))
    shorter = F - chunk  # a prefix of the video is a video
    prefix = [part[:, :shorter] for part in (latents, noisy, times)]
    given = None if actions is None else actions[:, :shorter]
    found = velocity(model, *prefix, text, given)
    assert (found - before[:, : shorter - first]).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "guided"),
    [*((config, True) for config in KINDS), ({}, False), (FROM_NOTHING[1], False)],
    ids=lambda value: name(value) if isinstance(value, dict) else f"guided {value}",
)
def test_a_rollout_is_the_teacher_forced_network(inputs, config, guided):
    """Every frame of a cached rollout is what `velocity` gives on the same history."""
    latents, _, _, text = singles(*inputs)
    model = make(config, num_actions=0 if "chunk_frames" in config else 3)
    chunk, negative, scale = model.chunk_frames, -text, 2.0 if guided else 1.0
    settings = RolloutOptions(3, guidance="condition", guidance_scale=scale, shift=5.0)
    actions = torch.randint(0, 3, (B, F + 2)) if model.config.num_actions else None
    null = None if actions is None else torch.full_like(actions, 3)
    known = chunk if "chunk_frames" in config else model.first_predicted + 1
    for start in {model.first_predicted, known}:
        new = 2 * chunk
        rollout = Rollout(model, settings, start + new)
        generators = [torch.Generator().manual_seed(seed) for seed in range(B)]
        past = None if actions is None else actions[:, :start]
        rollout.reset(latents[:, :start], past, None, generators, text, negative)
        given = [None if actions is None else actions[:, start + i] for i in range(new)]
        made = torch.stack(list(rollout.stream(given)), dim=1)

        generators = [torch.Generator().manual_seed(seed) for seed in range(B)]
        history = latents[:, :start]
        for _ in range(new // chunk):
            # Every frame takes its noise in turn, each sample from a generator of its own.
            draws = [[torch.randn(C, H, W, generator=g) for g in generators] for _ in range(chunk)]
            noise = torch.stack([torch.stack(draw) for draw in draws], dim=1)
            seen = noise
            if model.takes_first_look:  # of noise of its own
                draw = [torch.randn(C, H, W, generator=g) for g in generators]
                seen = torch.stack(draw)[:, None]
            x, n = noise, history.shape[1] + chunk
            for sigma, following in pairwise(noise_levels(3, shift=5.0)):

                def predict(text, actions, history=history, x=x, n=n, sigma=sigma, seen=seen):
                    padded = torch.cat([history, torch.zeros_like(x)], dim=1)
                    frames = torch.cat([torch.zeros_like(history), x], dim=1)
                    looks = torch.cat([torch.zeros_like(history), seen], dim=1)
                    first, times = model.first_predicted, torch.full((B, n), 1000.0)
                    look = FirstLook(looks[:, first:], times[:, first:])
                    more = {"first_look": look} if model.takes_first_look else {}
                    return model(
                        padded,
                        frames[:, None, first:],
                        sigma * times[:, None, first:],
                        None if actions is None else actions[:, :n],
                        text=text,
                        **more,
                    )[:, 0, -x.shape[1] :]

                v = predict(text, actions)
                if guided:
                    without = predict(negative, null)
                    v = without + scale * (v - without)
                x = x + (following - sigma) * v
            history = torch.cat([history, x], dim=1)
        assert (made - history[:, start:]).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS, ids=name)
def test_cached_and_uncached_agree_in_double_precision(inputs, config):
    """One frame or chunk after a prefilled history, at one noise level."""
    latents, noisy, _, text = inputs
    model = make(config).double()
    chunk, first = model.chunk_frames, model.first_predicted
    cache = KVCache(model, B, Window(F // chunk + 1), model.tokens_per_frame(H, W) * chunk)
    cache.text = model.precompute_text(text)
    level = torch.tensor([1000.0], dtype=torch.float64)
    modulation = model.precompute_modulation(torch.zeros(1, dtype=torch.long), level)
    ids, known = torch.zeros(B, F + 1, dtype=torch.long), F - 2 * chunk
    started = known + model.start_slots
    model.prefill(latents[:, :known], ids[:, :known], ids[:, :started], cache, modulation)
    newest, noise = latents[:, known : known + chunk], noisy[:, known + chunk :]
    denoiser = model.begin_frame(newest, ids[:, :1], ids[:, :1], cache, modulation, None, noise)
    found = denoiser(noise, 0)
    times = torch.full((B, F), 1000.0, dtype=torch.float64)
    expected = velocity(model, latents, noisy, times, text)[:, F - chunk - first :]
    assert (found - expected).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("config", [{}, SHIFT | CONCAT, NOISE | MIDDLE], ids=name)
def test_a_sliding_window_forgets_what_lies_behind_it(inputs, config, kept):
    """A frame far behind the window has no influence, but as a sink frame; positions count on."""
    model = make(config)
    g = torch.Generator().manual_seed(3)
    video, text = torch.randn(B, 12, C, H, W, generator=g), inputs[3].float()
    settings = RolloutOptions(1, guidance="none", window=2, sink_frames=kept)
    rollout, noise = Rollout(model, settings), torch.randn(B, C, H, W, generator=g)

    def next_frame(video: Tensor) -> Tensor:
        rollout.reset(video, generator=torch.Generator().manual_seed(4), text=text)
        return rollout.step(noise=noise)

    before = next_frame(video)
    changes = []
    for frame in (0, 1, 11):  # what a layer forgets, the one below may still know
        changed = video.clone()
        changed[:, frame] += 1
        changes.append((next_frame(changed) - before).abs().max() > 1e-6)
    assert changes == [kept == 1, False, True]


@torch.no_grad()
def test_a_stream_may_start_at_any_position(inputs):
    """Attention sees distances alone, far behind the positions that diffusers' tables hold."""
    latents, _, _, text = inputs
    model = make({}).double()
    layers, n = len(model.blocks), model.tokens_per_frame(H, W)
    texts = [model.embed_text(text)] * layers
    modulation = model.modulation(torch.zeros(B, F, dtype=torch.float64), None)

    def run(first: int) -> Tensor:
        rotary = model.rotary(torch.arange(first, first + F), latents)
        attends = [lambda q, k, v: causal_attention(q, k, v, n)] * layers
        return model.run(model.embed(latents), modulation, rotary, attends, texts)

    # The tables are in single precision, as Wan's are.
    assert (run(0) - run(5000)).abs().max() < 1e-5
    assert (run(0) - run(-1)).abs().max() < 1e-5


def causal_attention(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    frame = torch.arange(q.shape[2]) // n
    mask = frame[None] <= frame[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


@torch.no_grad()
def test_the_middle_fusion_starts_as_wan_itself(inputs, monkeypatch):
    """At the encoder's noise level, with the last layers inside a frame; frame 0 is exactly Wan."""
    latents, noisy, times, text = singles(*inputs)
    wan = tiny_wan()
    sizes = {"encoder_layers": 3, "decoder_first": 2, "decoder_last": 1, "first_frame": True}
    scd = SCDWan.from_wan(wan, **sizes, **NOISE, **MIDDLE)
    found = velocity(scd, latents, noisy, times, text)
    expected = wan(noisy[:, :1].transpose(1, 2), times[:, 0], text).sample.transpose(1, 2)
    assert (found[:, :1] - expected).abs().max() < 1e-5 < expected.std()

    causal, run = CausalWan.from_wan(wan), CausalWan.run

    def inside_frames_at_the_end(self, x, modulation, rotary, attends, texts):
        def inside(q, k, v):
            return within_frames_attention(q, k, v, x.shape[1])

        return run(self, x, modulation, rotary, [*attends[:3], inside], texts)

    dense = causal.velocity(latents, noisy, times, text=text)
    monkeypatch.setattr(CausalWan, "run", inside_frames_at_the_end)
    expected = causal.velocity(latents, noisy, times, text=text)
    assert (found - expected).abs().max() < 1e-5
    assert (dense - expected)[:, 1:].abs().max() > 1e-3  # the last layer does look back in Wan
    # Other fusions and interfaces have no such start.
    other = SCDWan.from_wan(wan, **sizes, **NOISE, **CONCAT)
    other = velocity(other, latents, noisy, times, text)
    assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("config", [SHIFT | CONCAT, NOISE | MIDDLE], ids=name)
def test_context_guidance_perturbs_in_units_of_the_context(inputs, config):
    """One step of a rollout against `forward` with and without the perturbation."""
    latents, noisy, _, text = singles(*inputs)
    model, actions = make(config, num_actions=3), torch.tensor([[0, 1, 2], [2, 0, 1]])
    settings = RolloutOptions(1, guidance_scale=1.5, guidance_noise=0.1)
    rollout = Rollout(model, settings, 3)
    generator = torch.Generator().manual_seed(4)
    rollout.reset(latents[:, :2], actions[:, :2], generator=generator, text=text)
    found = rollout.step(actions[:, 2], noise=noisy[:, 2])

    generator.manual_seed(4)
    look = None
    if model.takes_first_look:
        look = FirstLook.pure(
            torch.randn(B, C, H, W, generator=generator)[:, None].repeat(1, 2, 1, 1, 1)
        )
    zeta = torch.randn(B, model.tokens_per_frame(H, W), model.width, generator=generator)
    zeta = 0.1 * zeta[:, None].expand(-1, 2, -1, -1)
    parts = latents[:, :3], noisy[:, None, 1:3], torch.full((B, 1, 2), 1000.0), actions
    positive, negative = (
        model(*parts, perturbation=p, first_look=look, text=text)[:, 0, 1] for p in (None, zeta)
    )
    expected = noisy[:, 2] - (negative + 1.5 * (positive - negative))
    assert (found - expected).abs().max() < TOLERANCE
    assert 0.01 < (positive - negative).abs().max() < 1


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS, ids=name)
def test_k_draws_are_k_separate_passes(inputs, config):
    latents, noisy, times, text = inputs
    model = make(config).double()
    first = model.first_predicted
    look = FirstLook(noisy.flip(0)[:, first:], times.flip(1)[:, first:])
    more = {"first_look": look} if model.takes_first_look else {}
    noisy, times = (torch.stack([x, x.flip(1)], dim=1)[:, :, first:] for x in (noisy, times))
    together = model(latents, noisy, times, None, text=text, **more)
    for k in range(2):
        one = slice(k, k + 1)
        alone = model(latents, noisy[:, one], times[:, one], None, text=text, **more)
        assert (together[:, one] - alone).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("config", SPLITS, ids=name)
def test_each_half_runs_once_as_a_module(inputs, config):
    """So that hooks fire, and `train.compile`, which compiles the halves' own calls, has them."""
    model, calls = make(config), []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda part, *_: calls.append(part))
    velocity(model, *singles(*inputs))
    assert calls == [model.encoder, model.decoder]


@pytest.mark.parametrize("config", KINDS, ids=name)
def test_every_parameter_learns(inputs, config):
    """Zero-started ones too; and under gradient checkpointing alike."""
    latents, noisy, times, text = inputs
    model = make(config, num_actions=0 if "chunk_frames" in config else 3).double().train()
    actions = torch.tensor([[0, 1, 2, 3]] * B) if model.config.num_actions else None
    gradients = []
    for checkpointing in (False, True):
        model.set_gradient_checkpointing(checkpointing)
        model.zero_grad()
        v = velocity(model, latents, noisy, times, text, actions)
        (v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, key
        assert torch.allclose(gradient, gradients[1][key], rtol=1e-9), key


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, *SPLITS], ids=name)
def test_actions_start_without_effect(inputs, config):
    latents, noisy, times, text = inputs
    plain, acting = make(config, disturb=False), make(config, disturb=False, num_actions=3)
    actions = torch.tensor([[0, 1, 2, 3]] * B)
    expected = velocity(plain.double(), latents, noisy, times, text)
    assert torch.equal(velocity(acting.double(), latents, noisy, times, text, actions), expected)
    assert torch.equal(velocity(acting, latents, noisy, times, text), expected)
    with pytest.raises(ScdError, match=r"conditions must lie in 0\.\.3"):
        velocity(acting, latents, noisy, times, text, actions + 1)
    with pytest.raises(ScdError, match="actions given to a model with condition 'none'"):
        velocity(plain, latents, noisy, times, text, actions)


@torch.no_grad()
def test_every_tensor_comes_from_its_place_in_wan():
    """Decoder blocks are the first and the last; copies, so that nothing is shared."""
    wan = tiny_wan()
    weights = wan.state_dict()
    sizes = {"encoder_layers": 3, "decoder_first": 1, "decoder_last": 2}
    scd = SCDWan.from_wan(wan, **sizes, **SHIFT, **MIDDLE, first_frame=True, num_actions=2)
    sources = {0: 0, 1: 2, 2: 3}
    used, fresh = set(), set()
    for key, tensor in scd.state_dict().items():
        part, own = key.split(".", 1)
        if part == "decoder" and own.startswith("blocks."):
            _, number, rest = own.split(".", 2)
            own = f"blocks.{sources[int(number)]}.{rest}"
        if own in weights:
            used.add(own)
            assert torch.equal(tensor, weights[own]), key
            assert tensor.data_ptr() != weights[own].data_ptr(), key
        else:
            fresh.add(key)
    assert used == weights.keys()
    assert fresh == {
        "encoder.start",
        "encoder.action_embedding.weight",
        "decoder.action_embedding.weight",
        "decoder.fuse.weight",
        "decoder.fuse.bias",
    }
    assert scd.encoder.start.equal(weights["patch_embedding.bias"])
    pointers = [tensor.data_ptr() for tensor in scd.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    causal = CausalWan.from_wan(wan)
    assert causal.state_dict().keys() == weights.keys()
    for key, tensor in causal.to_wan().state_dict().items():
        assert torch.equal(tensor, weights[key]), key


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, SHIFT | CONCAT, NOISE | MIDDLE], ids=name)
def test_saved_and_loaded(inputs, config, tmp_path):
    latents, noisy, times, text = singles(*inputs)
    model = make(config, num_actions=2)
    model.save_pretrained(tmp_path / "own")
    again = type(model).from_pretrained(tmp_path / "own", use_safetensors=True)
    assert own_config(again) == {**own_config(model), "patch_size": [1, 2, 2]}  # as JSON has it
    expected = velocity(model, latents, noisy, times, text)
    assert torch.equal(velocity(again, latents, noisy, times, text), expected)
    if not config:  # diffusers itself can read a causal Wan
        make({}).save_pretrained(tmp_path / "plain")
        wan = WanTransformer3DModel.from_pretrained(tmp_path / "plain")
        frame = make({}).velocity(latents[:, :1], noisy[:, :1], times[:, :1], text=text)
        expected = wan(noisy[:, :1].transpose(1, 2), times[:, 0], text).sample.transpose(1, 2)
        assert (frame - expected).abs().max() < 1e-5


@torch.no_grad()
def test_bf16_keeps_what_diffusers_keeps_in_float32(inputs, tmp_path):
    latents, noisy, times, text = singles(*inputs)
    model = make(SHIFT | CONCAT)
    model.save_pretrained(tmp_path)
    read = SCDWan.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    converted = with_weights_in(model, "bf16")
    assert with_weights_in(read, "bf16") is read and read.dtype == torch.bfloat16
    for (key, tensor), other in zip(read.named_parameters(), converted.parameters(), strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), key
        exact = any(part in key for part in ("scale_shift_table", "time_embedder", "norm2"))
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), key
    found = read.velocity(latents, noisy, times, text=text)
    expected = model.velocity(latents, noisy, times, text=text)
    assert found.dtype == torch.float32
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.03
    rollout = Rollout(read, RolloutOptions(2, guidance="none", precision="bf16"), 3)
    rollout.reset(latents[:, :2], text=text)
    assert rollout.cache.keys.dtype == torch.bfloat16 and rollout.step().isfinite().all()


@torch.no_grad()
def test_noise_levels_are_embedded_in_float32_under_autocast(inputs):
    model, times = make({}), inputs[2].float()
    expected = model.modulation(times, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.modulation(times, None), expected)


@torch.no_grad()
def test_the_text_can_change_in_a_stream(inputs):
    latents, _, _, text = singles(*inputs)
    model, other = make(SHIFT | CONCAT), -text
    settings = RolloutOptions(2, guidance="none")
    noise = torch.randn(3, B, C, H, W)

    def run(change: Tensor) -> Tensor:
        rollout = Rollout(model, settings, 5)
        rollout.reset(latents[:, :2], text=text)
        frames = [rollout.step(noise=noise[0])]
        rollout.set_text(change)
        return torch.stack(frames + [rollout.step(noise=one) for one in noise[1:]])

    plain, changed = run(text), run(other)
    assert torch.equal(plain[0], changed[0])
    assert (plain[1:] - changed[1:]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


def test_sizes_are_those_of_the_paper():
    """Wan's 1.3B has 1.42 billion parameters, the SCD of 25 + 10 layers 1.68 billion."""
    with torch.device("meta"):
        models = {1.42: CausalWan(), 1.68: SCDWan()}
    for billions, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / 1e9 - billions) < 0.005, count


def test_refusals(inputs):
    latents, noisy, times, text = singles(*inputs)
    with pytest.raises(ScdError, match=r"image-to-video Wan \(added_kv_proj_dim\)"):
        CausalWan.from_wan(tiny_wan(added_kv_proj_dim=24))
    with pytest.raises(ScdError, match="16 channels in and 8 out"):
        CausalWan.from_wan(tiny_wan(out_channels=8))
    with pytest.raises(ScdError, match="a token must be of one frame"):
        SCDWan.from_wan(tiny_wan(patch_size=(2, 2, 2)), 1, 1, 1)
    with pytest.raises(ScdError, match=r"decoder of 2 \+ 3 layers: this Wan has 4"):
        SCDWan.from_wan(tiny_wan(), 2, 2, 3)
    with pytest.raises(ScdError, match="need one at least"):
        SCDWan.from_wan(tiny_wan(), 2, 2, 0)
    with pytest.raises(ScdError, match="fusion is 'add', not one of token_concat, middle"):
        SCDWan.from_wan(tiny_wan(), 2, 1, 1, fusion="add")
    with pytest.raises(ScdError, match="1 where every frame has an action"):
        CausalWan.from_wan(tiny_wan(), chunk_frames=3, num_actions=2)
    with pytest.raises(ScdError, match="with actions cannot become a Wan"):
        make({}, num_actions=2).to_wan()
    model = make({"chunk_frames": 3})
    with pytest.raises(ScdError, match="4 frames: expected at least 1, in chunks of 3"):
        model.velocity(latents, noisy, times, text=text)
    with pytest.raises(ScdError, match="context of 4 frames: this model needs chunks of 3"):
        Rollout(model, RolloutOptions(1, guidance="none"), 9).reset(latents, text=text)
    with pytest.raises(ScdError, match="window of 4 frames"):
        Rollout(model, RolloutOptions(1, guidance="none", window=4))
    model = make(SHIFT | CONCAT)
    with pytest.raises(ScdError, match="1 frames: expected at least 2"):
        model.velocity(latents[:, :1], noisy[:, :1], times[:, :1], text=text)
    with pytest.raises(ScdError, match=r"the text is \(2, 5, 16\), expected \(2, T, 32\)"):
        model.velocity(latents, noisy, times, text=text[..., :16])
    with pytest.raises(ScdError, match="frames of 4x5, which patches of 2x2 do not divide"):
        model.velocity(latents[..., :5], noisy[..., :5], times, text=text)
    with pytest.raises(ScdError, match=r"timesteps \(2, 3\), expected"):
        model.velocity(latents, noisy, times[:, 1:], text=text)
    with pytest.raises(ScdError, match="encoder_frame=noise needs a first look"):
        make(NOISE | CONCAT).velocity(latents, noisy, times, text=text)
    rollout = Rollout(model, RolloutOptions(1, guidance="condition", guidance_scale=3.0), 5)
    with pytest.raises(ScdError, match="set_text before reset"):
        rollout.set_text(text)
    with pytest.raises(ScdError, match="SCDWan needs a text"):
        rollout.reset(latents, text=text)  # and a negative one
    with pytest.raises(ScdError, match="differ in length"):
        rollout.reset(latents, text=text, negative_text=text[:, 1:])


def test_other_models_take_no_text():
    from scd.models import CausalDiT

    rollout = Rollout(CausalDiT(channels=C, heads=1, layers=1), RolloutOptions(guidance="none"), 3)
    with pytest.raises(ScdError, match="CausalDiT takes no text"):
        rollout.reset(torch.zeros(B, 1, C, H, W), text=torch.zeros(B, T, TEXT))
