"""Averages whose length is chosen after training: what they are, and that a kill changes none."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from scd.cli import main
from scd.errors import ScdError
from scd.models.load import load_checkpoint_for_use
from scd.options import Options, load_options
from scd.training.checkpoint import latest_checkpoint, load_checkpoint
from scd.training.ema import (
    EMA,
    SNAPSHOTS,
    PostHocEMA,
    fit,
    gamma,
    set_newer_snapshots_aside,
    write_average,
)
from scd.training.launch import build_task, make_accelerator, run_experiment
from scd.training.trainer import Trainer

TINY = Path(__file__).parent.parent / "options/scd_doom_tiny.yml"
STEPS, EVERY = 400, 20
OTHERS = (0.04, 0.07, 0.15)  # of neither of the two that are kept

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


def options(folder: Path, *overrides: str) -> Options:
    small = [f"output_root={folder}", f"train.snapshot_every={EVERY}"]
    return load_options(TINY, [*small, *overrides])


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A network on a random walk: its folder with snapshots, its weights after each step, and
    averages of other lengths that were tracked on the way."""
    folder = tmp_path_factory.mktemp("walk")
    o = options(folder, "name=walk")
    network = nn.Linear(40, 50)
    generator = torch.Generator().manual_seed(0)
    kept = PostHocEMA(network, o, {})
    tracked = PostHocEMA(network, options(folder, f"optim.ema_sigma_rel={list(OTHERS)}"), {})
    walked = []
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        walked.append(network.weight.detach().clone())
        for averages in (kept, tracked):
            averages.update(step)
        if step % EVERY == 0:
            kept.write_snapshot(step)
    return o.output, torch.stack(walked), tracked.state()


def test_ema_is_that_of_diffusers_to_the_bit():
    """Of parameters, frozen ones and running statistics, also resumed from what it saved; a run
    that was begun with diffusers' EMAModel goes on equally."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 8))
    network[2].bias.requires_grad_(False)
    running = {n: nn.Parameter(b) for n, b in network.named_buffers() if "running" in n}
    tensors = {**dict(network.named_parameters()), **running}
    theirs = EMAModel(tensors.values(), decay=0.7)  # reached after 20 steps
    ours = EMA(network, 0.7, None)
    for step in range(1, 41):
        network(torch.randn(4, 16))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape)
        theirs.step(tensors.values())
        ours.update(step)
        state = ours.state()
        assert state.keys() == network.state_dict().keys()
        for (name, tensor), shadow in zip(tensors.items(), theirs.shadow_params, strict=True):
            assert torch.equal(state[name], shadow), (step, name)
            assert step == 1 or name == "2.bias" or not torch.equal(shadow, tensor), (step, name)
        if step == 10:
            ours = EMA(network, 0.7, state)


def test_lengths_are_those_of_the_paper():
    """It has γ = 16.97 and 6.94 for sigma_rel 0.05 and 0.10; and the standard deviation of
    t^γ over [0, 1] is what it is called (1e-3, of a sum over 100,000 points)."""
    assert [gamma(0.05), gamma(0.1)] == pytest.approx([16.97, 6.94], abs=0.005)
    t = np.linspace(0, 1, 100_001)
    for sigma_rel in (0.01, 0.05, 0.2, 0.28):
        p = t ** gamma(sigma_rel)
        mean = np.average(t, weights=p)
        assert np.average((t - mean) ** 2, weights=p) ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


def test_tracked_averages_have_the_profile(walk):
    """Weights of step t count as ∫ t^γ over that step, to rounding (1e-5)."""
    _, walked, tracked = walk
    t = torch.arange(STEPS + 1, dtype=torch.float64)
    for sigma_rel in OTHERS:
        shares = ((t / STEPS) ** (gamma(sigma_rel) + 1)).diff()
        expected = torch.einsum("t,tij->ij", shares, walked.double())
        assert torch.allclose(tracked[f"{sigma_rel}/weight"].double(), expected, atol=1e-5)


@pytest.mark.parametrize(("sigma_rel", "tolerance"), [(0.04, 0.006), (0.07, 0.002), (0.15, 0.002)])
def test_an_average_made_afterwards_is_the_one_that_was_tracked(
    walk, sigma_rel, tolerance, tmp_path, capsys
):
    """Within a share of their distance from the newest weights: measured 0.0030, 0.0009, 0.0007."""
    output, walked, tracked = walk
    out = tmp_path / "ema.safetensors"
    write_average(output, sigma_rel, None, out)
    assert f"sigma_rel {sigma_rel} at step {STEPS}, from 20 snapshots" in capsys.readouterr().out
    made, wanted = load_file(out)["weight"], tracked[f"{sigma_rel}/weight"]
    assert (made - wanted).norm() < tolerance * (wanted - walked[-1]).norm()


def test_what_was_kept_comes_back(walk, tmp_path, capsys):
    """Of a step in the middle, to half precision; what came later has no say."""
    output, *_ = walk
    kept = load_file(output / SNAPSHOTS / "step-00000200.safetensors")["0.05/weight"]
    write_average(output, 0.05, 200, tmp_path / "ema.safetensors")
    assert "at step 200, from 10 snapshots" in capsys.readouterr().out
    made = load_file(tmp_path / "ema.safetensors")["weight"]
    assert torch.allclose(made, kept.float(), atol=1e-3)


def test_the_fit_tells_how_far_it_is_off():
    """Against the profiles themselves, on 100,000 points."""
    profiles = [(step, sigma_rel) for step in range(10, 101, 10) for sigma_rel in (0.05, 0.1)]

    def profile(step, sigma_rel):
        t = (np.arange(100_000) + 0.5) / 1000
        return np.where(t <= step, (t / step) ** gamma(sigma_rel) / step, 0) * (
            gamma(sigma_rel) + 1
        )

    for sigma_rel in (0.03, 0.08, 0.25):
        shares, misfit = fit(profiles, (100, sigma_rel))
        wanted = profile(100, sigma_rel)
        left = sum(s * profile(*p) for s, p in zip(shares, profiles, strict=True)) - wanted
        found = np.linalg.norm(left) / np.linalg.norm(wanted)
        assert found == pytest.approx(misfit, rel=0.1)
        assert shares.sum() == pytest.approx(1)


def test_what_cannot_be_averaged_is_refused_in_a_line(walk, tmp_path):
    output, *_ = walk
    out = tmp_path / "ema.safetensors"
    for arguments, told in (
        ((output, 0.05, None, tmp_path / "ema.pt"), "ends in .safetensors"),
        ((output, 0.0, None, out), "--sigma-rel 0.0: must lie between 0.0001 and 0.28"),
        ((output, 1e-300, None, out), "--sigma-rel 1e-300: must lie between"),
        ((output, 0.29, None, out), "between 0.0001 and 0.28"),
        ((output, 0.05, 30, out), "--step 30: no snapshot of this step; there are 20, 40, 60"),
        ((output, 0.01, None, out), "20 snapshots of sigma_rel 0.05, 0.1 up to step 400 meet it"),
        ((tmp_path, 0.05, None, out), "no snapshots in snapshots/"),
    ):
        with pytest.raises(ScdError, match=r"^[^\n]+$") as caught:
            write_average(*arguments)
        assert told in str(caught.value)
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    (copy / SNAPSHOTS / "step-00000040.safetensors").write_bytes(b"damaged")
    with pytest.raises(ScdError, match=r"step-00000040.*not a readable safetensors file"):
        write_average(copy, 0.05, None, out)
    assert not out.exists()


def test_what_came_after_the_checkpoint_is_set_aside(walk, tmp_path):
    copy = shutil.copytree(walk[0], tmp_path / "copy")
    set_newer_snapshots_aside(copy, 60)
    names = {path.name for path in (copy / SNAPSHOTS).iterdir()}
    whole = {path.name for path in (walk[0] / SNAPSHOTS).iterdir()}
    kept = {f"step-000000{n}.safetensors" for n in (20, 40, 60)}
    assert names == kept | {f"passed-over-{name}" for name in whole - kept}


def test_a_killed_run_keeps_the_same_snapshots_and_averages(doom_root, tmp_path, monkeypatch):
    """To the bit; and what `scd ema` makes of them can be used as any checkpoint."""
    small = [
        *(f"data.root={doom_root}", f"output_root={tmp_path}", "autoencoder.path=null"),
        *("data.source=video", "data.frames=4", "model.patch_size=16", "model.heads=1"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "train.steps=6"),
        *("train.batch_size=2", "train.workers=0", "train.mixed_precision=fp32"),
        *("train.save_every=2", "train.snapshot_every=1"),
    ]
    run_experiment(load_options(TINY, [*small, "name=straight"]))
    o = load_options(TINY, [*small, "name=killed"])
    plain = PostHocEMA.write_snapshot

    def die(self, step):
        plain(self, step)
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PostHocEMA, "write_snapshot", die)
        run_experiment(o)
    assert latest_checkpoint(o.output / "checkpoints").name == "step-00000004"
    half = o.output / SNAPSHOTS / ".step-00000009.4711.safetensors"
    half.write_bytes(b"half")
    run_experiment(o)
    assert not half.exists()
    straight = tmp_path / "straight"
    names = [f"step-0000000{n}.safetensors" for n in range(1, 7)]
    for name in names:
        one, other = (load_file(run / SNAPSHOTS / name) for run in (straight, o.output))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (
        load_checkpoint(latest_checkpoint(run / "checkpoints")).averages
        for run in (straight, o.output)
    )
    assert one and all(torch.equal(one[key], other[key]) for key in one)
    # As any checkpoint; and begun without, a run cannot take them up.
    out = tmp_path / "ema.safetensors"
    command = ["ema", str(o.output), "--sigma-rel", "0.1", "--step", "4", "--out", str(out)]
    assert main(command) == 0
    loaded = load_checkpoint_for_use(out)
    assert (loaded.options, loaded.source["step"]) == (o, 4)
    for name, tensor in loaded.model.state_dict().items():
        kept = load_file(o.output / SNAPSHOTS / names[3])[f"0.1/{name}"].float()
        assert torch.allclose(tensor.cpu(), kept, atol=1e-3), name


def test_a_bad_step_is_left_out_of_the_averages(doom_root, tmp_path):
    """The third of three; after two good ones, the weights are not the averages."""
    small = [
        *(f"data.root={doom_root}", f"output_root={tmp_path}", "autoencoder.path=null"),
        *("data.source=video", "data.frames=4", "model.patch_size=16", "model.heads=1"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "train.snapshot_every=9"),
        *("train.batch_size=2", "train.workers=0", "train.mixed_precision=fp32"),
    ]
    o = load_options(TINY, [*small, "train.steps=3"])
    accelerator = make_accelerator(o)
    task = build_task(o, accelerator)
    trainer = Trainer(o, task, accelerator)
    forward, averages = task.objective.forward, []

    def third_is_bad(batch):
        averages.append({n: t.clone() for n, t in trainer.posthoc_ema.state().items()})
        return {"loss": forward(batch)["loss"] * (float("nan") if batch["step"] == 3 else 1)}

    task.objective.forward = third_is_bad
    trainer.run()
    assert trainer.bad_steps.in_a_row == 1
    left = trainer.posthoc_ema.state()
    assert all(torch.equal(left[name], tensor) for name, tensor in averages[2].items())
    weights = task.network.state_dict()
    assert any(not torch.equal(left[f"0.1/{n}"], tensor) for n, tensor in weights.items())


def test_averages_are_not_begun_half_way(doom_root, tmp_path):
    small = [
        *(f"data.root={doom_root}", f"output_root={tmp_path}", "autoencoder.path=null"),
        *("data.source=video", "data.frames=4", "model.patch_size=16", "model.heads=1"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "train.save_every=1"),
        *("train.batch_size=2", "train.workers=0", "train.mixed_precision=fp32"),
    ]
    run_experiment(load_options(TINY, [*small, "train.steps=1"]))
    with pytest.raises(ScdError, match=r"averages .*were not tracked, are \[0.05, 0.1\]"):
        run_experiment(load_options(TINY, [*small, "train.steps=2", "train.snapshot_every=1"]))
