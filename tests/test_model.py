"""The network: causality, alignment, positions, and its fast paths against plain ones."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from scd.errors import ScdError
from scd.models import SCD, BidirectionalDiT, CausalDiT, attention, cpu, masks
from scd.models.attention import block_causal_attention
from scd.models.decoder import FUSIONS, FrameDecoder
from scd.models.layers import (
    HEAD_DIM,
    NORM_EPS,
    Block,
    ConditionEmbedding,
    Modulation,
    OutputNorm,
    TimestepEmbedding,
)
from scd.models.rotary import rotary_positions

B, F, C, H, W = 2, 5, 4, 4, 6


def make_model(**config) -> SCD:
    """Random everywhere: fresh weights have zero modulation, which would hide most mistakes."""
    torch.manual_seed(0)
    defaults = {
        "channels": C,
        "patch_size": 2,
        "heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "condition": "action",
        "num_conditions": 3,
    }
    model = SCD(**{**defaults, **config})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SCD:
    return make_model()


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(1)
    latents, noisy = torch.randn(2, B, F, C, H, W, generator=g)
    actions = torch.randint(0, 3, (B, F), generator=g)
    return latents, noisy, torch.rand(B, F, generator=g) * 1000, actions


@torch.no_grad()
@pytest.mark.parametrize("frame", range(F))
def test_contexts_are_causal_to_the_bit(model, inputs, frame):
    latents, _, _, actions = inputs
    changed = latents.clone()
    changed[:, frame] += 1
    before, after = model.encode(latents, actions), model.encode(changed, actions)
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert (before[:, frame:] != after[:, frame:]).flatten(2).any(-1).all()


@torch.no_grad()
def test_action_alignment(model, inputs):
    """Action i leads to frame i: it is first seen by the context of frame i, and its decoder."""
    latents, noisy, times, actions = inputs
    for i in range(1, F):
        changed = actions.clone()
        changed[:, i] = (changed[:, i] + 1) % 3
        before, after = model.encode(latents, actions), model.encode(latents, changed)
        assert torch.equal(before[:, : i - 1], after[:, : i - 1])
        assert (before[:, i - 1] != after[:, i - 1]).any()  # the context of frame i
        v_before = model.velocity(latents, noisy, times, actions)
        v_after = model.velocity(latents, noisy, times, changed)
        assert torch.equal(v_before[:, : i - 1], v_after[:, : i - 1])
        assert (v_before[:, i - 1] != v_after[:, i - 1]).any()  # the velocity of frame i
    changed = actions.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 3  # nothing in the clip follows from the first action
    assert torch.equal(model.encode(latents, actions), model.encode(latents, changed))


@torch.no_grad()
def test_last_frame_repeats_its_own_action(model, inputs):
    latents, _, _, actions = inputs
    conditions = torch.cat([actions[:, 1:], actions[:, -1:]], 1)
    assert torch.equal(model.encode(latents, actions), model.encoder(latents, conditions))


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ScdError, match=r"model.fusion is 'concatenate'.*did you mean 'concat'"):
        make_model(fusion="concatenate")


@torch.no_grad()
def test_fusions_differ():
    """Each fusion gives its own result when it is fresh."""
    context, x = torch.randn(2, B, 5, 128)
    joined = {}
    for name, fusion in FUSIONS.items():
        decoder = FrameDecoder(C, 2, 128, 1, 0, True, name)
        assert decoder.fusion is fusion
        joined[name] = fusion.join(decoder, context, x)
    assert torch.equal(joined["add"], context + x)
    assert torch.allclose(joined["concat"], context + x, atol=1e-6)
    assert torch.equal(joined["token_concat"], torch.cat([context, x], 1))
    assert torch.equal(joined["token_concat_with_proj"], torch.cat([0 * context, x], 1))


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("condition", ["none", "action", "label"])
def test_every_fusion_and_condition(inputs, fusion, condition):
    latents, noisy, times, actions = inputs
    model = make_model(
        fusion=fusion, condition=condition, num_conditions=0 if condition == "none" else 3
    )
    given = {"none": {}, "action": {"actions": actions}, "label": {"labels": actions[:, 0]}}
    velocity = model.velocity(latents, noisy, times, **given[condition])
    assert velocity.shape == (B, F - 1, C, H, W)
    assert torch.isfinite(velocity).all()
    # Frame i sees its own noisy latents and the context before it, no other frame's.
    changed = noisy.clone()
    changed[:, 2] += 1
    moved = (model.velocity(latents, changed, times, **given[condition]) != velocity).flatten(2)
    assert moved.any(-1).tolist() == [[False, True, False, False]] * B
    # And the context matters.
    other = latents.clone()
    other[:, 0] += 1
    moved = (model.velocity(other, noisy, times, **given[condition]) != velocity).flatten(2)
    assert moved.any(-1).all()


@torch.no_grad()
def test_no_condition_is_the_null_condition(model, inputs):
    latents, *_ = inputs
    null = torch.full((B, F), model.null_condition)
    assert torch.equal(model.encode(latents), model.encode(latents, null))
    assert torch.equal(model.encoder(latents, None), model.encoder(latents, null))


@torch.no_grad()
def test_batched_equals_single(model, inputs):
    latents, noisy, times, actions = inputs
    whole = model.velocity(latents, noisy, times, actions)
    for b in range(B):
        one = slice(b, b + 1)
        single = model.velocity(latents[one], noisy[one], times[one], actions[one])
        assert (whole[one] - single).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        (SCD, {"encoder_layers": 1, "decoder_layers": 1}),
        (CausalDiT, {"layers": 1}),
        (BidirectionalDiT, {"layers": 1}),
    ],
)
def test_fresh_models_predict_zero_and_modulate_nothing(inputs, kind, layers):
    latents, noisy, times, _ = inputs
    model = kind(channels=C, patch_size=2, heads=1, **layers)
    assert model.velocity(latents, noisy, times).abs().max() == 0
    for part in model.modules():
        if isinstance(part, Modulation | OutputNorm) and part.linear is not None:
            assert not part.linear.weight.any() and not part.linear.bias.any()
        elif isinstance(part, TimestepEmbedding):
            for linear in (part.linear_1, part.linear_2):
                assert 0.018 < linear.weight.std() < 0.022  # of 4096 numbers or more


def test_the_output_norm_written_out():
    """The context's perturbation comes between the norm and its modulation."""
    torch.manual_seed(0)
    x, e, perturbation = (torch.randn(B, F, 6, 64), torch.randn(B, F, 64), torch.randn(B, F, 6, 64))
    normed = torch.nn.functional.layer_norm(x, (64,), eps=NORM_EPS) + perturbation
    modulated, plain = OutputNorm(64, modulated=True), OutputNorm(64, modulated=False)
    scale, shift = modulated.linear(torch.nn.functional.silu(e))[:, :, None].chunk(2, dim=-1)
    found = [norm(x, e, perturbation) for norm in (modulated, plain)]
    torch.testing.assert_close(found[0], normed * (1 + scale) + shift)
    torch.testing.assert_close(found[1], normed)


@torch.no_grad()
@pytest.mark.parametrize("first_frame", [False, True])
def test_encode_gives_the_context_of_the_frame_after_each(inputs, first_frame):
    latents, noisy, times, actions = inputs
    model, seen = make_model(first_frame=first_frame), []
    decode = model.decode
    model.decode = lambda x, t, context, c: (seen.append(context), decode(x, t, context, c))[1]
    model.velocity(latents, noisy, times, actions)
    contexts = model.encode(latents, actions)
    assert contexts.shape[1] == F
    torch.testing.assert_close(contexts[:, :-1], seen[0][:, -(F - 1) :])


def test_qkv_start_is_that_of_three_linears():
    weight = Block(128).attention.qkv.weight
    from scd.models.layers import initialize

    block = Block(128)
    initialize(block)
    bound = (6 / 256) ** 0.5
    assert bound * 0.99 < block.attention.qkv.weight.abs().max() <= bound
    assert weight.shape == (384, 128)


def test_sharding_sees_what_a_block_is_modulated_by(model, inputs):
    """FSDP reduces a block's gradients once those of the tensors in its inputs are there."""
    seen = []
    hooks = [
        model.encoder.conditioning.register_forward_hook(lambda module, args, e: seen.append(e)),
        model.encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args)),
    ]
    model.velocity(*inputs)
    for hook in hooks:
        hook.remove()
    e, arguments = seen
    assert any(leaf is e for leaf in torch.utils._pytree.tree_leaves(arguments))


def test_wrong_conditions_are_refused(model, inputs):
    latents, _, _, actions = inputs
    with pytest.raises(ScdError, match="labels given"):
        model.encode(latents, labels=actions[:, 0])
    with pytest.raises(ScdError, match="expected"):
        model.encode(latents, actions[:, :-1])
    with pytest.raises(ScdError, match=r"0\.\.3"):
        model.encode(latents, actions + 5)
    with pytest.raises(ScdError, match="contradicts"):
        SCD(condition="action", num_conditions=0)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("at_once", [1, 12, 4096])
def test_block_causal_attention_equals_a_dense_mask(monkeypatch, past, at_once):
    """One, two or all frames at a time, with gradients, within 1e-5 (fp32)."""
    monkeypatch.setattr(cpu, "QUERIES_AT_ONCE", at_once)
    n, frames = 6, 4
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 3, frames * n, HEAD_DIM, generator=g, requires_grad=True)
    k = torch.randn(2, 3, (past + frames) * n, HEAD_DIM, generator=g, requires_grad=True)
    v = torch.randn(2, 3, (past + frames) * n, HEAD_DIM, generator=g, requires_grad=True)
    frame = torch.arange((past + frames) * n) // n
    mask = frame[None] <= frame[past * n :, None]
    ours = block_causal_attention(q, k, v, n)
    plain = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (ours - plain).abs().max() < 1e-5
    weight = torch.randn(plain.shape, generator=g)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((plain * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("past", [0, 3])
def test_flex_blocks_admit_what_a_dense_mask_admits(past):
    """What CUDA computes long sequences with; its kernels themselves need CUDA for gradients."""
    n, frames = 6, 4
    queries, keys = frames * n, (past + frames) * n
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, t, HEAD_DIM, generator=g) for t in (queries, keys, keys))
    blocks = attention.block_causal_block_mask(n, queries, keys, torch.device("cpu"))
    found = flex_attention(q, k, v, block_mask=blocks)
    assert (found - block_causal_attention(q, k, v, n)).abs().max() < 1e-5


@pytest.mark.parametrize("n", [6, 16, 64, 100, 128, 192])
@pytest.mark.parametrize("past", [0, 3])
def test_blocks_are_those_that_torch_finds(n, past):
    """Which are left out, which are masked and which need no mask, for frames of any size."""
    device = torch.device("cpu")
    queries, keys, tokens = 9 * n, (past + 9) * n, (7 + 2 * 6) * n
    for of_query, of_key, admits, blocks in (
        (
            queries,
            keys,
            masks.block_causal(n, queries, keys),
            attention.block_causal_block_mask(n, queries, keys, device),
        ),
        (
            tokens,
            tokens,
            masks.clean_context(n, 7, 2),
            attention.clean_context_block_mask(n, 7, 2, tokens, device),
        ),
    ):
        expected = create_block_mask(
            lambda _, __, q, k, admits=admits: admits(q, k), None, None, of_query, of_key, device
        )
        for kind in ("kv", "full_kv"):
            counts, found = (getattr(b, f"{kind}_num_blocks")[0, 0] for b in (expected, blocks))
            assert torch.equal(counts, found)
            pairs = (getattr(b, f"{kind}_indices")[0, 0] for b in (expected, blocks))
            for one, other, count in zip(*pairs, counts, strict=True):
                assert torch.equal(one[:count], other[:count])


def test_rotary_angles_written_out():
    """16 + 24 + 24 channels for frame, row, column; pairs of the two halves; theta 10000."""
    rotary = rotary_positions(torch.tensor([7]), 3, 5)
    token = 2 * 5 + 4  # row 2, column 4
    angles = [7 / 10000 ** (2 * i / 16) for i in range(8)]
    angles += [2 / 10000 ** (2 * i / 24) for i in range(12)]
    angles += [4 / 10000 ** (2 * i / 24) for i in range(12)]
    expected = torch.tensor(angles)
    assert torch.allclose(rotary.cos[token], expected.cos().repeat(2), atol=1e-6)
    assert torch.allclose(rotary.sin[token], torch.cat([-expected.sin(), expected.sin()]))
    x = torch.randn(1, 1, 15, HEAD_DIM)
    one, other = x[0, 0, token].chunk(2)
    turned = torch.complex(one, other) * torch.exp(1j * expected)
    rotated = rotary.rotate(x)[0, 0, token]
    assert torch.allclose(rotated, torch.cat([turned.real, turned.imag]), atol=1e-5)


def test_time_embedding_written_out():
    conditioning = ConditionEmbedding(64, 0)
    t = torch.tensor([500.0])
    angles = 500.0 * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 127)
    expected = torch.cat([angles.cos(), angles.sin()])
    assert torch.allclose(conditioning.sinusoid(t)[0], expected, atol=1e-4)


def test_data_prediction_gives_the_velocity(inputs):
    """v = (x_t − x̂)/σ, with σ bounded below."""
    _, noisy, _, _ = inputs
    model = make_model(prediction="data", sigma_min=0.05)
    context = torch.randn(B, F, 6, model.width)
    for t in (800.0, 10.0):
        times = torch.full((B, F), t)
        with torch.no_grad():
            e = model.decoder.conditioning(times, None)
            clean = model.decoder(noisy, context, e)
            velocity = model.decode(noisy, times, context, None)
        expected = (noisy - clean) / max(t / 1000, 0.05)
        assert torch.allclose(velocity, expected, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(inputs):
    latents, noisy, times, actions = inputs
    gradients = []
    for on in (False, True):
        model = make_model()
        model.set_gradient_checkpointing(on)
        assert model.encoder.gradient_checkpointing is on
        model.velocity(latents, noisy, times, actions).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_head_by_head_equals_the_fused_kernel(masked):
    """In bfloat16, with more keys than plain products serve; both within a bfloat16 of float64."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 16, HEAD_DIM, generator=g).bfloat16()
    keys = cpu.PLAIN_KEYS + 40
    k, v = torch.randn(2, 2, 3, keys, HEAD_DIM, generator=g).bfloat16()
    mask = torch.rand(16, keys, generator=g) < 0.5 if masked else None
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    ours = attention.full_attention(q, k, v, mask)
    with torch.enable_grad():
        fused = attention.full_attention(q, k, v, mask)
    assert not torch.equal(ours, fused)  # they are two ways
    assert (ours - exact).abs().max() < 2**-8
    assert (fused - exact).abs().max() < 2**-8
