"""Actions that are vectors (several keys at once, a mouse), from the data to the evaluation."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from scd.cli import main
from scd.data.clips import ClipFolder
from scd.data.lists import ClipEntry, write_list
from scd.data.loader import TrainingClips
from scd.doom.record import record_dataset
from scd.errors import ScdError
from scd.evaluation.protocol import swap_new_actions
from scd.flow.noise import draw_noise
from scd.flow.objective import FlowObjective
from scd.flow.sampler import noise_levels
from scd.models import SCD, CausalDiT
from scd.models.layers import ConditionEmbedding
from scd.options import FlowOptions, RolloutOptions, load_options
from scd.pipeline import SCDPipeline
from scd.rollout import Rollout, continue_videos, generate
from scd.utils.files import read_json
from tests.test_causal_dit import make

ROOT = Path(__file__).parent.parent
KEYS_TINY = str(ROOT / "options/scd_doom_keys_tiny.yml")
B, F, C, H, W, V = 2, 6, 4, 4, 6, 3
KNOWN, STEPS = 4, 3
NEW = F - KNOWN
TOLERANCE = 5e-5  # absolute, fp32
KINDS = pytest.mark.parametrize("kind", [SCD, CausalDiT])


def vector_model(kind=SCD, **config):
    return make(kind, condition="action_vector", num_conditions=V, **config)


@pytest.fixture(scope="module")
def inputs():
    """Latents, noise, timesteps, and actions of which some are keys, some any number."""
    g = torch.Generator().manual_seed(1)
    latents, noisy = torch.randn(2, B, F, C, H, W, generator=g)
    actions = torch.randint(0, 2, (B, F, V), generator=g).float()
    actions[..., -1] = torch.randn(B, F, generator=g)
    return latents, noisy, 1000 * torch.rand(B, F, generator=g), actions


# --- One integer is the special case


@torch.no_grad()
def test_a_one_hot_vector_is_a_row_of_the_table():
    torch.manual_seed(0)
    conditioning = ConditionEmbedding(64, V)
    times, indices = torch.rand(B, F) * 1000, torch.randint(0, V + 1, (B, F))
    vectors = one_hot(indices, V + 1).float()
    assert torch.equal(conditioning(times, vectors), conditioning(times, indices))
    null = torch.full_like(indices, V)
    assert torch.equal(conditioning(times, None), conditioning(times, null))


@torch.no_grad()
@KINDS
def test_the_weights_of_an_index_model_serve_one_hot_vectors(kind, inputs):
    latents, noisy, times, _ = inputs
    indices = torch.randint(0, V, (B, F), generator=torch.Generator().manual_seed(2))
    of_index, of_vector = make(kind), vector_model(kind)
    of_vector.load_state_dict(of_index.state_dict())
    for actions, vectors in ((indices, one_hot(indices, V)), (None, None)):
        expected = of_index.velocity(latents, noisy, times, actions)
        found = of_vector.velocity(latents, noisy, times, vectors)
        assert (found - expected).abs().max() < 1e-6
    expected, found = (
        generate(
            model,
            latents[:, :KNOWN],
            actions=actions,
            num_frames=NEW,
            num_steps=STEPS,
            guidance="condition",
            guidance_scale=1.5,
            noise=noisy[:, KNOWN:],
        )
        for model, actions in ((of_index, indices), (of_vector, one_hot(indices, V)))
    )
    assert (found - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_nothing_pressed_is_not_nothing_known(inputs):
    latents, noisy, times, actions = inputs
    model = vector_model()
    unknown = model.velocity(latents, noisy, times)
    nothing = model.velocity(latents, noisy, times, torch.zeros_like(actions))
    assert (unknown - nothing).abs().max() > 0.01


# --- The network


@torch.no_grad()
@KINDS
def test_action_i_leads_to_frame_i(kind, inputs):
    """To the bit: an action is first seen by the velocity of its own frame."""
    latents, noisy, times, actions = inputs
    model = vector_model(kind)
    before = model.velocity(latents, noisy, times, actions)  # of frames 1, 2, …
    for i in range(1, F):
        for component in range(V):
            changed = actions.clone()
            changed[:, i, component] += 0.5
            after = model.velocity(latents, noisy, times, changed)
            assert torch.equal(before[:, : i - 1], after[:, : i - 1])
            assert (before[:, i - 1] != after[:, i - 1]).any()


@pytest.mark.parametrize(
    ("actions", "told"),
    [
        (torch.zeros(B, F), r"actions are \(2, 6\), expected \(2, 6, 3\)"),
        (torch.zeros(B, F, V + 1), r"expected \(2, 6, 3\)"),
        (torch.full((B, F, V), float("nan")), "actions must be finite"),
    ],
)
def test_actions_that_a_model_refuses(inputs, actions, told):
    latents, noisy, times, _ = inputs
    model = vector_model()
    with pytest.raises(ScdError, match=told):
        model.velocity(latents, noisy, times, actions)
    with pytest.raises(ScdError, match=told):
        continue_videos(model, RolloutOptions(1, guidance="none"), latents[:, :1], F - 1, actions)


# --- Rollouts


@torch.no_grad()
@KINDS
@pytest.mark.parametrize(("guidance", "scale"), [("none", 1.0), ("condition", 1.7)])
@pytest.mark.parametrize("known", [0, KNOWN])
def test_cached_equals_uncached(kind, inputs, guidance, scale, known):
    """Every new frame is what the plain network gives on the same history."""
    latents, noise, _, actions = inputs
    model = vector_model(kind, first_frame=not known)
    noise = noise[:, :NEW]
    new = generate(
        model,
        latents[:, :known],
        actions=actions[:, : known + NEW],
        num_frames=NEW,
        num_steps=STEPS,
        guidance=guidance,
        guidance_scale=scale,
        noise=noise,
    )
    history = latents[:, :known]
    for i in range(NEW):
        x, n = noise[:, i : i + 1], known + i
        for sigma, following in pairwise(noise_levels(STEPS)):
            frames = torch.cat([history, x], dim=1)
            times = torch.full((B, n + 1), 1000 * sigma)
            v = model.velocity(frames, frames, times, actions[:, : n + 1])[:, -1:]
            if guidance == "condition":
                without = model.velocity(frames, frames, times)[:, -1:]
                v = without + scale * (v - without)
            x = x + (following - sigma) * v
        history = torch.cat([history, x], dim=1)
    assert (new - history[:, known:]).abs().max() < TOLERANCE


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("window", [0, 2])
def test_a_sample_does_not_depend_on_its_batch(kind, inputs, window):
    """Nor on whether a frame's action came with the context or was the last one stepped."""
    latents, noise, _, actions = inputs
    model = vector_model(kind)
    settings = RolloutOptions(STEPS, guidance="condition", guidance_scale=1.5, window=window)
    shared = (settings, latents[:, :KNOWN], NEW, actions)
    both = continue_videos(model, *shared, noise=noise[:, KNOWN:])
    for b in range(B):
        one = slice(b, b + 1)
        rollout = Rollout(model, settings, F)
        rollout.reset(latents[one, :KNOWN], actions[one, :KNOWN])
        for i in range(NEW):
            frame = rollout.step(actions[one, KNOWN + i], noise[one, KNOWN + i])
            assert (frame - both[one, i]).abs().max() < TOLERANCE
    other = actions.clone()
    other[:, -1] += 1  # it is seen, by the last frame alone
    moved = continue_videos(model, *shared[:3], other, noise=noise[:, KNOWN:])
    assert (moved[:, :-1] - both[:, :-1]).abs().max() < TOLERANCE
    assert (moved[:, -1] - both[:, -1]).abs().amax(dim=(1, 2, 3)).min() > 0.01


# --- Training


def test_a_dropped_vector_is_the_null_condition(inputs):
    """Sample by sample; and every row of the table learns from what is left."""
    latents, _, _, actions = inputs
    model = vector_model()
    made = FlowObjective(model, FlowOptions(condition_dropout=0.5, context_noise=0.0), 0)
    draws = draw_noise(made.options, 0, [0, 1], latents, None)
    draws = draws._replace(drop_condition=torch.tensor([True, False]))
    conditions = model.frame_conditions((B, F), actions, None)
    expected = conditions.clone()
    expected[0] = model.null_conditions((1, F))
    kept = draws._replace(drop_condition=torch.tensor([False, False]))
    loss = made.loss(latents, conditions, draws)
    assert torch.equal(loss, made.loss(latents, expected, kept))
    assert not torch.isclose(loss, made.loss(latents, conditions, kept))
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("conditioning.table.weight"):
            assert (parameter.grad.abs().amax(dim=1) > 0).all()


@torch.no_grad()
@KINDS
def test_k_draws_are_k_separate_passes(kind, inputs):
    """Every draw of a clip is under that clip's vectors (within 1e-6)."""
    latents, _, _, actions = inputs
    model = vector_model(kind)
    made = FlowObjective(model, FlowOptions(noise_draws=3, context_noise=0.0), 0)
    draws = draw_noise(made.options, 0, [0, 1], latents, None)
    conditions = model.frame_conditions((B, F), actions, None)
    together = made.loss(latents, conditions, draws)
    separate = [
        made.loss(
            latents,
            conditions,
            draws._replace(level=draws.level[:, k : k + 1], noise=draws.noise[:, k : k + 1]),
        )
        for k in range(3)
    ]
    assert abs(together - sum(separate) / 3) < 1e-6 * together


# --- Data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A clip of 12 frames, and the actions of three keys and a mouse."""
    rng = np.random.default_rng(0)
    numbers = np.arange(12, dtype=np.uint8)[:, None, None, None]  # each frame shows its own
    np.savez(tmp_path / "clip.npz", video=np.broadcast_to(numbers, (12, 32, 32, 3)))
    mouse = rng.normal(size=(12, 4))
    np.savez(tmp_path / "mouse.npz", actions=mouse)
    np.savez(tmp_path / "keys.npz", actions=mouse > 0)
    write_list(tmp_path / "mouse.json", [ClipEntry("clip.npz", "mouse.npz")])
    write_list(tmp_path / "keys.json", [ClipEntry("clip.npz", "keys.npz")])
    return tmp_path


@pytest.mark.parametrize("name", ["mouse", "keys"])
def test_vectors_are_read_beside_their_frames(root: Path, name: str) -> None:
    folder = ClipFolder(root, f"{name}.json", "video", "action_vector", 4)
    clip = TrainingClips(folder, frames=5, stride=1, seed=3)[0]
    actions = np.load(root / f"{name}.npz")["actions"].astype(np.float32)
    numbers = clip["video"][:, 0, 0, 0].int()
    assert numbers[0] > 0 and clip["actions"].dtype == torch.float32
    assert np.array_equal(clip["actions"], actions[numbers])


@pytest.mark.parametrize(
    ("actions", "condition", "told"),
    [
        (
            np.zeros((12, 4)),
            "action",
            r"needs integers, one per frame; .*\(12, 4\) .* action_vector",
        ),
        (
            np.zeros(12, int),
            "action_vector",
            r"needs vectors of 4 numbers, one per frame; .*\(12,\) .* action$",
        ),
        (np.zeros((12, 5)), "action_vector", "have 5 components, but the model knows 4"),
        (np.zeros((11, 4)), "action_vector", "11 actions for 12 frames"),
        (np.full((12, 4), np.inf), "action_vector", "not all finite"),
        (np.full((12, 4), 1e300), "action_vector", "not all finite"),
        (np.zeros((12, 4, 1)), "action_vector", r"one row per frame, not float64 \(12, 4, 1\)"),
        (np.zeros((12, 4), complex), "action_vector", "not complex128"),
    ],
)
def test_vectors_that_are_refused(root: Path, actions, condition: str, told: str) -> None:
    np.savez(root / "keys.npz", actions=actions)
    folder = ClipFolder(root, "keys.json", "video", condition, 4)
    with pytest.raises(ScdError, match=rf"keys\.npz: .*{told}"):
        folder.read(0, 4)


def test_validate_counts_what_is_held_together(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    actions = np.zeros((12, 3), np.uint8)
    actions[:6, 2] = 1
    actions[:3, 0] = 1
    np.savez(root / "keys.npz", actions=actions)
    lists = [f"data.{split}_list=keys.json" for split in ("train", "val")]
    changes = [f"data.root={root}", *lists, "data.source=video", "data.frame_size=32"]
    report = tmp_path / "report.json"
    assert main(["validate", "--opt", KEYS_TINY, "--json", str(report), *changes]) == 0
    told = capsys.readouterr().out
    assert "nothing 50.0%, turn left + forward 25.0%, forward 25.0%" in told
    held = read_json(report)["lists"][0]["held"]
    assert held == [
        {"components": [], "frames": 6},
        {"components": [0, 2], "frames": 3},
        {"components": [2], "frames": 3},
    ]
    more = [
        *changes,
        "model.num_conditions=2",
        "data.action_names=[a,b]",
        "eval.swapped_actions=[]",
    ]
    assert main(["validate", "--opt", KEYS_TINY, *more]) == 1
    assert "3 components, but the model knows 2" in capsys.readouterr().out


# --- Pipeline and evaluation


def test_the_pipeline_takes_vectors_of_any_kind() -> None:
    pipeline = SCDPipeline(vector_model(channels=3))
    pipeline.set_progress_bar_config(disable=True)
    video = torch.rand(1, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    keys = torch.tensor([[[0, 0, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0]]])

    def made(actions) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_frames": 2, "num_inference_steps": 2, "guidance": "none"}
        return pipeline(video, actions=actions, generator=generator, **given).frames

    first = made(keys)
    kinds: list[Callable] = [
        lambda: keys[0].tolist(),
        lambda: keys.bool(),
        lambda: keys.numpy().astype(np.uint8),
        lambda: keys.numpy().astype(np.float64),
    ]
    assert all(torch.equal(made(kind()), first) for kind in kinds)
    assert not torch.equal(made(keys * 0.5), first)
    for actions, told in (
        (keys[..., 0], r"actions have shape \(1, 4\), expected \(1, 4, 3\)"),
        (keys[:, :3], r"actions have shape \(1, 3, 3\)"),
        (keys * 1j, "not numbers"),
        (keys * float("inf"), "must be finite"),
    ):
        with pytest.raises(ScdError, match=told):
            made(actions)


def test_swapped_actions_exchange_two_components() -> None:
    options = load_options(KEYS_TINY, ["eval.context_frames=2"])
    actions = torch.arange(2 * 5 * 3).float().view(2, 5, 3)
    swapped = swap_new_actions(actions, options)
    assert torch.equal(swapped[:, :2], actions[:, :2])
    assert torch.equal(swapped[:, 2:], actions[:, 2:][..., [1, 0, 2]])


@pytest.mark.usefixtures("fresh_accelerate")
def test_recorded_keys_train_and_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `scd record --keys` to the table, with a row under swapped turns."""
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "no weights"))
    data = tmp_path / "doom"
    record_dataset(data, train_episodes=2, val_episodes=2, frames=12, size=64, keys=True)
    changes = [
        *(f"data.root={data}", f"output_root={tmp_path}", "name=keys", "data.source=video"),
        *("data.frames=6", "autoencoder.path=null", "model.patch_size=32", "model.heads=1"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "train.steps=2", "train.workers=0"),
        *("train.batch_size=2", "train.mixed_precision=fp32", "train.trackers=[]"),
        *("eval.context_frames=3", "eval.new_frames=3", "eval.videos=2", "rollout.steps=1"),
        "eval.saved_videos=0",
    ]
    assert main(["train", "--opt", KEYS_TINY, *changes]) == 0
    checkpoint = tmp_path / "keys/checkpoints/step-00000002/ema.safetensors"
    assert main(["evaluate", str(checkpoint)]) == 0
    found = read_json(tmp_path / "keys/metrics.json")
    assert "turn left and turn right swapped" in json.dumps(found)
