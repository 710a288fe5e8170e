"""The probes, on models whose similarities and attention masses are known, and as one command."""

import copy
import json
import shlex
from dataclasses import replace

import pytest
import torch

from scd.analysis import attention_mass as masses
from scd.analysis import measurements, probed_model
from scd.analysis.attention_mass import attention_mass, frame_mass
from scd.analysis.context_ablation import (
    ABLATIONS,
    encode_contexts,
    encode_last_context,
    history_lengths,
    replace_context,
)
from scd.analysis.interventions import (
    bypass,
    causal_blocks,
    denoising_blocks,
    frame_diagonal_attention,
    named_blocks,
    skip_layers,
)
from scd.analysis.measurements import (
    FrameEvaluator,
    ProbeClips,
    clip_numbers,
    loss_by_level,
    paired_difference,
    relative_increase,
    roll_out,
)
from scd.analysis.probed_model import fine_tuning, open_training_clips
from scd.analysis.similarity import principal_pictures, record_features, step_similarity
from scd.cli import main
from scd.errors import ScdError
from scd.evaluation import metrics
from scd.evaluation.metric_weights import MetricUnavailable
from scd.flow.noise import FlowDraws
from scd.flow.objective import LEVELS, FlowObjective, with_scaled_latents
from scd.flow.sampler import noise_levels
from scd.models import SCD, CausalDiT
from scd.models.autoencoder import PixelCodec
from scd.models.load import load_checkpoint_for_use
from scd.options import FlowOptions, load_options
from tests.test_causal_dit import make as make_model

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, NEW, C, H, W = 2, 5, 2, 4, 4, 6  # no two counts that a result's axes have are the same
ROWS, COLUMNS, STEPS = 2, 3, 4
N = ROWS * COLUMNS  # tokens of a frame (patch 2)


def make(kind=CausalDiT, **config):
    deeper = {} if kind is CausalDiT else {"decoder_layers": 3}
    return make_model(kind, **{**deeper, **config})


@pytest.fixture(scope="module")
def clips():
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(B, K + NEW, C, H, W, generator=g)
    actions = torch.randint(0, 3, (B, K + NEW), generator=g)
    return ProbeClips(latents, latents, actions, None, K, (7, 4))


def same(one, other, tolerance=0.0):
    return one.shape == other.shape and (one - other).abs().max() <= tolerance


# Attention mass


@pytest.mark.parametrize("at_once", [1, 2 * N, 10_000])
def test_mass_equals_that_of_the_whole_matrix(monkeypatch, at_once):
    monkeypatch.setattr(masses, "KEYS_AT_ONCE", at_once)
    g = torch.Generator().manual_seed(2)
    frames, past = 3, 2
    keys = torch.randn(B, 2, (past + frames) * N, 8, generator=g)
    q = 3 * torch.randn(B, 2, frames * N, 8, generator=g)
    of_key = torch.arange(past + frames).repeat_interleave(N)
    hidden = of_key > of_key[past * N :, None]
    matrix = (q @ keys.mT / 8**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    expected = matrix.unflatten(2, (frames, N)).unflatten(4, (past + frames, N)).sum(-1).mean(3)
    assert same(frame_mass(q, keys, N), expected, 1e-6)


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_uniform_attention_has_the_mass_of_the_frames_seen(clips, kind):
    """Queries of zero: every visible frame gets the same, in every pass, layer and head."""
    model = make(kind, heads=2)
    for block in named_blocks(model).values():
        block.attention.norm_q.data.zero_()
    result = attention_mass(model, clips, STEPS, 0)
    passes, layers = (1, 2) if kind is SCD else (STEPS, 3)
    for new, mass in enumerate(result.past):
        # The encoder runs over clean frames; a dense model's new frame also sees itself.
        seen = K + new + (kind is CausalDiT)
        assert mass.shape == (passes, layers, 2, seen)
        assert same(mass, torch.full_like(mass, 1 / seen), 1e-6)
    if kind is SCD:
        assert result.context.shape == (STEPS, 3, 2)
        assert same(result.context, torch.full_like(result.context, 0.5), 1e-6)


def blind_to_its_input(model):
    """Make queries and keys large, and functions of noise level, condition and position alone."""
    g = torch.Generator().manual_seed(3)
    for block in causal_blocks(model):
        linear = block.modulation_attention.linear
        linear.weight.data[model.width : 2 * model.width] = 0
        linear.bias.data[model.width : 2 * model.width] = -1  # the scale: 0·x + shift
        for norm in (block.attention.norm_q, block.attention.norm_k):
            norm.data = 3 * torch.randn(64, generator=g)


def known_mass(model, block, of_frames, heads):
    """Attention of the last frame's queries on every frame, (heads, F), by hand.

    Args:
        of_frames: conditioning vectors (F, D).
    """

    def rotated(e, part, norm, frame):
        shift = block.modulation_attention.linear(torch.nn.functional.silu(e))[: model.width]
        x = block.attention.qkv(shift).unflatten(0, (3, heads, 64))[part]
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        tokens = [(frame, row, column) for row in range(ROWS) for column in range(COLUMNS)]
        angles = torch.tensor(
            [
                [
                    place * 10000 ** (-2 * j / dims)
                    for place, dims in zip(token, (16, 24, 24), strict=True)
                    for j in range(dims // 2)
                ]
                for token in tokens
            ]
        )
        turn = torch.polar(torch.ones_like(angles), angles)
        return torch.complex(x[:, :32], x[:, 32:])[:, None] * turn  # (heads, N, 32)

    attention = block.attention
    q = rotated(of_frames[-1], 0, attention.norm_q, len(of_frames) - 1)
    keys = [rotated(e, 1, attention.norm_k, frame) for frame, e in enumerate(of_frames)]
    k = torch.cat(keys, dim=1)
    scores = (q[:, :, None] * k[:, None].conj()).real.sum(-1) / 8
    return scores.softmax(-1).unflatten(2, (-1, N)).sum(-1).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_mass_of_known_queries_and_keys(clips, kind):
    """By step, layer, head and frame, against an explicit softmax."""
    model = make(kind, heads=2)
    blind_to_its_input(model)
    result = attention_mass(model, clips, STEPS, 0)
    conditioning = (model.encoder if kind is SCD else model).conditioning
    levels = noise_levels(STEPS)[:STEPS] if kind is CausalDiT else [-1 / 1000]
    for new in range(NEW):
        expected = torch.zeros(
            len(levels), len(causal_blocks(model)), 2, result.past[new].shape[-1]
        )
        for actions in clips.actions:
            for step, level in enumerate(levels):
                # A dense model's clean frames are under their own action, an encoder's under the
                # next frame's.
                of_keys = actions[: K + new + 1] if kind is CausalDiT else actions[1 : K + new + 1]
                times = torch.full(of_keys.shape, -1.0)
                times[-1] = 1000 * level
                e = conditioning(times, of_keys)
                for layer, block in enumerate(causal_blocks(model)):
                    mass = known_mass(model, block, e, 2)
                    expected[step, layer] += mass / B
        assert expected.std(-1).mean() > 0.05
        for axis in range(3 if kind is CausalDiT else 0):  # it differs along every axis
            assert not same(expected.roll(1, axis), expected, 0.01)
        assert same(result.past[new], expected, 1e-4)


def test_mass_does_not_depend_on_how_clips_are_batched(clips):
    model = make(SCD)
    whole = attention_mass(model, clips, STEPS, 0)
    alone = [attention_mass(model, part, STEPS, 0) for part in clips.parts(1)]
    for new in range(NEW):
        mean = (alone[0].past[new] + alone[1].past[new]) / 2
        assert same(whole.past[new], mean, 1e-5)
        assert (whole.past[new].sum(-1) - 1).abs().max() < 1e-5


# Features over the steps


def test_known_similarities(clips):
    """Block 1 adds what is the same at all steps, block 2 turns a token by 90° after step 1."""
    steps, tokens, width = 3, 5, 4
    east, north = torch.eye(width)[:2]
    turned = torch.stack([east, north, north])
    features = torch.stack([east.expand(3, -1), turned], dim=1)  # (T, 2, D)
    features = features[:, :, None, None].expand(steps, 2, B, tokens, width)
    result = step_similarity(features.contiguous() * 7)
    assert same(result.similarity[0], torch.ones(3, 3))
    assert same(result.similarity[1], torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]]))
    assert same(result.between_clips, torch.ones(2))  # both clips are the same
    assert result.error.max() == 0
    # Off the mean (1/3, 2/3): (2/3, -2/3) once and (-1/3, 1/3) twice point in opposite directions.
    assert same(result.centered[1], torch.tensor([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]]), 1e-5)
    # The two as clips of one layer: similarities of 1 and 0 between the first step and the last.
    of_clips = step_similarity(features.transpose(1, 2).contiguous())
    assert same(of_clips.error, torch.tensor([[0.5, 0, 0]] * 2), 1e-6)
    pictures = principal_pictures(features.contiguous(), 0)
    assert pictures.shape == (2, steps, tokens, 3)
    assert (pictures[1, 0, :, 0] - pictures[1, 1, :, 0]).abs().min() > 0.99


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_blocks_without_gates_repeat_the_embedding(clips, kind):
    """An embedding blind to the noise: features are exactly the same at every step."""
    model = make(kind)
    for block in denoising_blocks(model):
        for modulation in (block.modulation_attention, block.modulation_mlp):
            modulation.linear.weight.data.zero_()
            modulation.linear.bias.data.zero_()
    (model.decoder if kind is SCD else model).embed.weight.data.zero_()
    watched = record_features(model, clips, STEPS, 0)
    assert watched.features.shape == (STEPS, len(denoising_blocks(model)) + 1, B, N, 64)
    assert same(watched.features, watched.features[:1, :1].expand_as(watched.features))
    result = step_similarity(watched.features)
    assert same(result.similarity, torch.ones_like(result.similarity), 1e-6)


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_the_last_estimate_is_the_frame(clips, kind):
    """x − σ·v at the last step is the frame itself; clips in parts give the same features."""
    model = make(kind)
    whole = record_features(model, clips, STEPS, 0)
    assert same(whole.estimates[-1], roll_out(model, clips.cut(1), STEPS, 0)[:, 0], 1e-5)
    for number, part in enumerate(clips.parts(1)):
        alone = record_features(model, part, STEPS, 0)
        assert same(alone.features[:, :, 0], whole.features[:, :, number], 1e-4)


# Interventions


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_skipping_reuses_what_the_last_full_step_added(clips, kind):
    model = make(kind)
    plain = record_features(model, clips, STEPS, 0).features
    with skip_layers(model, 1, 3, full_steps=1):
        result = record_features(model, clips, STEPS, 0).features
    added = result[:, 1:] - result[:, :-1]
    for block in range(len(denoising_blocks(model))):
        repeated = same(added[1:, block], added[:1, block].expand(STEPS - 1, -1, -1, -1), 1e-5)
        assert repeated == (block in (1, 2)), block
    assert same(result[0], plain[0])
    with skip_layers(model, 0, 3, full_steps=STEPS):
        assert same(record_features(model, clips, STEPS, 0).features, plain)
    assert "begin_frame" not in vars(model)  # nothing is left behind
    assert same(record_features(model, clips, STEPS, 0).features, plain)


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_frame_diagonal_layers_do_not_see_the_past(clips, kind):
    """With all layers cut off a rollout is that from the last frame (SCD) or from none."""
    model = make(kind)
    blocks = causal_blocks(model)
    plain = roll_out(model, clips, STEPS, 0)
    other = replace(clips, latents=torch.cat([clips.latents[:, :1] + 1, clips.latents[:, 1:]], 1))
    assert not same(roll_out(model, other, STEPS, 0), plain)
    with frame_diagonal_attention(blocks, N):
        blind = roll_out(model, clips, STEPS, 0)
        assert same(roll_out(model, other, STEPS, 0), blind)
        # Teacher-forced and in a rollout the same: the first new frame's velocity at pure noise.
        frames = clips.latents[:, : K + 1].clone()
        frames[:, K] = clips.noise(0)[:, 0]
        times = torch.full((B, K + 1), 1000.0)
        forced = model.velocity(frames, frames, times, clips.actions[:, : K + 1])[:, -1]
        watched = record_features(model, clips, STEPS, 0).estimates[0]
        assert same(frames[:, K] - forced, watched, 1e-4)
    assert not same(blind, plain)
    with frame_diagonal_attention([], N):
        assert same(roll_out(model, clips, STEPS, 0), plain)


@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_bypassed_layers_do_not_matter(clips, kind):
    model = make(kind)
    names = list(named_blocks(model))
    for number, block in enumerate(named_blocks(model).values()):
        with bypass(block):
            before = loss_by_level(model, clips, 0)
            kept = block.attention.out.bias.data.clone()
            block.attention.out.bias.data += 1
            assert same(loss_by_level(model, clips, 0), before), names[number]
            block.attention.out.bias.data.copy_(kept)
        assert not same(loss_by_level(model, clips, 0), before), names[number]


# Measuring


@pytest.mark.parametrize("prediction", ["velocity", "data"])
@pytest.mark.parametrize("kind", [CausalDiT, SCD])
def test_loss_is_the_objective_of_training_at_one_level(clips, monkeypatch, kind, prediction):
    model = make(kind, prediction=prediction)
    result = loss_by_level(model, clips, 0)
    assert result.shape == (B, len(LEVELS))
    noise = []
    monkeypatch.setattr(
        torch, "randn", lambda *a, plain=torch.randn, **k: noise.append(plain(*a, **k)) or noise[-1]
    )
    assert same(loss_by_level(model, clips, 0), result)
    monkeypatch.undo()
    objective = FlowObjective(model, FlowOptions(context_noise=0.0), 0)
    shape = (B, 1, K + NEW)
    for number, level in enumerate(LEVELS[:-1]):
        draws = FlowDraws(
            level=torch.full(shape, level).logit(),
            noise=torch.cat([torch.zeros(B, 1, 1, C, H, W), torch.cat(noise)], dim=2),
            context_noise=None,
            drop_condition=torch.zeros(B, dtype=torch.bool),
            clean_frame=torch.zeros(B, K + NEW, dtype=torch.bool),
            history_noise=torch.zeros(B),
            prefix=torch.zeros(B, 1),
            look_level=torch.ones(B, K + NEW),
            look_noise=None,
        )
        with torch.no_grad():
            expected = objective.loss(clips.latents, clips.conditions(model), draws)
        assert abs(float(result[:, number].mean() / expected) - 1) < 1e-4, level


def test_pairs():
    mean, error = paired_difference(torch.tensor([[1.0, 3.0], [4.0, 4.0]]), torch.zeros(2, 2))
    assert (mean, error) == (3.0, 1.0)
    # Levels 2 and 1 times as large: half as much more. Off that ratio clips are at ±1 and 0.
    loss, plain = torch.tensor([[3.0, 10.0], [1.0, 10.0]]), torch.tensor([[1.0, 10.0]] * 2)
    assert relative_increase(loss, plain) == (0.5, 0.5)
    other = torch.tensor([[1.0, 10.0], [3.0, 2.0]])  # twice as much of every clip
    assert relative_increase(2 * other, other) == (1.0, 0.0)


def test_generated_frames_are_scored_as_a_video_stores_them(clips, monkeypatch):
    """Rounded to 8 bits; FVD is of the whole clips, which begin with the frames given."""
    compared, featured = [], []

    class Metrics:
        metrics = ("fvd",)

        def compare_frames(self, videos, real):
            compared.extend([videos, real])
            return {"psnr": torch.zeros(videos.shape[:2])}

    def features(videos):
        featured.append(videos)
        return videos.mean(dim=(1, 3, 4))

    monkeypatch.setattr(measurements, "AvailableMetrics", Metrics)
    monkeypatch.setattr(measurements, "i3d_features", features)
    monkeypatch.setattr(measurements, "FVD_CLIPS", B)
    monkeypatch.setattr(measurements, "SHORTEST", K + NEW)
    video = torch.rand(B, K + NEW, 3, H, W, generator=torch.Generator().manual_seed(1))
    clips = replace(clips, video=video, latents=2 * video - 1)
    evaluator = FrameEvaluator(PixelCodec(), clips, STEPS, 0)
    assert evaluator(make(CausalDiT, channels=3)).fvd > 0
    new, real = compared
    assert same(255 * new, (255 * new).round(), 1e-4) and new.unique().numel() > 10
    assert same(real, video[:, K:])
    assert same(featured[0], video) and same(featured[1], torch.cat([video[:, :K], new], 1))


def test_changed_contexts(clips):
    """The right context changes nothing, another does; each change is what its name says."""
    model, one = make(SCD), clips.cut(1)
    right = encode_contexts(model, one)
    assert right.shape == (B, K, N, 64)
    loss, frame = loss_by_level(model, one, 0), roll_out(model, one, STEPS, 0)
    with replace_context(model, right, one)(one):
        assert same(roll_out(model, one, STEPS, 0), frame, 1e-5)
    assert same(loss_by_level(model, one, 0, replace_context(model, right, one)), loss, 1e-6)
    for name, change in ABLATIONS.items():
        intervention = replace_context(model, change(right), one)
        assert not same(loss_by_level(model, one, 0, intervention), loss, 1e-6), name
        with intervention(one):
            assert not same(roll_out(model, one, STEPS, 0), frame, 1e-4), name
    assert same(ABLATIONS["one frame late"](right)[:, 1:], right[:, :-1])
    assert same(ABLATIONS["of another clip"](right)[0], right[1])
    shuffled = ABLATIONS["tokens shuffled"](right)
    assert same(shuffled.sum(2), right.sum(2), 1e-4)


@torch.no_grad()
def test_a_shorter_history(clips):
    """The context that an encoder gives which never saw the older frames; all frames: the same."""
    model, one = make(SCD), clips.cut(1)
    right = encode_contexts(model, one)
    assert same(encode_last_context(model, one, K), right[:, -1:], 1e-5)
    for frames in history_lengths(K):
        short = encode_last_context(model, one, frames)
        began = K - frames
        actions = one.actions[:, began + 1 :]
        assert same(short, model.encoder(one.latents[:, began:-1], actions)[:, -1:], 1e-5)
        assert not same(short, right[:, -1:], 1e-3)
        given = replace_context(model, short, one)
        changed = loss_by_level(model, one, 0, given, last_frame=True)
        assert not same(changed, loss_by_level(model, one, 0, last_frame=True), 1e-6)
    assert history_lengths(5) == [1, 2, 4] and history_lengths(4) == [1, 2]


@torch.no_grad()
def test_the_loss_of_the_last_frame(clips):
    """Under given contexts, other frames have a say in the loss of all, not in that of the last."""
    model, one = make(SCD), clips.cut(1)
    other = replace(one, latents=torch.cat([one.latents[:, :-1] + 1, one.latents[:, -1:]], 1))
    given = replace_context(model, encode_contexts(model, one), one)
    for last in (False, True):
        result = [loss_by_level(model, c, 0, given, last_frame=last) for c in (one, other)]
        assert same(*result, 1e-6) == last


# The command


@pytest.fixture
def trained(doom_root, tmp_path):
    """A checkpoint of a tiny model after one step."""

    def train(kind):
        layers = {
            "causal_dit": ["model.type=causal_dit", "model.layers=2"],
            "scd": ["model.encoder_layers=1", "model.decoder_layers=1"],
        }[kind]
        zero = [f"model.{k}=0" for k in ("encoder_layers", "decoder_layers")] * (kind != "scd")
        overrides = [
            *zero, *layers, f"name={kind}", f"data.root={doom_root}", "data.source=video",
            "data.frames=4", "autoencoder.path=null", "model.patch_size=32", "model.heads=1",
            "train.steps=1", "train.batch_size=2", "train.workers=0", "train.mixed_precision=fp32",
            "eval.context_frames=3", f"output_root={tmp_path}",
        ]  # fmt: skip
        assert main(["train", "--opt", "options/scd_doom_tiny.yml", *overrides]) == 0
        return tmp_path / kind / "checkpoints/step-00000001/ema.safetensors"

    train.root = tmp_path
    return train


@pytest.mark.parametrize("muon", [None, 0.01])
def test_fine_tuning_learns_and_leaves_the_model_alone(trained, muon, monkeypatch):
    overrides = [
        "optim.lr=1e-2",
        "train.gradient_accumulation=2",
        f"optim.muon_lr={muon or 'null'}",
    ]
    loaded = load_checkpoint_for_use(trained("scd"), None, overrides)
    clips = open_training_clips(loaded)
    batch = {key: torch.stack([clip[key] for clip in (clips[0], clips[1])]) for key in clips[0]}
    model, before = copy.deepcopy(loaded.model), copy.deepcopy(loaded.model.state_dict())

    def loss():
        with torch.no_grad():
            objective = FlowObjective(model, loaded.options.flow, 0)
            return float(objective(with_scaled_latents(batch, loaded.codec))["loss"])

    made, make_optimizer = [], probed_model.make_optimizer
    monkeypatch.setattr(
        probed_model, "make_optimizer", lambda *a: made.append(make_optimizer(*a)) or made[0]
    )
    losses, rates = [], []
    for step in fine_tuning(model, loaded.codec, loaded.options, clips, 12, 1.0):
        if step in (0, 12):
            losses.append(loss())
        if step in (1, 5, 12):
            rates.append(made[0].param_groups[0]["lr"])
    assert losses[1] < 0.9 * losses[0]
    assert rates[:2] == pytest.approx([0.1 * rates[2], 0.5 * rates[2]])
    assert not model.training
    name = "decoder.blocks.0.mlp.up.weight"
    moved = model.state_dict()[name] - before[name]
    assert moved.abs().max() > 1e-3
    # Muon's steps are all but orthogonal matrices; AdamW's have few directions.
    values = torch.linalg.svdvals(moved)
    assert (values.median() > 0.3 * values[0]) == (muon is not None)
    after = loaded.model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


def test_all_models_train_on_the_same_clips_and_the_learning_rate_is_scaled(trained):
    """At a scale of 0 nothing moves."""
    loaded = load_checkpoint_for_use(trained("causal_dit"))
    clips = open_training_clips(loaded)
    numbers = []
    read = clips._read
    clips._read = lambda sample, number: numbers.append(sample) or read(sample, number)
    before = copy.deepcopy(loaded.model.state_dict())
    for _ in range(2):
        for _ in fine_tuning(loaded.model, loaded.codec, loaded.options, clips, 2, 0.0):
            pass
    assert numbers == [2, 3, 4, 5] * 2  # batches of two, behind the one step of the run
    after = loaded.model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())


@pytest.mark.parametrize("kind", ["causal_dit", "scd"])
def test_probe_writes_a_report(trained, kind, capsys):
    checkpoint = trained(kind)
    command = ["probe", str(checkpoint), "--clips", "2", "--steps", "3", "--fine-tune", "2"]
    assert main([*command, "optim.ema_decay=0.5"]) == 0
    (folder,) = (checkpoint.parents[2] / "probe").glob("step-00000001-*")
    page, numbers = (
        (folder / "index.html").read_text(),
        json.loads((folder / "probe.json").read_text()),
    )
    pictures = {path.name for path in folder.glob("*.png")}
    assert all(f'<img src="{name}"' in page for name in pictures)
    expected = {"similarity", "similarity_to_last", "features", "attention", "frame_diagonal"}
    expected |= {"skipped", "left_out", "gradients", *(["split"] if kind == "causal_dit" else [])}
    expected |= {"context", "attention_context"} if kind == "scd" else set()
    assert pictures == {f"{name}.png" for name in expected}
    assert numbers["checkpoint"]["step"] == 1
    variants = numbers["frame_diagonal"]["variants"]
    assert len(variants) == (2 if kind == "causal_dit" else 1)
    assert all(len(variant["loss_by_level"]) == len(LEVELS) for variant in variants)
    assert numbers["frame_diagonal"]["fine_tuned"]
    assert numbers["clips"] == [0, 1]
    gradients = numbers["gradients"]
    assert len(gradients["norm_ratio"]["mean"]) == len(gradients["levels"]) == len(LEVELS)
    assert gradients["groups"][-1] == "all" and len(gradients["parameters"]) == 4
    assert "Unfinished" not in page
    if kind == "causal_dit":
        rows = numbers["suggestion"]["rows"]
        assert [[at["step"] for at in row["steps"]] for row in rows] == [[0], *[[0, 1, 2]] * 4]
        assert all(row["seconds_per_frame"] > 0 for row in rows)
        assert all(len(at["loss_by_level"]) == len(LEVELS) for row in rows for at in row["steps"])
        assert rows[0]["steps"][0]["loss_over_dense"] == [1, 0]
        # The command that it prints, with the overrides of the probe, makes what it suggests.
        arguments = shlex.split(numbers["suggestion"]["command"])[1:]
        assert main(arguments) == 0
        made = load_options(checkpoint.parents[2].with_name("causal_dit_split") / "options.yml")
        split = numbers["suggestion"]["split"]
        assert made.model.decoder_layers == split["decoder_layers"]
        assert made.optim.ema_decay == 0.5
    else:
        assert [*numbers["context"]["history"]] == ["1", "2"]
    assert str(folder / "index.html") in capsys.readouterr().out


def test_refusals(trained, capsys):
    checkpoint = str(trained("scd"))

    def refused(*arguments):
        assert main([*arguments]) == 1
        return capsys.readouterr().err

    assert "--steps 2: must be 3 or more" in refused("probe", checkpoint, "--steps", "2")
    for wrong in ("1", "x", "3,3", "-4", "2,-1"):
        assert f"--clips {wrong}: give how many" in refused("probe", checkpoint, f"--clips={wrong}")
    assert "--clips: " in (message := refused("probe", checkpoint, "--clips", "500"))
    assert "has clips 0 to 1, but no clip 499" in message
    none = refused("probe", checkpoint, "--clips", "2", "data.train_list=none.json")
    assert "none.json" in none and "--fine-tune 0 probes without training data" in none
    assert not (trained.root / "scd/probe").exists()  # all refused before anything is measured
    assert "eval.context_frames=1" in refused("probe", checkpoint, "eval.context_frames=1")
    sizes = ["--encoder-layers", "1", "--decoder-layers", "1", "--out", "nowhere"]
    assert "only a dense model" in refused("split", checkpoint, *sizes)


def test_what_was_measured_stays_when_a_later_probe_fails(trained, monkeypatch, capsys):
    from scd.analysis import probe

    def fails(probed):
        raise ScdError("no more")

    monkeypatch.setattr(probe, "probe_layer_skipping", fails)
    command = ["probe", str(trained("scd")), "--clips", "1,0", "--steps", "3", "--fine-tune", "0"]
    assert main(command) == 1
    (folder,) = (trained.root / "scd/probe").glob("step-00000001-*")
    numbers = json.loads((folder / "probe.json").read_text())
    assert numbers["clips"] == [1, 0] and "attention" in numbers and "skipped" not in numbers
    assert "Unfinished: 2 of 7 sections" in (folder / "index.html").read_text()


def test_chosen_clips():
    assert clip_numbers("3") == (0, 1, 2)
    assert clip_numbers("3,17,4") == (3, 17, 4)


def test_an_exported_folder_and_a_metric_that_is_missing(trained, monkeypatch):
    """A folder is probed like a checkpoint; the report says what could not be measured."""

    def nowhere(weights):
        raise MetricUnavailable("no weights here")

    monkeypatch.setattr(metrics, "weights_hash", nowhere)
    folder = trained.root / "exported"
    assert main(["export", str(trained("scd")), "--out", str(folder)]) == 0
    assert main(["probe", str(folder), "--clips", "2", "--steps", "3", "--fine-tune", "0"]) == 0
    (report,) = (trained.root / "scd/probe").glob("exported-*")
    assert "LPIPS is missing: no weights here" in (report / "index.html").read_text()
    numbers = json.loads((report / "probe.json").read_text())
    assert numbers["missing_metrics"] == {"lpips": "no weights here"}
    assert "lpips" not in numbers["skipped"]["variants"][0]
