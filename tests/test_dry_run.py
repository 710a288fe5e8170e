"""Every options file is built and run once, at reduced width, and the step estimate is right."""

import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scd.distill import dmd
from scd.errors import ScdError
from scd.evaluation import metrics
from scd.evaluation.metric_weights import MetricUnavailable, weights_hash
from scd.models import cpu
from scd.models.autoencoder import PixelCodec
from scd.options import AutoencoderOptions, load_options
from scd.training import dry_run
from scd.training.distillation_cost import distillation_cost, teacher_options
from scd.training.distillation_task import DistillationTask
from scd.training.dry_run import counterpart
from scd.training.step_cost import estimate_step

ROOT = Path(__file__).parent.parent
# Those of Wans run in miniature (tests/test_wan_training.py).
FILES = sorted(p for p in (ROOT / "options").glob("*.yml") if "_wan" not in p.stem)
# Like others but for sizes, data or numbers of steps.
ALIKE = ("_large", "_tiny", "_realestate10k", "_ucf101", "_continued", "_weak", "_adversarial")
ALIKE += ("_dmlab", "_long")
SMALL = {
    "world_model": ["model.heads=1", "data.frames=3", "eval.context_frames=3"],
    "autoencoder": ["autoencoder.lpips_weight=0", "data.frames=1"],
}


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def narrow(a: AutoencoderOptions) -> list[str]:
    """Overrides that keep the stages but not their sizes."""
    stages = len(a.encoder_channels)
    widths, layers = str([32] * stages), str([0] + [1] * (stages - 1))
    sides = ("encoder", "decoder")
    return [
        *(f"autoencoder.{side}_channels={widths}" for side in sides),
        *(f"autoencoder.{side}_layers={layers}" for side in sides),
    ]


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem.endswith(ALIKE) else [])
        for p in FILES
    ],
)
def test_every_options_file_runs_dry(file, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plain = dry_run._architecture

    def narrow_architecture(path: str) -> AutoencoderOptions:
        described = plain(path)  # the file that describes it must be there
        stages = len(described.encoder_channels)
        sides = {}
        for side in ("encoder", "decoder"):
            sides[f"{side}_block_types"] = ["ResBlock"] * stages
            sides[f"{side}_channels"] = [32] * stages
            sides[f"{side}_layers"] = [0] + [1] * (stages - 1)
        return replace(described, **sides)

    def too_slow_here(weights: str) -> str:
        if weights == "i3d":
            raise MetricUnavailable("left out of this test")
        return weights_hash(weights)

    monkeypatch.setattr(dry_run, "_architecture", narrow_architecture)
    monkeypatch.setattr(metrics, "weights_hash", too_slow_here)
    options = load_options(file)
    overrides = list(SMALL[options.task])
    if options.task == "world_model":
        layers = ["encoder_", "decoder_"] if options.model.type == "scd" else ["layers"]
        overrides += [f"model.{side.removesuffix('layers')}layers=1" for side in layers]
        overrides += ["eval.context_frames=0"] if not options.eval.context_frames else []
        overrides += ["distill.context_frames=1"] if options.distill.method == "dmd" else []
        overrides += ["distill.window_frames=2"] if options.distill.window_frames else []
        if options.model.type == "bidirectional_dit":
            overrides += ["flow.prefix_frames=[1,2]", "eval.context_frames=1", "eval.new_frames=2"]
    elif options.autoencoder.world_model is not None:
        overrides += ["data.frames=5"]
    elif options.discriminator.weight:
        overrides += ["discriminator.channels=8", "data.frames=2"]
    else:
        overrides += narrow(options.autoencoder)
    if options.data.frame_size > 128:  # half of it: what divides that divides the whole
        sizes = {key: getattr(options.data, key) for key in ("frame_size", "resize_shorter")}
        overrides += [f"data.{key}={size // 2}" for key, size in sizes.items() if size]
    overrides += ["train.batch_size=1", "train.compile=false", f"data.root={file.stem}-is-nowhere"]
    dry_run.dry_run(load_options(file, overrides))
    out = capsys.readouterr().out
    assert f"{options.name}: a step, a rollout and an evaluation on noise succeeded" in out
    compared = options.task == "world_model" and options.distill.method == "none"
    assert ("(for comparison)" in out) == compared
    assert ("beside it    teacher" in out) == (options.distill.method != "none")


def test_an_autoencoder_that_nothing_describes():
    options = load_options(
        ROOT / "options/scd_doom_tiny.yml", ["autoencoder.path=somewhere/unknown"]
    )
    with pytest.raises(ScdError, match="somewhere/unknown: no autoencoder there, and no folder"):
        dry_run.dry_run(options)


@pytest.mark.parametrize("name", ["scd_doom_tiny", "causal_dit_doom_tiny"])
def test_estimate_is_what_a_real_step_takes(name):
    """The count on tensors without memory against the count on a real step, to the operation."""
    options = load_options(
        ROOT / f"options/{name}.yml",
        [
            *("data.source=video", "autoencoder.path=null", "model.patch_size=16"),
            *("data.frames=5", "train.batch_size=2"),
        ],
    )
    found = estimate_step(options, PixelCodec())
    assert found.tokens == 2 * 5 * 16
    from scd.flow.objective import FlowObjective
    from scd.models.load import build_world_model

    model = build_world_model(options, PixelCodec())
    assert found.total_parameters == sum(p.numel() for p in model.parameters())
    assert found.state_bytes == 20 * found.total_parameters
    batch = {
        "sample": torch.arange(2),
        "latents": torch.rand(2, 5, 3, 64, 64),
        "actions": torch.zeros(2, 5, dtype=torch.long),
    }
    with FlopCounterMode(display=False) as counter:
        FlowObjective(model, options.flow, 0)(batch)["loss"].backward()
    assert abs(found.flops / counter.get_total_flops() - 1) < 0.01


DENSE = ["model.type=causal_dit", "model.layers=3"]
DENSE += ["model.encoder_layers=0", "model.decoder_layers=0"]
VECTORS = ["model.condition=action_vector", "eval.swapped_actions=[]"]
LONG = ["data.frames=10", "distill.window_frames=6"]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "more", "deeper"),
    [
        ("consistency", [], 0),
        slow("consistency", ["distill.guidance_scale=2"], 0),
        slow("distilled", [], 0),
        slow("distilled", [], 2),
        slow("distilled", ["distill.context_frames=5"], 0),
        ("distilled", ["distill.guidance_scale=2", *VECTORS], 0),
        slow("distilled", ["distill.self_rollout=false"], 0),
        slow("distilled", DENSE, 0),
        slow("long", LONG, 0),
        slow("long", [*LONG, "rollout.window=6"], 0),
    ],
)
def test_post_training_costs_what_its_steps_take(stage, more, deeper, tmp_path, monkeypatch):
    """The count against real steps, averaged over every exit and every place of the window.

    Args:
        deeper: how many layers more than a student a bidirectional teacher has.
    """
    options = load_options(
        ROOT / f"options/scd_doom_{stage}.yml",
        [
            *("data.source=video", "autoencoder.path=null", "model.patch_size=16"),
            *("data.frames=8", "train.batch_size=1", "model.heads=2", "train.compile=false"),
            *(["distill.context_frames=2"] if stage != "consistency" else []),
            *("model.encoder_layers=3", "model.decoder_layers=2", "eval.context_frames=2"),
            *more,
        ],
    )
    kind = teacher_options(options.model)
    kind = replace(kind, layers=kind.layers + deeper)
    monkeypatch.setattr(dry_run, "teacher_options", lambda _: kind)
    options = dry_run._on_noise(options, tmp_path)
    task = DistillationTask(options, torch.device("cpu"))
    found, objective = distillation_cost(options, PixelCodec(), task.teacher_kind), task.objective
    if not deeper:
        assert distillation_cost(options, PixelCodec()) == found
    assert task.clip_cost() == (found.tokens, found.flops)  # what a training logs
    networks = dict(objective.named_children())
    counts = {name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()}
    own = counts.pop("model")
    assert sorted(found.networks.values()) == sorted(counts.values())
    moments = counts.get("critic", 0)
    assert found.state_bytes == 20 * own + 4 * sum(counts.values()) + 12 * moments
    actions = (4,) if options.model.condition == "action_vector" else ()
    clip = {
        "sample": torch.arange(1),
        "latents": torch.rand(1, options.data.frames, 3, 64, 64),
        "actions": torch.zeros(1, options.data.frames, *actions, dtype=torch.long),
    }
    monkeypatch.setattr(cpu, "_packable", lambda weight: False)  # those products are not counted
    taken = []
    starts = (0, 2, 4) if stage == "long" else (0,)
    for exit_at, start in product((0.25, 0.75), starts):
        monkeypatch.setattr(dmd, "draw_exit", lambda *_, at=exit_at: at)
        monkeypatch.setattr(dmd, "draw_start", lambda *_, at=start: at)
        with FlopCounterMode(display=False) as counter:
            objective({**clip, "step": 1})["loss"].backward()
        taken.append(counter.get_total_flops())
    assert found.flops == pytest.approx(sum(taken) / len(taken), rel=0.03)
    if stage != "consistency":
        seldom = replace(options, distill=replace(options.distill, critic_updates=4))
        slower = distillation_cost(seldom, PixelCodec(), task.teacher_kind)
        assert found.flops - slower.flops == pytest.approx(0.75 * found.student)


@pytest.mark.slow
def test_a_step_has_all_its_batches():
    """With accumulated gradients a step costs a multiple of one batch, and no more memory."""
    file, small = ROOT / "options/scd_doom_distilled.yml", ["model.heads=1", "model.patch_size=4"]
    one, three = (
        dry_run.describe(load_options(file, [*small, f"train.gradient_accumulation={n}"]))
        for n in (1, 3)
    )
    step = re.compile(
        r"a step +(\S+) tokens of clips, (\S+) TFLOP, on average: rollouts (\S+), critic (\S+), "
        r"in one of 2 steps the student (\S+)\n(.*)"
    )
    (*parts, memory), (*all_parts, all_memory) = (
        step.search(text).groups() for text in (one, three)
    )
    assert [float(n) for n in all_parts] == pytest.approx([3 * float(n) for n in parts], rel=0.01)
    assert memory == all_memory


def test_counterparts_have_as_many_layers():
    for name in ("scd_minecraft", "causal_dit_minecraft"):
        options = load_options(ROOT / f"options/{name}.yml")
        other = counterpart(options).model
        layers = {m.encoder_layers + m.decoder_layers + m.layers for m in (options.model, other)}
        assert layers == {12} and other.type != options.model.type
        assert counterpart(counterpart(options)).model == options.model
