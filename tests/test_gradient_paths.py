"""The gradients of writing context and of denoising: defined by two copies of the parameters."""

import copy
from contextlib import contextmanager

import pytest
import torch

from scd.analysis.gradient_paths import (
    ALL,
    OUTSIDE,
    PAIRS,
    PathGradients,
    group_parameters,
    measure_gradients,
    path_gradients,
)
from scd.analysis.gradient_report import (
    _bars,
    _norm_ratio,
    _of_cosines,
    _of_ratios,
    describe_gradients,
    gradient_figure,
    gradient_table,
)
from scd.analysis.interventions import (
    causal_blocks,
    frame_diagonal_attention,
    named_blocks,
    replace_attention,
)
from scd.analysis.measurements import Estimate, ProbeClips, bootstrap, loss_by_level, loss_noise
from scd.flow.objective import LEVELS, errors_by_level
from scd.models import SCD, CausalDiT
from tests.test_causal_dit import make

pytestmark = pytest.mark.usefixtures("one_thread")

B, F, C, H, W = 3, 4, 4, 4, 6
N, D = 6, 64  # tokens of a frame, width
CLEAN = (F - 1) * N
KINDS = pytest.mark.parametrize("kind", [CausalDiT, SCD])


@pytest.fixture(scope="module")
def clips():
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(B, F, C, H, W, generator=g)
    actions = torch.randint(0, 3, (B, F), generator=g)
    return ProbeClips(latents, latents, actions, None, 2, (7, 4, 9))


@pytest.fixture(scope="module")
def measured(clips):
    """Every kind's gradients, measured once, and how often the progress was called."""
    calls = []
    models = {kind: make(kind) for kind in (CausalDiT, SCD)}
    found = {
        kind: measure_gradients(model, clips, 0, lambda: calls.append(1))
        for kind, model in models.items()
    }
    return found, len(calls)


@pytest.fixture
def clip(clips):
    return next(clips.parts(1))


def loss_of(model, clip, level):
    noise = loss_noise(model, clip, 0)
    conditions = clip.conditions(model)
    return errors_by_level(model, clip.latents, conditions, noise, levels=(level,)).mean()


def gradient(loss, model):
    """One vector, over the parameters in the order of the model."""
    found = torch.autograd.grad(
        loss, [*model.parameters()], retain_graph=True, materialize_grads=True
    )
    return torch.cat([x.flatten() for x in found])


def both_paths(model, clip, level=0.5):
    return path_gradients(model, [*model.parameters()], clip, 0, level)


def same(one, other, tolerance):
    """Relative, by norms."""
    return (one - other).norm() <= tolerance * other.norm()


@contextmanager
def written_by(writer, reader, clip, level):
    """Let the noisy tokens of `reader` read what `writer`, a copy of it, computes at clean ones."""
    if isinstance(writer, SCD):
        conditions = clip.conditions(writer)[:, writer.first_predicted :]
        context = writer.encoder(clip.latents[:, :-1], conditions)
        hook = reader.encoder.register_forward_hook(lambda module, args, out: context)
        yield
        hook.remove()
        return
    kept = {}

    def keep(number, attend):
        def kept_attend(q, k, v):
            kept[number] = k[:, :, :CLEAN], v[:, :, :CLEAN]
            return attend(q, k, v)

        return kept_attend

    def read(number, attend):
        def reading(q, k, v):
            keys = [
                torch.cat([old, x[:, :, CLEAN:]], 2)
                for old, x in zip(kept[number], (k, v), strict=True)
            ]
            return attend(q, *keys)

        return reading

    with replace_attention(causal_blocks(writer), keep):
        loss_of(writer, clip, level)
    with replace_attention(causal_blocks(reader), read):
        yield


@KINDS
@pytest.mark.parametrize("config", [{}, {"first_frame": True}, {"prediction": "data"}])
@pytest.mark.parametrize("level", [0.1, 1.0])
def test_both_gradients_are_those_of_two_copies_and_add_up(clip, kind, config, level):
    model = make(kind, **config)
    write, denoise = both_paths(model, clip, level)
    assert same(write + denoise, gradient(loss_of(model, clip, level), model), 1e-5)
    writer, reader = copy.deepcopy(model), copy.deepcopy(model)
    with written_by(writer, reader, clip, level):
        loss = loss_of(reader, clip, level)
    assert same(loss.detach(), loss_of(model, clip, level).detach(), 1e-6)
    assert same(write, gradient(loss, writer), 1e-5)
    assert same(denoise, gradient(loss, reader), 1e-5)
    assert min(write.norm(), denoise.norm()) > 0.01 * (write + denoise).norm()


def test_who_sees_no_clean_frame_writes_nothing(clip):
    """With attention inside frames only, all of the gradient is that of denoising."""
    model = make()
    with frame_diagonal_attention(model.blocks, N):
        write, denoise = both_paths(model, clip)
        whole = gradient(loss_of(model, clip, 0.5), model)
    assert not write.any()
    assert same(denoise, whole, 1e-6)
    assert both_paths(model, clip)[0].any()


def test_nothing_is_left_behind(clip):
    model = make()
    before = loss_by_level(model, clip, 0)
    both_paths(model, clip)
    assert torch.equal(loss_by_level(model, clip, 0), before)
    assert all(parameter.grad is None for parameter in model.parameters())


# Which path uses which parameters


def test_an_scd_shares_no_parameter(clips, measured):
    model, result = make(SCD), measured[0][SCD]
    assert not result.shares and not result.cosine.any() and not result.between.any()
    by_name = dict(zip(result.groups, result.parameters.tolist(), strict=True))
    for name, block in named_blocks(model).items():
        size = sum(parameter.numel() for parameter in block.parameters())
        assert by_name[name] == ([size, 0, 0] if "encoder" in name else [0, 0, size]), name
    write, denoise = both_paths(model, next(clips.parts(1)))
    in_encoder = [name.startswith("encoder.") for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    of_encoder = torch.tensor(in_encoder).repeat_interleave(torch.tensor(sizes))
    assert not write[~of_encoder].any() and not denoise[of_encoder].any()


def test_a_dense_model_shares_all_layers_and_of_the_last_the_keys_and_values(measured):
    model, result = make(), measured[0][CausalDiT]
    assert result.groups == ["layer 1", "layer 2", "layer 3", OUTSIDE, ALL] and result.shares
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert result.parameters[:2].tolist() == [[0, block, 0]] * 2
    keys_and_values = 2 * (D * D + D) + 64  # and the norm of the keys
    shift_and_scale = 2 * (D * D + D)
    both = keys_and_values + shift_and_scale
    assert result.parameters[2].tolist() == [0, both, block - both]
    # Embeddings of patches, of noise levels and of three actions.
    outside = group_parameters(model)[OUTSIDE]
    output = [*model.norm_out.parameters(), *model.unembed.parameters()]
    output_size, null = sum(p.numel() for p in output), D
    used = sum(p.numel() for p in outside) - null - output_size
    assert result.parameters[3].tolist() == [0, used, output_size]
    assert result.parameters[4].tolist() == result.parameters[:4].sum(dim=0).tolist()


# Comparing them


def test_cosines_and_norms_by_hand(clips, measured):
    """Of layer 2, and of all parameters in the entries that both paths use."""
    model, result = make(), measured[0][CausalDiT]
    assert result.cosine.shape == (B, len(LEVELS), 5)
    assert result.squares.shape == (B, 2, len(LEVELS), 5)
    assert result.between.shape == (B // 2, len(PAIRS), len(LEVELS), 5)
    level = 2
    found = [both_paths(model, clip, LEVELS[level]) for clip in clips.parts(1)]
    names = [name for name, p in model.named_parameters() for _ in range(p.numel())]
    in_layer = torch.tensor([name.startswith("blocks.1.") for name in names])
    for group, own in ((1, in_layer), (4, torch.ones_like(in_layer))):
        shared = [own & (w != 0) & (d != 0) for w, d in found]
        pairs = [(w * here, d * here) for (w, d), here in zip(found, shared, strict=True)]

        def cos(one, other):
            return torch.nn.functional.cosine_similarity(one, other, dim=0)

        for number, (w, d) in enumerate(pairs):
            torch.testing.assert_close(
                result.cosine[number, level, group].float(), cos(w, d), rtol=1e-4, atol=1e-6
            )
            squares = [x[own].square().sum().double() for x in found[number]]
            torch.testing.assert_close(
                result.squares[number, :, level, group], torch.stack(squares), rtol=1e-4, atol=0
            )
        # Every second clip with the one before it.
        expected = []
        for number in range(1, B, 2):
            (w, d), (w_before, d_before) = pairs[number], pairs[number - 1]
            across = (cos(w, d_before) + cos(w_before, d)) / 2
            expected.append(torch.stack([across, cos(w, w_before), cos(d, d_before)]))
        of_pairs = result.between[:, :, level, group].float()
        torch.testing.assert_close(of_pairs, torch.stack(expected), rtol=1e-3, atol=1e-5)


def test_the_same_numbers_every_time_and_one_call_a_measurement(clips, measured):
    found, calls = measured
    one, other = found[SCD], measure_gradients(make(SCD), clips, 0)
    for name in ("parameters", "squares", "cosine", "between"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert calls == 2 * B * len(LEVELS)
    model, clip = make(), next(clips.parts(1))
    first, again, other_seed = (
        path_gradients(model, [*model.parameters()], clip, seed, 0.5)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not same(first, other_seed, 0.1)


def test_bootstrap():
    """On normal numbers: mean ± 1.96 standard errors, within a fifth of one."""
    values = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).double() + 3
    found = bootstrap(values, 0)
    error = values.std(dim=0) / 20
    assert torch.equal(found.mean, values.mean(dim=0))
    for bound, sign in ((found.low, -1), (found.high, 1)):
        assert (bound - found.mean - sign * 1.96 * error).abs().max() < 0.2 * error.max()
    assert all(torch.equal(a, b) for a, b in zip(bootstrap(values, 0), found, strict=True))
    squared = bootstrap(values, 0, torch.square)
    torch.testing.assert_close(squared.high, found.high.square(), rtol=1e-4, atol=0)
    assert bootstrap(values[:1], 0).low.isnan().all()  # one clip tells of no others
    constant = bootstrap(torch.full((5, 1), 0.25), 0)
    assert constant.low == constant.high == 0.25


@pytest.mark.parametrize("clips", [3, 4, 8, 16])
def test_intervals_hold_what_they_say(clips):
    """Of few clips too; percentiles alone hold the mean in 78 % of cases for 4 clips."""
    g = torch.Generator().manual_seed(clips)
    values = torch.randn(clips, 2000, generator=g)  # each column an experiment
    found = bootstrap(values, 0)
    held = ((found.low <= 0) & (found.high >= 0)).double().mean()
    assert 0.94 < held < 0.975


def test_intervals_stay_where_the_numbers_can_be():
    g = torch.Generator().manual_seed(0)
    squares = torch.randn(50, 3, 2, 1, 1, generator=g).exp()
    for some in squares:  # of three clips
        found = _of_ratios(some, 0, _norm_ratio)
        assert 0 < found.low < found.mean < found.high
    cosines = 1 - 0.1 * torch.rand(4, 1, generator=g)
    assert _of_cosines(cosines, 0).high <= 1
    nothing = _of_ratios(torch.zeros(3, 2, 1, 1), 0, _norm_ratio)
    assert nothing.mean < 1e-100 and nothing.high < 1e-100


# The report


def estimates(mean, width=0.02):
    mean = torch.as_tensor(mean, dtype=torch.double)
    return Estimate(mean, mean - width, mean + width)


def known(both=6_000_000):
    parameters = torch.tensor([[0, both, 1_000_000], [0, 0, 0], [0, both, 1_000_000]])
    levels = len(LEVELS)
    return PathGradients(
        ["layer 1", OUTSIDE, ALL],
        parameters,
        torch.ones(2, 2, levels, 3),
        torch.zeros(2, levels, 3),
        torch.zeros(2, len(PAIRS), levels, 3),
    )


def test_sentences():
    between = torch.zeros(len(PAIRS), len(LEVELS), 3)
    between[1:, 1] = 0.4

    def text(mean, width=0.02, result=None):
        by_group, ratio = estimates([mean - 0.1, 0.9, mean], width), estimates([2, 2, 0.5])
        return describe_gradients(result or known(), by_group, estimates(between), ratio, 16)

    assert "Both use 86 % of the parameters." in text(0.0)
    assert "all but orthogonal: cosine +0.030 [+0.010, +0.050] (mean" in text(0.03)
    assert "are in conflict: cosine -0.300" in text(-0.3)
    assert "are in agreement: cosine +0.300" in text(0.3)
    assert "neither in conflict nor in agreement beyond chance" in text(-0.3, 0.4)
    assert "lowest: layer 1, -0.400 [-0.420, -0.380]" in text(-0.3)
    assert "Between two clips, at σ = 0.25, where they have most in common: writing" in text(0.0)
    assert "denoising – denoising +0.40 [+0.38, +0.42]." in text(0.0)
    assert "has 0.50 [0.48, 0.52] times the norm of that of denoising." in text(0.0)
    separate = known(both=0)
    separate.parameters[[0, 2], 0] = 5_000_000
    assert "share no parameter (5.00 and 1.00 M), so nothing can" in text(0.0, result=separate)


def test_table_and_figure():
    result = known()
    of_levels, of_groups = torch.zeros(len(LEVELS), 3), torch.zeros(3)
    of_levels[:, 0] = torch.tensor(LEVELS)
    table = gradient_table(
        result, estimates(of_levels), estimates(of_groups), estimates(of_groups + 2)
    )
    cells = [line[:2] for line in table.lines]
    assert cells == [["layer 1", "86 %"], [OUTSIDE, "0 %"], [ALL, "86 %"]]
    assert table.lines[0][3:6] == [
        f"+{level:.3f} [{level - 0.02:+.3f}, {level + 0.02:+.3f}]" for level in (0.1, 0.5, 1.0)
    ]
    assert table.lines[0][6] == "2.00 [1.98, 2.02]"
    between = estimates(torch.zeros(len(PAIRS), len(LEVELS), 3))
    arguments = (estimates(of_levels), estimates(of_groups), between, estimates(of_levels))
    assert len(gradient_figure(result, *arguments).axes) == 4
    assert len(gradient_figure(known(both=0), *arguments).axes) == 2


def test_bars_reach_from_the_mean_to_the_ends_of_the_interval():
    bars = _bars(Estimate(torch.tensor([2.0]), torch.tensor([1.5]), torch.tensor([3.0])))
    assert bars.tolist() == [[0.5], [1.0]]
