"""The bidirectional model: which frames see which, its objective, joint denoising, its splits."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor

from scd.analysis.split import Split, split_model, split_options
from scd.errors import ScdError
from scd.evaluation import compare
from scd.evaluation.compare import Candidate, compare_checkpoints, time_frames
from scd.evaluation.evaluate import evaluate_checkpoint
from scd.flow.noise import draw_noise
from scd.flow.objective import JointObjective, errors_by_level
from scd.flow.sampler import noise_levels
from scd.models import BidirectionalDiT, CausalDiT
from scd.models.autoencoder import PixelCodec
from scd.models.load import LoadedModel, build_world_model
from scd.models.world_model import CLEAN_TIMESTEP
from scd.options import FlowOptions, Options, RolloutOptions, load_options
from scd.rollout import Rollout, continue_videos
from scd.training.build import make_objective
from scd.training.launch import run_experiment
from scd.training.run_log import read_log
from scd.utils import precision

FRAMES = 6
SETTINGS = RolloutOptions(steps=3, guidance="none", solver="multistep")


def make_model(prediction: str = "data", condition: str = "action") -> BidirectionalDiT:
    torch.manual_seed(0)
    model = BidirectionalDiT(
        channels=3,
        patch_size=2,
        heads=1,
        layers=2,
        condition=condition,
        num_conditions=4,
        prediction=prediction,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_clip(batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, FRAMES, 3, 4, 4, generator=generator)
    return latents, torch.randint(0, 4, (batch, FRAMES), generator=generator)


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])  # to which, as the default, bf16 is left
def test_weights_in_bf16_compute_in_bf16(wanted: str, monkeypatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    (clip, actions), model = make_clip(), make_model()
    given = clip[:, :2], 4, actions
    generator = [torch.Generator().manual_seed(0) for _ in range(2)]
    named = continue_videos(model, replace(SETTINGS, precision="bf16"), *given, generator=generator)
    generator = [torch.Generator().manual_seed(0) for _ in range(2)]
    settings, copied = replace(SETTINGS, precision=wanted), make_model().to(torch.bfloat16)
    assert torch.equal(continue_videos(copied, settings, *given, generator=generator), named)
    assert model.dtype == torch.float32


def test_its_tensors_are_those_of_the_dense_baseline() -> None:
    dense = CausalDiT(3, 2, 1, 2, "action", 4, prediction="data")
    ours = make_model()
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (dense, ours)]
    assert shapes[0] == shapes[1]


def test_given_frames_are_seen_clean_and_noisy_ones_noisy() -> None:
    model = make_model()
    latents, actions = make_clip()
    noisy = torch.randn(2, FRAMES, 3, 4, 4)
    times = torch.full((2, FRAMES), 600.0)
    times[:, :3] = CLEAN_TIMESTEP
    velocity = model.velocity(latents, noisy, times, actions)
    # The noise under a given frame and the clean frame under a noisy one are not seen.
    other_noise, other_latents = noisy.clone(), latents.clone()
    other_noise[:, :3] += 1
    other_latents[:, 3:] += 1
    same = model.velocity(other_latents, other_noise, times, actions)
    torch.testing.assert_close(same[:, 2:], velocity[:, 2:], rtol=0, atol=0)
    # Every frame sees every other, also later ones.
    for frame, tensor in ((1, latents), (5, noisy)):
        tensor[:, frame] += 1
        changed = model.velocity(latents, noisy, times, actions)
        assert ((changed - velocity)[:, 2:].abs().amax(dim=(0, 2, 3, 4)) > 1e-4).all()
        tensor[:, frame] -= 1


@pytest.mark.parametrize("given", [2, 3, 5])
def test_given_frames_need_no_noise(given: int) -> None:
    """F' noisy frames after F - F' given ones, also more given than noisy ones."""
    model, (latents, actions) = make_model(), make_clip()
    noisy, times = torch.randn(2, FRAMES, 3, 4, 4), torch.full((2, FRAMES), 600.0)
    times[:, :given] = CLEAN_TIMESTEP
    whole = model(latents, noisy[:, None], times[:, None], actions)
    fewer = model(latents, noisy[:, None, given:], times[:, None, given:], actions)
    torch.testing.assert_close(fewer, whole[:, :, given:], rtol=1e-5, atol=1e-5)


def test_draws_do_not_see_each_other() -> None:
    model = make_model()
    latents, actions = make_clip()
    noisy = torch.randn(2, 2, FRAMES - 1, 3, 4, 4)
    times = torch.tensor([300.0, 800.0])[None, :, None].repeat(2, 1, FRAMES - 1)
    together = model(latents, noisy, times, actions)
    for draw in (0, 1):
        alone = model(latents, noisy[:, draw : draw + 1], times[:, draw : draw + 1], actions)
        torch.testing.assert_close(alone[:, 0], together[:, draw], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_loss_is_that_of_the_frames_after_the_prefix(prediction: str) -> None:
    """The second clip without its actions, as if dropout had taken them."""
    model = make_model(prediction)
    latents, actions = make_clip()
    options = FlowOptions(prediction=prediction, prefix_frames=[2, 4], noise_draws=2)
    objective = make_objective(model, options, seed=0)
    assert isinstance(objective, JointObjective)
    draws = draw_noise(options, 0, [0, 1], latents, None)
    draws = draws._replace(
        prefix=torch.tensor([[0.0, 0.99], [0.5, 0.0]]), drop_condition=torch.tensor([False, True])
    )
    with torch.no_grad():
        loss = objective.loss(latents, actions, draws)
    actions[1] = 4  # none
    expected = []
    for clip in range(2):
        for draw in range(2):
            known = ([2, 4], [3, 2])[clip][draw]
            sigma = torch.sigmoid(options.logit_mean + draws.level[clip, draw, 0])
            noise = draws.noise[clip, draw]
            noisy = sigma * noise + (1 - sigma) * latents[clip]
            times = torch.full((1, FRAMES), float(1000 * sigma))
            times[:, :known] = CLEAN_TIMESTEP
            with torch.no_grad():
                one = model.velocity(latents[clip, None], noisy[None], times, actions[clip, None])
            error = (one[0] - (noise - latents[clip])[1:]).square()
            expected.append(error[known - 1 :].mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_held_out_loss_leaves_the_prefix_out() -> None:
    model = make_model()
    latents, actions = make_clip()
    noise = torch.randn(2, 1, FRAMES - 1, 3, 4, 4)
    errors = errors_by_level(model, latents, actions, noise, prefix=4)
    assert errors.shape == (2, 6, 2)
    latents[:, 2] += 1  # given
    assert not torch.allclose(errors_by_level(model, latents, actions, noise, prefix=4), errors)


@pytest.mark.parametrize("solver", ["multistep", "consistency"])
def test_joint_denoising_is_the_same_alone_and_in_a_batch(
    solver: Literal["multistep", "consistency"],
) -> None:
    model = make_model()
    settings = replace(SETTINGS, solver=solver)
    latents, actions = make_clip()
    context = latents[:, :2]

    def generators(numbers: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    both = continue_videos(model, settings, context, 4, actions, generator=generators([7, 8]))
    assert both.shape == (2, 4, 3, 4, 4)
    alone = continue_videos(model, settings, context[1:], 4, actions[1:], generator=generators([8]))
    torch.testing.assert_close(alone[0], both[1], rtol=1e-4, atol=1e-4)
    guided = replace(settings, guidance="condition", guidance_scale=1.5)
    other = continue_videos(model, guided, context, 4, actions, generator=generators([7, 8]))
    assert not torch.allclose(other, both)
    # At a scale of 1 the null condition has no say.
    none = continue_videos(
        model,
        replace(guided, guidance_scale=1.0),
        context,
        4,
        actions,
        generator=generators([7, 8]),
    )
    torch.testing.assert_close(none, both, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_joint_consistency_written_out(scale: float) -> None:
    """Every frame draws its noise as in a rollout: the initial, then that of every later step.

    With guidance, below the highest level, away from what no frame has a condition for.
    """
    model = make_model()
    latents, actions = make_clip()
    settings = RolloutOptions(3, "consistency", "even", 5.0, guidance="none", temperature=0.8)
    if scale != 1:
        settings = replace(
            settings, guidance="condition", guidance_scale=scale, guidance_interval=[0.0, 0.95]
        )
    seed = torch.Generator().manual_seed(7)
    new = continue_videos(model, settings, latents[:, :2], 4, actions, generator=seed)
    seed, draws = torch.Generator().manual_seed(7), []
    for _ in range(4):
        initial = torch.randn(2, 3, 4, 4, generator=seed)[:, None]
        draws.append(torch.cat([initial, torch.randn(2, 2, 3, 4, 4, generator=seed)], dim=1))
    x, first, second = (0.8 * torch.stack(draws, dim=2)).unbind(dim=1)  # (B, 4, C, H, W) each
    levels = noise_levels(3, "even", 5.0)
    for sigma, following, fresh in zip(levels, levels[1:], (first, second, None), strict=False):
        times = torch.full((2, FRAMES), 1000 * sigma)
        times[:, :2] = CLEAN_TIMESTEP
        noisy = torch.cat([latents[:, :2], x], dim=1)
        with torch.no_grad():
            v = model.velocity(latents, noisy, times, actions)
            if sigma <= 0.95:
                without = model.velocity(latents, noisy, times, torch.full_like(actions, 4))
                v = without + scale * (v - without)
        x = x - sigma * v[:, 1:]
        if fresh is not None:
            x = (1 - following) * x + following * fresh
    torch.testing.assert_close(new, x, rtol=1e-4, atol=1e-4)


def test_a_label_is_the_condition_of_every_frame() -> None:
    latents, _ = make_clip()
    labels = torch.tensor([1, 3])

    def continued(condition: str, **given: Tensor) -> Tensor:
        seed = torch.Generator().manual_seed(7)
        model = make_model(condition=condition)
        return continue_videos(model, SETTINGS, latents[:, :2], 4, **given, generator=seed)

    of_labels = continued("label", labels=labels)
    of_actions = continued("action", actions=labels[:, None].expand(-1, FRAMES))
    torch.testing.assert_close(of_labels, of_actions, rtol=0, atol=0)
    assert not torch.allclose(continued("label"), of_labels)


def test_it_cannot_be_rolled_out_frame_by_frame() -> None:
    with pytest.raises(ScdError, match="all frames of a clip at once"):
        Rollout(make_model(), SETTINGS, 8)
    with pytest.raises(ScdError, match="first_frame_steps is 0"):
        settings = replace(SETTINGS, first_frame_steps=4)
        continue_videos(make_model(), settings, torch.zeros(1, 2, 3, 4, 4), 4)
    with pytest.raises(ScdError, match="at least one context frame"):
        continue_videos(make_model(), SETTINGS, torch.zeros(1, 0, 3, 4, 4), 4)


def doom_options(*overrides: str) -> Options:
    return load_options("options/bidirectional_dit_doom.yml", list(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("flow.prefix_frames=[]", "needs the lowest and the highest"),
        ("flow.prefix_frames=[8,48]", "below data.frames=48"),
        ("flow.prefix_frames=[9,8]", "the lowest and the highest"),
        ("eval.new_frames=64", "more than data.frames=48"),
        ("flow.history_noise_max=0.1", "has no history"),
        ("flow.encoder_input=noisy", "has no encoder"),
        ("rollout.guidance=context", "no separate context"),
        ("rollout.first_frame_steps=4", "all new frames at once"),
        ("model.type=causal_dit", "the others have none"),
    ],
)
def test_options_that_contradict_it_are_refused(override: str, message: str) -> None:
    with pytest.raises(ScdError, match=message.replace("[", r"\[")):
        doom_options(override)


def test_its_split_is_an_scd_of_its_weights() -> None:
    options = doom_options("autoencoder.path=null", "data.source=video", "model.heads=1")
    codec = PixelCodec()
    teacher = build_world_model(options, codec)
    assert isinstance(teacher, BidirectionalDiT)
    split = Split(5, 2, "first-and-last")
    student_options = split_options(options, split)
    assert student_options.flow.prefix_frames == []
    student = split_model(teacher, codec, student_options, split)
    weights = teacher.state_dict()
    for name, source in (
        ("encoder.blocks.4.mlp.up.weight", "blocks.4.mlp.up.weight"),
        ("decoder.blocks.0.attention.qkv.weight", "blocks.0.attention.qkv.weight"),
        ("decoder.blocks.1.attention.qkv.weight", "blocks.5.attention.qkv.weight"),
    ):
        torch.testing.assert_close(student.state_dict()[name], weights[source])


def test_its_time_is_shared_by_the_frames_it_makes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = doom_options(
        *("autoencoder.path=null", "data.source=video", "data.frame_size=8", "model.patch_size=2"),
        *("eval.context_frames=2", "eval.new_frames=4", "rollout.steps=1"),
    )
    candidate = Candidate(LoadedModel(make_model(), PixelCodec(), options, {}), {}, [])
    clock = SimpleNamespace(perf_counter=count(step=8).__next__)
    monkeypatch.setattr(compare, "time", clock)
    time_frames([candidate])
    assert candidate.seconds == [2.0] * compare.TIMED_FRAMES


def test_a_training_is_validated_exported_and_evaluated(
    doom_root: Path, tmp_path: Path, fresh_accelerate: None
) -> None:
    options = doom_options(
        *(f"data.root={doom_root}", f"output_root={tmp_path}", "init_from=null"),
        *(
            "data.source=video",
            "data.frames=8",
            "autoencoder.path=null",
            "flow.prefix_frames=[2,6]",
        ),
        *("model.patch_size=16", "model.heads=1", "model.layers=2", "train.compile=false"),
        *("train.steps=2", "train.batch_size=2", "train.workers=0", "train.val_loss_every=2"),
        *("eval.context_frames=4", "eval.new_frames=4", "eval.videos=2", "rollout.steps=2"),
        *("eval.comparisons=[]", "eval.swapped_actions=[]"),
    )
    run_experiment(options)
    (held_out,) = [e for e in read_log(options.output / "log.jsonl") if "val_loss" in e]
    assert torch.tensor(list(held_out.values())).isfinite().all()
    folder = options.output / "exported"
    evaluate_checkpoint(folder, None, [], [], False)
    rows = json.loads(next(options.output.rglob("metrics.json")).read_text())["rows"]
    assert 0 < rows["model"]["psnr"] < 60
    compare_checkpoints([folder], tmp_path / "compared")
    assert "bidirectional_dit" in (tmp_path / "compared/compare.md").read_text()
