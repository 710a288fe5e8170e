"""Training on several processes (gloo): the same weights as one process, sharded or not."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from scd.distill.dmd import draw_start
from scd.options import load_options
from scd.training import watchdog
from scd.training.checkpoint import TrainingState, latest_checkpoint, load_checkpoint
from scd.training.launch import run_experiment
from scd.training.run_log import read_log
from scd.training.watchdog import DONE, SILENT_BEATS, _Watchdog
from scd.training.world_model_task import MATRICES
from tests.faults.runs import run_processes, start_processes
from tests.test_dmd import weakened
from tests.train_on_processes import main

ROOT = Path(__file__).parent.parent
OPTIONS = ROOT / "options/scd_doom_tiny.yml"
SCRIPT = ROOT / "tests/train_on_processes.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Adam divides by small second moments: rounding of sums in another order grows to a share of a
# step. Of a step (lr 1e-4), after four steps; measured: 0.02.
TOLERANCE = 0.1 * 1e-4
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def overrides(doom_root, tmp_path):
    return [
        f"data.root={doom_root}",
        f"output_root={tmp_path}",
        *("data.source=video", "autoencoder.path=null", "data.frames=4", "model.patch_size=16"),
        *("model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"),
        *("train.steps=4", "train.save_every=2", "train.workers=0", "train.mixed_precision=fp32"),
        *(
            "train.log_every=1",
            "optim.lr=1e-4",
            "optim.muon_lr=1e-3",
            "optim.warmup_steps=0",
            "optim.schedule=constant",
        ),
        *("eval.context_frames=2", "eval.new_frames=2", "eval.videos=2"),
    ]


def on_two(kind: str, overrides: list[str], options: Path = OPTIONS) -> None:
    on_several(2, kind, overrides, options)


def on_several(count: int, kind: str, overrides: list[str], options: Path = OPTIONS) -> None:
    run_processes(count, main, [kind, str(options), *overrides])


def under_torchrun(overrides: list[str]) -> None:
    """As `on_two`, plain, by the launcher that people use, which imports everything each time."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *command, str(SCRIPT), "plain", str(OPTIONS), *overrides],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def state_of(folder: Path) -> TrainingState:
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return load_checkpoint(newest)


def assert_close(one: TrainingState, other: TrainingState) -> None:
    assert one.step == other.step == 4
    muon_lr = one.run["options"]["optim"]["muon_lr"]
    assert bool(one.averages) == bool(one.run["options"]["train"]["snapshot_every"])
    for key in ("model", "ema", "averages"):
        a, b = getattr(one, key), getattr(other, key)
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert tensor.shape == b[name].shape
            difference = tensor - b[name]
            if muon_lr and name.endswith(tuple(MATRICES)):
                # Four orthogonal updates; they are found in bf16, and where a gradient is small
                # its rounding counts as much as where it is large. Measured: 0.05.
                moved = 4 * muon_lr * min(tensor.shape) ** 0.5
                assert difference.norm() < 0.1 * moved, (key, name)
            else:
                assert difference.abs().max() < TOLERANCE, (key, name)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("torchrun", []),
        ("sharded", ["train.snapshot_every=2"]),
        ("plain", ["optim.muon_lr=null", "train.val_loss_every=2"]),
        slow("sharded", ["optim.muon_lr=null", "train.sample_every=4", "train.val_loss_every=2"]),
        slow("sharded", ["model.encoder_frame=noise", "train.val_loss_every=2"]),
        ("sharded", ["optim.muon_lr=null", "flow.self_forcing_prob=0.5"]),
        slow("plain", ["optim.muon_lr=null", "flow.self_forcing_prob=0.5"]),
    ],
)
def test_two_processes_equal_one_with_twice_the_batch(kind, options, overrides, tmp_path):
    """Validation and export run there too; half way, two processes hand over to one."""
    overrides = [*overrides, *options]
    two = [*overrides, "name=two", "train.batch_size=1"]
    under_torchrun(two) if kind == "torchrun" else on_two(kind, two)
    run_experiment(load_options(OPTIONS, [*overrides, "name=one", "train.batch_size=2"]))
    whole = state_of(tmp_path / "one")
    assert_close(state_of(tmp_path / "two"), whole)
    assert (tmp_path / "two/exported/model_index.json").is_file()
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    # Each process has one of the two held-out clips; the weights differ by rounding.
    held_out = [[entry for entry in log if "val_loss" in entry] for log in logs]
    assert len(held_out[0]) == len(held_out[1]) == (2 if "train.val_loss_every=2" in options else 0)
    for one, two in zip(*held_out, strict=True):
        assert two == pytest.approx(one, rel=1e-6)
    # The last half anew, on one process, from what two of them left.
    shutil.rmtree(tmp_path / "two/checkpoints/step-00000004")
    run_experiment(load_options(OPTIONS, [*overrides, "name=two", "train.batch_size=2"]))
    assert_close(state_of(tmp_path / "two"), whole)


@pytest.mark.slow
def test_hybrid_sharding_equals_one_with_four_times_the_batch(overrides, tmp_path):
    """Two copies of the weights, each spread over two processes; one process goes on with it."""
    on_several(4, "hybrid", [*overrides, "name=four", "train.batch_size=1"])
    run_experiment(load_options(OPTIONS, [*overrides, "name=one", "train.batch_size=4"]))
    whole = state_of(tmp_path / "one")
    assert_close(state_of(tmp_path / "four"), whole)
    shutil.rmtree(tmp_path / "four/checkpoints/step-00000004")
    run_experiment(load_options(OPTIONS, [*overrides, "name=four", "train.batch_size=4"]))
    assert_close(state_of(tmp_path / "four"), whole)


def test_sharded_resumes_from_one_process(overrides, tmp_path):
    run_experiment(load_options(OPTIONS, [*overrides, "name=one", "train.batch_size=2"]))
    whole = state_of(tmp_path / "one")
    shutil.rmtree(tmp_path / "one/checkpoints/step-00000004")
    on_two("sharded", [*overrides, "name=one", "train.batch_size=1"])
    assert_close(state_of(tmp_path / "one"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_with_an_autoencoder_trains_as_data_parallel(
    precision, overrides, tiny_autoencoder_path, tmp_path
):
    """On videos, with validations and an export; killed between, it arrives at the same weights."""
    overrides = [
        *overrides,
        f"autoencoder.path={tiny_autoencoder_path}",
        f"train.mixed_precision={precision}",
        *("model.patch_size=2", "train.batch_size=1", "train.sample_every=2"),
        *("optim.muon_lr=null", "train.keep_checkpoints=9"),
    ]
    for kind in ("plain", "sharded"):
        on_two(kind, [*overrides, f"name={kind}"])
        assert (tmp_path / kind / "exported/model_index.json").is_file()
        assert (tmp_path / kind / "samples/step-00000004/grid.png").is_file()
    logs = [read_log(tmp_path / kind / "log.jsonl") for kind in ("plain", "sharded")]
    losses, norms = (
        [[entry[key] for entry in log if key in entry] for log in logs]
        for key in ("loss", "grad_norm")
    )
    # Under DDP, autocast rounds weights to bf16 op by op; sharded, they arrive rounded.
    tolerance = 1e-6 if precision == "fp32" else 2e-4
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert norms[1] == pytest.approx(norms[0], rel=30 * tolerance)
    whole = state_of(tmp_path / "sharded")
    # As a kill after the checkpoint of step 2 leaves it, before the validation that was due.
    shutil.rmtree(tmp_path / "sharded/checkpoints/step-00000004")
    log = tmp_path / "sharded/log.jsonl"
    lines = [line for line in log.read_text().splitlines() if "validation" not in line]
    log.write_text("\n".join(lines) + "\n")
    on_two("sharded", [*overrides, "name=sharded"])
    again = state_of(tmp_path / "sharded")
    assert again.step == whole.step == 4
    assert all(torch.equal(again.model[name], tensor) for name, tensor in whole.model.items())
    validations = [entry["step"] for entry in read_log(log) if "validation" in entry]
    assert validations == [2, 4]


def test_a_dry_run_has_one_folder_for_all_processes(overrides, tmp_path):
    """It evaluates as well, and leaves nothing."""
    on_two("dry", [*overrides, "name=dry", "data.frames=3", "eval.context_frames=3"])
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize("kind", [slow("plain"), "sharded"])
@pytest.mark.parametrize("method", [slow("consistency"), "distilled", slow("long")])
def test_distillation_on_two_processes_equals_one(method, kind, overrides, tmp_path):
    """With teacher, target or critic beside the student; all processes leave at the same step.

    Long tuning: in the second step, that of the student, windows begin at the third frame.
    """
    overrides = [*overrides, "data.frames=6", "optim.muon_lr=null", "train.keep_checkpoints=9"]
    base = load_options(OPTIONS, [*overrides, "name=base", "train.steps=1"])
    teacher = load_options(
        ROOT / "options/bidirectional_dit_doom.yml",
        [
            *overrides,
            "name=teacher",
            "init_from=null",
            "model.encoder_layers=0",
            "train.steps=1",
            "model.decoder_layers=0",
            "model.layers=1",
            "flow.prefix_frames=[2,4]",
            "train.compile=false",
            "train.batch_size=2",
        ],
    )
    matching = method != "consistency"
    for options in (base, teacher) if matching else (base,):
        run_experiment(options)
    weights = [tmp_path / name / "checkpoints/step-00000001" for name in ("base", "teacher")]
    scored_by = weights[1] if matching else weights[0]
    weak = weakened(scored_by / "ema.safetensors", tmp_path / "weak.safetensors")
    overrides += [
        *(f"init_from={weights[0]}/ema.safetensors", "train.compile=false"),
        *(f"distill.teacher={scored_by}/ema.safetensors", "distill.context_frames=2"),
        *(f"distill.weak_teacher={weak}", "distill.guidance_scale=1.5"),
        "distill.critic_updates=2",
        f"distill.adversarial_weight={0.1 if method == 'distilled' else 0}",
        f"flow.self_forcing_prob={0 if matching else 0.5}",
    ]
    file = ROOT / f"options/scd_doom_{method}.yml"
    if method == "long":
        overrides += ["distill.window_frames=4", "seed=2"]
        assert draw_start(load_options(file, overrides), 2) == 2
    on_two(kind, [*overrides, "name=two", "train.batch_size=1"], file)
    run_experiment(load_options(file, [*overrides, "name=one", "train.batch_size=2"]))
    two, one = (state_of(tmp_path / name) for name in ("two", "one"))
    assert_close(two, one)
    first = load_checkpoint(weights[0])
    assert any(not torch.equal(t, first.ema[name]) for name, t in one.model.items())
    if matching:
        assert one.critic is not None and two.critic is not None
        before = load_checkpoint(weights[1])
        for name, tensor in one.critic["model"].items():
            difference = (tensor - two.critic["model"][name]).abs().max()
            assert difference < TOLERANCE, name
        moved = one.critic["model"].items()
        assert any(
            not torch.equal(t, before.ema.get(n.removeprefix("score."), t)) for n, t in moved
        )


@pytest.mark.slow
def test_sharded_students_are_rolled_out_in_the_precision_of_their_training(overrides, tmp_path):
    overrides = [*overrides, "data.frames=6", "optim.muon_lr=null"]
    run_experiment(load_options(OPTIONS, [*overrides, "name=base", "train.steps=1"]))
    base, file = tmp_path / "base/exported", ROOT / "options/scd_doom_distilled.yml"
    overrides += [
        *(f"init_from={base}", f"distill.teacher={base}", "distill.context_frames=2"),
        *("train.compile=false", "train.batch_size=1", "rollout.precision=bf16"),
    ]
    on_two("sharded", [*overrides, "name=alike", "train.mixed_precision=bf16"], file)
    with pytest.raises(AssertionError, match="sharded ones cannot be converted"):
        on_two("sharded", [*overrides, "name=unlike", "train.mixed_precision=fp32"], file)


def test_a_decoder_s_stage_on_two_processes_equals_one(overrides, tiny_autoencoder_path, tmp_path):
    """On what a world model predicts, against a discriminator whose weight both agree on."""
    overrides = [
        *overrides,
        *(f"autoencoder.path={tiny_autoencoder_path}", "optim.muon_lr=null"),
    ]
    world = [*overrides, "name=world", "model.patch_size=2", "train.steps=1", "train.batch_size=2"]
    run_experiment(load_options(OPTIONS, world))
    overrides += [
        f"autoencoder.world_model={tmp_path}/world/exported",
        *("autoencoder.predicted_frames=1", "autoencoder.lpips_weight=0", "optim.decay_steps=0"),
        *("discriminator.weight=0.5", "discriminator.channels=8", "discriminator.frames=2"),
    ]
    file = ROOT / "options/dcae_doom_decoder.yml"
    on_two("plain", [*overrides, "name=two", "train.batch_size=1"], file)
    run_experiment(load_options(file, [*overrides, "name=one", "train.batch_size=2"]))
    two, one = (state_of(tmp_path / name) for name in ("two", "one"))
    assert_close(two, one)
    assert one.critic is not None and two.critic is not None
    for name, tensor in one.critic["model"].items():
        assert (tensor - two.critic["model"][name]).abs().max() < TOLERANCE, name


def test_a_lost_process_ends_the_run_and_is_named(overrides, tmp_path):
    """One that neither answers nor dies; the other waits for it in a collective operation."""
    overrides = [*overrides, "name=lost", "train.batch_size=1"]
    # Without a launcher, which would wait half a minute for the one that stands still.
    first, second = start_processes(tmp_path, 2, main, ["lost", str(OPTIONS), *overrides])
    first.join(200)
    for process in (first, second):
        process.kill()
    said = (tmp_path / "output-0.txt").read_text()
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    assert first.exitcode == 1
    assert len(told) == 1 and "process 1 (" in told[0] and "is lost" in told[0], said[-3000:]
    heartbeat = json.loads((tmp_path / "lost/heartbeat.json").read_text())
    assert heartbeat["state"] == "lost" and heartbeat["message"] in told[0]


class Store:
    """torch's store of keys and values, in memory; a call of `set` may fail."""

    def __init__(self, *place, **settings):
        self.values, self.calls, self.fails = {}, 0, lambda call: False

    def set(self, key, value):
        self.calls += 1
        if self.fails(self.calls):
            raise RuntimeError("Broken pipe")
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Make the watchdog of the first process, and a list of what it ends the run for."""
    monkeypatch.setattr(watchdog, "TCPStore", Store)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")

    def make(processes):
        dog, ended = _Watchdog(0, processes, tmp_path), []
        monkeypatch.setattr(dog, "_end", ended.append)
        return dog, ended

    return make


@pytest.mark.parametrize(("sign", "is_lost"), [(DONE, False), ("7 host, process id 1", True)])
def test_a_process_that_left_in_order_is_not_lost(watch, sign, is_lost):
    dog, ended = watch(2)
    dog.store.set(dog.keys[1], sign)
    for beat in range(SILENT_BEATS + 1):
        dog._beat(str(beat))
        dog._check()
    assert bool(ended) == is_lost
    assert not is_lost or "process 1 (host, process id 1) is lost" in ended[0]


@pytest.mark.parametrize(("every", "unreachable"), [(2, False), (1, True)])
def test_a_launcher_that_answers_now_and_then_is_there(watch, every, unreachable):
    """It is not after as many failures in a row as a process may be silent for."""
    dog, ended = watch(1)
    dog.store.fails = lambda call: call % every == 0
    beats = iter([False] * (2 * SILENT_BEATS + 2) + [True])
    dog.leave.wait = lambda seconds: next(beats)
    dog.run()
    assert ["cannot be reached" in message for message in ended] == [True] * unreachable
