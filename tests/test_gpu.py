"""What only a GPU can show, in one call: `python -m pytest tests/test_gpu.py -s`.

Skipped without CUDA. Figures are printed beside the assertions, so that one run tells them all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scd.benchmark.runner import benchmark
from scd.distill import dmd
from scd.distill.critic import Critic
from scd.evaluation.evaluate import evaluate_checkpoint
from scd.evaluation.metric_weights import weights_path
from scd.models import SCD, BidirectionalDiT, CausalDiT, attention
from scd.models.layers import HEAD_DIM
from scd.options import DistillOptions, Options, RolloutOptions
from scd.rollout import Rollout
from scd.training.checkpoint import latest_checkpoint, load_checkpoint
from scd.training.run_log import read_log
from scd.utils import seeding
from scd.utils.precision import has_bf16
from tests.faults.runs import free_port

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ROOT = Path(__file__).parent.parent
OPTIONS = ROOT / "options/scd_doom_tiny.yml"
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def true_float32():
    """TF32 would hide what is compared here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make(kind: type):
    layers = {"encoder_layers": 2, "decoder_layers": 2} if kind is SCD else {"layers": 2}
    torch.manual_seed(0)
    model = kind(**{"channels": 4, "heads": 2, "condition": "action", "num_conditions": 3} | layers)
    for parameter in model.parameters():  # nothing starts at zero, so everything has a say
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("past", [0, 5])
def test_flex_equals_masked_equals_cpu(past):
    n, frames = 64, 20
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 2, frames * n, HEAD_DIM, generator=g)
    k, v = torch.randn(2, 2, 2, (past + frames) * n, HEAD_DIM, generator=g)
    on_cpu = attention.block_causal_attention(q, k, v, n)
    q, k, v = (x.to(GPU).requires_grad_() for x in (q, k, v))
    flex = attention.block_causal_attention(q, k, v, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MASKED_TOKENS", 10**9)
        masked = attention.block_causal_attention(q, k, v, n)
    assert (flex - masked).abs().max() < 1e-4
    assert (flex.cpu() - on_cpu).abs().max() < 1e-4
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (flex, masked)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("kind", [SCD, CausalDiT])
@pytest.mark.parametrize(("frames", "side"), [(4, 4), (24, 8)])  # with masks; by FlexAttention
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_equals_eager_equals_cpu(kind, frames, side, checkpointing):
    losses, gradients = [], []
    for device, compiled in ((CPU, False), (GPU, False), (GPU, True)):
        model = make(kind).to(device)
        model.set_gradient_checkpointing(checkpointing)
        if compiled:
            for part in model.children():
                for module in part if isinstance(part, torch.nn.ModuleList) else [part]:
                    module.compile()
        # Noise comes from the CPU, so that all see the same.
        g = torch.Generator().manual_seed(3)
        latents = torch.randn(2, frames, 4, side, side, generator=g)
        actions = torch.randint(3, (2, frames), generator=g)
        noisy = torch.randn(2, 2, frames - 1, *latents.shape[2:], generator=g)
        times = 1000 * torch.rand(2, 2, frames - 1, generator=g)
        out = model(*(x.to(device) for x in (latents, noisy, times, actions)))
        loss = out.square().mean()
        loss.backward()
        losses.append(float(loss))
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            assert (a - b).norm() <= 1e-2 * a.norm() + 1e-6


@pytest.mark.parametrize("solver", ["euler", "consistency"])
@pytest.mark.parametrize("guidance", ["none", "context"])
def test_graph_equals_eager_equals_cpu(guidance, solver):
    frames = {}
    g = torch.Generator().manual_seed(4)
    context, noise = torch.randn(2, 2, 6, 4, 4, 4, generator=g)
    for name, device, compiled in (
        ("cpu", CPU, False),
        ("eager", GPU, False),
        ("graph", GPU, True),
    ):
        settings = RolloutOptions(
            4, solver, guidance=guidance, guidance_noise=0.0, compile=compiled
        )
        rollout = Rollout(make(SCD).to(device), settings, 12)
        rollout.reset(context, torch.zeros(2, 6, dtype=torch.long), generator=torch.Generator())
        made = [rollout.step(torch.tensor([1, 2]), noise[:, i]) for i in range(4)]
        frames[name] = torch.stack(made).cpu()
    assert (frames["eager"] - frames["cpu"]).abs().max() < 1e-3
    assert (frames["graph"] - frames["eager"]).abs().max() < 1e-3


def test_a_step_of_distribution_matching_equals_the_cpus(monkeypatch):
    """Rollout, replay, scores and both backward passes, in fp32."""
    for draw in (seeding.normal_per_sample, seeding.uniform_per_sample):

        def on_cpu(shape, samples, device, *key, draw=draw):
            return draw(shape, samples, CPU, *key).to(device)

        monkeypatch.setattr(dmd, draw.__name__, on_cpu)
    batch = {"latents": torch.randn(2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    batch["actions"] = torch.randint(3, (2, 8), generator=torch.Generator().manual_seed(2))
    distill = DistillOptions("dmd", context_frames=4, critic_updates=1, adversarial_weight=0.1)
    rollout = RolloutOptions(
        steps=2, solver="consistency", spacing="even", guidance="none", guidance_scale=1.0
    )
    options = Options(seed=3, distill=distill, rollout=rollout)
    losses, gradients = [], []
    for device in (CPU, GPU):
        teacher, critic = (make(BidirectionalDiT) for _ in range(2))
        for parameter in critic.parameters():  # another than the teacher, or nothing would pull
            torch.nn.init.normal_(parameter, std=0.05)
        critic = Critic(critic, adversarial=True)
        objective = dmd.DMDObjective(make(SCD), teacher.requires_grad_(False), critic, options)
        objective = objective.to(device)
        on_device = {key: value.to(device) for key, value in batch.items()}
        values = objective({**on_device, "sample": [0, 1], "step": 1})
        values["loss"].backward()
        losses.append({name: float(value.detach()) for name, value in values.items()})
        named = objective.named_parameters()
        gradients.append({name: p.grad.cpu() for name, p in named if p.grad is not None})
    print(f"\ndistribution matching, CPU and GPU: {losses}")
    assert losses[0]["dmd_gradient"] > 0
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() < 1e-2 * gradient.norm() + 1e-6, name


def small(root: Path, out: Path, *more: str) -> list[str]:
    return [
        f"data.root={root}",
        f"output_root={out}",
        *("data.source=video", "data.frames=4", "train.steps=6", "train.save_every=3"),
        *("train.batch_size=2", "train.workers=0", "train.log_every=1", "train.sample_every=6"),
        *("eval.context_frames=4", "eval.new_frames=12", "eval.videos=2"),
        *more,
    ]


def launch(launcher: list[str], overrides: list[str], options: Path = OPTIONS) -> None:
    command = [sys.executable, "-m", *launcher, "--module", "scd.cli", "train", "--opt"]
    done = subprocess.run(
        [*command, str(options), *overrides],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


ONE = ["torch.distributed.run", "--standalone", "--nproc_per_node=1"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compile_", ["false", "true"])
def test_a_run_resumes_where_it_was(doom_root, tmp_path, precision, compile_):
    """With the fused optimizer and Muon; weights within rounding of an uninterrupted run."""
    more = [f"train.mixed_precision={precision}", f"train.compile={compile_}"]
    more += ["optim.schedule=constant"]
    launch(ONE, small(doom_root, tmp_path, "name=whole", *more))
    launch(ONE, small(doom_root, tmp_path, "name=parts", *more, "train.steps=3"))
    launch(ONE, small(doom_root, tmp_path, "name=parts", *more))
    states = [
        load_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints"))
        for name in ("whole", "parts")
    ]
    assert [state.step for state in states] == [6, 6]
    log = read_log(tmp_path / "whole/log.jsonl")
    print(log[0], [entry["seconds"] for entry in log if "seconds" in entry])
    start = load_checkpoint(tmp_path / "whole/checkpoints/step-00000003").model
    for name, tensor in states[0].model.items():
        moved = (tensor - start[name]).norm()
        assert (tensor - states[1].model[name]).norm() <= 0.05 * moved + 1e-7, name


def test_the_stages_of_an_autoencoder(doom_root, tmp_path):
    """From scratch, then on a world model's predictions against a discriminator; both validate."""
    steps = ["train.steps=4", "train.save_every=2", "train.sample_every=4", "train.workers=0"]
    if not weights_path("lpips").is_file():  # as where nothing can be fetched
        steps += ["autoencoder.lpips_weight=0"]
    given = [f"data.root={doom_root}", f"output_root={tmp_path}", "eval.videos=2", *steps]
    first = ["name=first", "train.batch_size=2", "data.frame_stride=9"]
    launch(ONE, [*given, *first], ROOT / "options/dcae_doom.yml")
    decoder = [
        *("name=decoder", "data.frames=6", "train.batch_size=2", "optim.warmup_steps=0"),
        *("optim.schedule=constant", "optim.decay_steps=0", "discriminator.weight=0.5"),
    ]
    launch(ONE, [*given, *decoder], ROOT / "options/dcae_doom_decoder.yml")
    for name in ("first", "decoder"):
        log = read_log(tmp_path / name / "log.jsonl")
        print(name, log[-1])
        assert (tmp_path / name / "exported/config.json").is_file()


@pytest.mark.parametrize("method", ["consistency", "distilled"])
def test_a_run_of_post_training(doom_root, tmp_path, method):
    """The shipped model, taught by itself; of distribution matching, the first step is the
    critic's alone.
    """
    base = ROOT / "assets/pretrained/scd_doom"
    given = small(doom_root, tmp_path, "name=run", f"init_from={base}", f"distill.teacher={base}")
    given += ["data.frames=8", "distill.context_frames=4", "train.compile=false"]
    given += [f"distill.weak_teacher={base}", "distill.guidance_scale=1.5"]
    launch(ONE, [*given, "train.steps=3"], ROOT / f"options/scd_doom_{method}.yml")
    losses = [e["loss"] for e in read_log(tmp_path / "run/log.jsonl") if "loss" in e]
    print(method, losses)
    assert len(losses) == 3


@pytest.mark.parametrize("gpus", sorted({1, torch.cuda.device_count() or 1}))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_trains_as_data_parallel(doom_root, tmp_path, gpus, precision):
    options = (f"train.mixed_precision={precision}", "optim.muon_lr=null")
    for name in ("ddp", "fsdp2"):
        config = ["--config_file", str(ROOT / f"scripts/accelerate/{name}.yaml")]
        launcher = ["accelerate.commands.launch", *config, "--num_processes", str(gpus)]
        launcher += ["--main_process_port", str(free_port())]  # other workers have runs too
        launch(launcher, small(doom_root, tmp_path, f"name={name}", *options))
    ddp, fsdp = (
        [e["loss"] for e in read_log(tmp_path / name / "log.jsonl") if "loss" in e]
        for name in ("ddp", "fsdp2")
    )
    print(gpus, precision, ddp, fsdp)
    assert fsdp == pytest.approx(ddp, rel=1e-4 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_an_evaluation(doom_root, tmp_path, precision):
    evaluate_checkpoint(
        ROOT / "assets/pretrained/scd_doom",
        None,
        [
            f"data.root={doom_root}",
            f"output_root={tmp_path}",
            f"rollout.precision={precision}",
            f"eval.fvd_precision={'bf16' if precision == 'bf16' else 'fp32'}",
            *("eval.context_frames=8", "eval.new_frames=16", "eval.videos=2"),
        ],
    )
    metrics = json.loads((tmp_path / "scd_doom/metrics.json").read_text())
    assert metrics["protocol"]["rollout_precision"] == precision
    found = metrics["rows"]
    print(precision, found["model"])
    assert found["model"]["psnr"] > found["repeat last context frame"]["psnr"]


def test_bf16_is_at_hand():
    print(torch.cuda.get_device_name(), "bf16:", has_bf16(GPU))
    major, _ = torch.cuda.get_device_capability()
    assert has_bf16(GPU) == (major >= 8)


def test_the_benchmark(tmp_path):
    benchmark(tmp_path, "SCD-M, context 36", plots=False)
    print((tmp_path / "benchmark.md").read_text())
