"""Training: exact resume, data order, accumulation, EMA, checkpoints, what a run leaves behind."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from scd.errors import ScdError
from scd.models.autoencoder import LatentCodec, load_codec
from scd.models.load import load_checkpoint_for_use
from scd.options import Options, load_options
from scd.pipeline import SCDPipeline
from scd.training import checkpoint, launch, watchdog
from scd.training.checkpoint import latest_checkpoint, load_checkpoint
from scd.training.encode import encode_dataset
from scd.training.faults import is_bad_step
from scd.training.launch import deterministic_on_cpu, make_accelerator
from scd.training.optimizer import lr_multiplier
from scd.training.run_log import read_log
from scd.training.trainer import Trainer
from scd.utils import precision
from scd.utils.environment import git_commit
from scd.utils.files import read_json, sha256, write_json
from tests.conftest import forget_the_launch

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")


def make_options(doom_root: Path, output_root: Path, *overrides: str) -> Options:
    small = [
        f"data.root={doom_root}",
        "data.source=video",
        "data.frames=4",
        "autoencoder.path=null",
        "model.patch_size=16",
        "model.heads=1",
        "model.encoder_layers=1",
        "model.decoder_layers=1",
        "train.steps=6",
        "train.batch_size=2",
        "train.save_every=2",
        "train.log_every=1",
        "train.workers=0",
        "train.mixed_precision=fp32",
        "eval.context_frames=4",
        "eval.new_frames=4",  # with 4 given, too few for FVD
        "eval.videos=2",
        f"output_root={output_root}",
    ]
    return load_options(ROOT / "options/scd_doom_tiny.yml", [*small, *overrides])


@pytest.fixture
def options(doom_root, tmp_path):
    return partial(make_options, doom_root, tmp_path)


@pytest.fixture(scope="module")
def trained_once(doom_root, tmp_path_factory):
    """The folder of a finished run of six steps, for `finished` to copy."""
    o = make_options(doom_root, tmp_path_factory.mktemp("finished"), "name=finished")
    train(o)
    forget_the_launch()
    return o.output


@pytest.fixture
def finished(trained_once, tmp_path):
    """The checkpoints of a finished run named `finished`, to damage."""
    return shutil.copytree(trained_once, tmp_path / "finished") / "checkpoints"


def train(options: Options, stop_after: int | None = None) -> Path:
    """Train; with `stop_after`, as a process that dies right after that step."""
    accelerator = make_accelerator(options)
    trainer = Trainer(options, launch.build_task(options, accelerator), accelerator)
    if stop_after is not None:
        plain = trainer._train_step

        def step_or_die(*arguments):
            if trainer.step == stop_after:
                raise KeyboardInterrupt
            return plain(*arguments)

        trainer._train_step = step_or_die
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    else:
        trainer.run()
    return options.output / "checkpoints"


def assert_same_state(one: Path, other: Path, tolerance: float = 0.0) -> None:
    a, b = load_checkpoint(latest_checkpoint(one)), load_checkpoint(latest_checkpoint(other))
    assert a.step == b.step

    def moments(optimizer: dict) -> dict:
        return {f"{i}.{k}": v for i, s in optimizer["state"].items() for k, v in s.items()}

    pairs = [(a.model, b.model), (a.ema, b.ema), (a.averages, b.averages)]
    pairs.append((moments(a.optimizer), moments(b.optimizer)))
    assert (a.critic is None) == (b.critic is None)
    if a.critic is not None and b.critic is not None:
        pairs.append((a.critic["model"], b.critic["model"]))
        pairs.append((moments(a.critic["optimizer"]), moments(b.critic["optimizer"])))
    for left, right in pairs:
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert (tensor - right[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("threads", "extra"),
    [
        (2, []),
        (1, ["train.gradient_accumulation=2", "train.batch_size=1"]),
        (1, ["optim.muon_lr=null"]),
        (1, ["optim.schedule=wsd", "optim.warmup_steps=1", "optim.decay_steps=3"]),
    ],
)
def test_resumed_equals_uninterrupted_to_the_bit(options, threads, extra):
    """Killed after step 5, it goes on from the checkpoint of step 4 — across an epoch's end."""
    torch.set_num_threads(threads)
    straight = train(options("name=straight", *extra))
    train(options("name=resumed", *extra), stop_after=5)
    assert latest_checkpoint(straight.parent.parent / "resumed/checkpoints").name == "step-00000004"
    resumed = train(options("name=resumed", *extra))
    assert_same_state(straight, resumed)
    logs = [read_log(folder.parent / "log.jsonl") for folder in (straight, resumed)]
    assert [entry.get("precision") for entry in logs[0]] == ["fp32", *[None] * 6]
    losses = [[entry.get("loss") for entry in log] for log in logs]
    assert losses[0] == losses[1]


def test_what_a_number_of_steps_means_is_said(options, capsys, fresh_accelerate):
    """Fewer than a run has, or than its warm-up takes."""
    train(options("name=short"))
    fewer = options("name=short", "train.steps=3", "optim.warmup_steps=4")
    capsys.readouterr()
    AcceleratorState._reset_state()
    launch.run_experiment(fewer)
    told = capsys.readouterr()
    assert "it has more steps than train.steps=3: nothing is trained" in told.out
    assert "optim.warmup_steps=4 with train.steps=3: the learning rate never" in told.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about processors")
def test_resumed_on_another_kind_of_machine(options, monkeypatch, capsys, fresh_accelerate):
    """Begun where bf16 is fast, it goes on where it is not, says so, and is the same run."""
    o = options("name=moved", "train.mixed_precision=auto")
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    train(o, stop_after=4)
    assert "moved: training in bf16 on CPU" in capsys.readouterr().out
    AcceleratorState._reset_state()
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    folder = train(o)
    said = capsys.readouterr().out
    assert "resuming moved from step 4" in said
    assert "it was trained in bf16 so far, and is in fp32 from here on" in said
    assert load_checkpoint(latest_checkpoint(folder)).run["precision"] == "fp32"
    written = json.loads((o.output / "environment.json").read_text())
    assert written["precision"] == written["best_precision"] == "fp32"
    used = [entry for entry in read_log(o.output / "log.jsonl") if "precision" in entry]
    assert [(entry["step"], entry["precision"]) for entry in used] == [(0, "bf16"), (4, "fp32")]
    # On the same machine nothing more is said.
    AcceleratorState._reset_state()
    train(options("name=moved", "train.mixed_precision=auto", "train.steps=8"))
    assert "so far" not in capsys.readouterr().out


def test_checkpoints_with_former_names_of_options_go_on(options, capsys):
    """The run is the same one, and a value that differs is still named, by its present name."""
    o = options("name=former", "flow.self_forcing_prob=0.5")
    folder = train(o, stop_after=4)
    manifest = latest_checkpoint(folder) / "manifest.json"
    written = json.loads(manifest.read_text())
    saved = written["run"]["options"]
    saved["adversary"] = saved.pop("discriminator")
    saved["flow"]["own_history"] = saved["flow"].pop("self_forcing_prob")
    manifest.write_text(json.dumps(written))
    changed = options("name=former", "flow.self_forcing_prob=0.25", "discriminator.channels=8")
    with pytest.raises(ScdError) as caught:
        train(changed)
    for change in ("flow.self_forcing_prob was 0.5, is 0.25", "discriminator.channels was 64, is"):
        assert change in str(caught.value)
    # A run from before histories were resampled made them in another way.
    before = {key: value for key, value in saved["flow"].items() if key != "self_forcing_sigma"}
    manifest.write_text(
        json.dumps(written | {"run": written["run"] | {"options": saved | {"flow": before}}})
    )
    with pytest.raises(
        ScdError, match=r"histories of flow\.self_forcing_prob were made in another"
    ):
        train(o)
    manifest.write_text(json.dumps(written))
    train(o)
    assert "resuming former from step 4" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about processors")
def test_checkpoints_from_before_auto_go_on(options, monkeypatch, capsys, fresh_accelerate):
    """Their options name a precision, and their manifests none."""
    o = options("name=old", "train.mixed_precision=fp32")
    folder = train(o, stop_after=4)
    manifest = latest_checkpoint(folder) / "manifest.json"
    written = json.loads(manifest.read_text())
    del written["run"]["precision"]
    written["run"]["options"]["train"]["mixed_precision"] = "no"  # as fp32 was called then
    manifest.write_text(json.dumps(written))
    AcceleratorState._reset_state()
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    train(options("name=old", "train.mixed_precision=auto"))
    assert "it was trained in fp32 so far, and is in bf16 from here on" in capsys.readouterr().out


def test_worker_counts_do_not_matter(options):
    assert_same_state(
        train(options("name=none", "train.steps=3")),
        train(options("name=two", "train.steps=3", "train.workers=2")),
    )


def test_accumulation_equals_a_larger_batch(options):
    """Two batches of 1 against one of 2: the same samples; sums in another order (1e-6)."""
    common = ["train.steps=3", "optim.lr=1e-4"]
    one = train(options("name=batch", *common))
    two = train(
        options("name=accumulated", "train.batch_size=1", "train.gradient_accumulation=2", *common)
    )
    a, b = load_checkpoint(latest_checkpoint(one)), load_checkpoint(latest_checkpoint(two))
    for key, tensor in a.model.items():
        # Adam divides by tiny second moments early on, so compare to the size of a step.
        assert (tensor - b.model[key]).abs().max() < 0.05 * 3 * 1e-4, key
    logs = [read_log(folder.parent / "log.jsonl") for folder in (one, two)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["scd", pytest.param("causal_dit", marks=pytest.mark.slow)])
def test_attention_is_compiled_and_trains_as_without(options, monkeypatch, kind):
    """Compiling a list of blocks, whose forward nothing calls, would do nothing; losses to 1e-6."""
    compiled = []
    plain = nn.Module.compile

    def backend(graph, _):
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda module: plain(module, backend=backend))
    depth = ["model.layers=2"] if kind == "causal_dit" else []
    if kind == "causal_dit":
        depth += ["model.encoder_layers=0", "model.decoder_layers=0"]
    losses = []
    for compile in ("false", "true"):
        steps = [f"model.type={kind}", *depth, "train.steps=3", f"train.compile={compile}"]
        log = train(options(*steps, f"name={compile}")).parent / "log.jsonl"
        losses.append([entry["loss"] for entry in read_log(log) if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert any("softmax" in target for target in compiled)


@pytest.mark.slow
def test_compiled_gradients_are_the_same_every_time():
    """Of such gradients in no fixed order, three of four differ from the first (two threads)."""

    @torch.compile
    def loss(table, indices, x):
        return (torch.nn.functional.embedding(indices, table) * x).sum()

    torch.set_num_threads(2)
    table = torch.randn(5, 256, requires_grad=True)
    indices, x = torch.randint(5, (64, 96)), torch.randn(64, 96, 256)
    with deterministic_on_cpu(torch.device("cpu")):
        first, *others = [torch.autograd.grad(loss(table, indices, x), table)[0] for _ in range(30)]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.are_deterministic_algorithms_enabled()


def test_ema_written_out(options):
    """shadow ← shadow + (1 − d)(weights − shadow), d = min(ema_decay, (1 + n)/(10 + n))."""
    o = options("name=ema", "train.save_every=1", "train.keep_checkpoints=9", "train.steps=4")
    torch.manual_seed(o.seed)
    folder = train(o)
    accelerator = make_accelerator(o)
    start = launch.build_task(o, accelerator).network.state_dict()
    shadow = {name: tensor.clone() for name, tensor in start.items()}
    for step in range(1, 5):
        weights = load_file(folder / f"step-{step:08d}/model.safetensors")
        n = step - 1
        decay = min(o.optim.ema_decay, (1 + n) / (10 + n)) if n > 0 else 0.0
        for name in shadow:
            shadow[name] += (1 - decay) * (weights[name] - shadow[name])
        saved = load_file(folder / f"step-{step:08d}/ema.safetensors")
        for name in shadow:
            assert torch.allclose(saved[name], shadow[name], atol=1e-6), (step, name)


def test_what_a_run_leaves(options):
    o = options("name=whole", "train.sample_every=6", "train.trackers=[tensorboard]")
    folder = train(o).parent
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]
    for name in ("options.yml", "environment.json", "loss.png", "log.jsonl", "exported"):
        assert (folder / name).exists(), name
    assert load_options(folder / "options.yml") == o
    samples = folder / "samples/step-00000006"
    assert {p.name for p in samples.iterdir()} == {"grid.png", "00000.mp4", "00001.mp4"}
    assert list((folder / "trackers").rglob("events.out.tfevents*"))
    versions = json.loads((folder / "environment.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0]
    # One file is enough to use the model, and the exported pipeline holds the same weights.
    ema = folder / "checkpoints/step-00000006/ema.safetensors"
    loaded = load_checkpoint_for_use(ema)
    assert loaded.options == o
    assert loaded.source["step"] == 6
    pipeline = SCDPipeline.from_pretrained(folder / "exported")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, pipeline.transformer.state_dict()[name])


def test_what_is_exported_can_be_used(finished, tmp_path):
    """Wherever a checkpoint can, and wherever it is moved to."""
    moved = tmp_path / "moved"
    (finished.parent / "exported").rename(moved)
    loaded = load_checkpoint_for_use(moved)
    assert loaded.options.name == "finished" and loaded.options.autoencoder.path is None


def test_wandb_offline(options, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(options("name=tracked", "train.steps=2", "train.trackers=[wandb]"))
    assert list(tmp_path.rglob("offline-run-*"))
    pytest.importorskip("wandb").teardown()  # it would write the runs of later tests here


def test_damaged_checkpoint_is_passed_over(finished, capsys):
    weights = finished / "step-00000006/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert latest_checkpoint(finished).name == "step-00000004"
    assert "step-00000006: skipped, model.safetensors is damaged" in capsys.readouterr().out


def test_failed_save_leaves_the_old_checkpoints(finished, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    state = load_checkpoint(latest_checkpoint(finished))
    state.step = 8
    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(ScdError, match=r"step-00000008.*No space left"):
        checkpoint.save_checkpoint(finished, state, 1)
    assert [p.name for p in sorted(finished.iterdir())] == ["step-00000004", "step-00000006"]


def test_a_full_disk_is_told_as_such():
    """Torch itself tells of an unexpected position."""
    with pytest.raises(OSError, match="No space left"):
        checkpoint._write(Path("/dev/full"), {"a": torch.zeros(100_000)}, {})


def test_a_checkpoint_is_readable_for_those_who_may_read_its_manifest(finished):
    files = [file for path in finished.iterdir() for file in path.iterdir()]
    assert len({file.stat().st_mode for file in files}) == 1 and len(files) > 4


def test_pruning_never_takes_the_newest(finished):
    """Later folders that were passed over as damaged do not count against the one just written."""
    (finished / "step-00000006/manifest.json").unlink()
    state = load_checkpoint(finished / "step-00000004")
    state.step = 5
    path = checkpoint.save_checkpoint(finished, state, 1)
    assert latest_checkpoint(finished) == path and path.name == "step-00000005"


def test_another_experiment_is_not_continued(options, finished):
    """Everything that would change the data order, the noise or the objective is named."""
    changed = ["seed=1", "data.frames=5", "model.decoder_layers=2", "flow.logit_mean=0.5"]
    changed += ["optim.muon_lr=null"]
    with pytest.raises(ScdError, match="belongs to another run: ") as caught:
        train(options("name=finished", "train.batch_size=3", "train.steps=8", *changed))
    for difference in (
        "seed was 0, is 1",
        "data.frames was 4, is 5",
        "model.decoder_layers was 1, is 2",
        "flow.logit_mean was 1.0, is 0.5",
        "optim.muon_lr was 0.02, is None",
        "were 2, are 3",
    ):
        assert difference in str(caught.value)
    # Longer, with another rate and the same clips a step in other pieces, it goes on.
    split = ["train.batch_size=1", "train.gradient_accumulation=2", "optim.lr=1e-4"]
    folder = train(options("name=finished", "train.steps=7", *split))
    assert latest_checkpoint(folder).name == "step-00000007"


def test_a_run_goes_on_with_the_encoder_it_began_with(options, tiny_autoencoder_path, tmp_path):
    """Its latents are what the weights mean; the decoder is not seen in training."""
    path = shutil.copytree(tiny_autoencoder_path, tmp_path / "vae")
    own = (f"autoencoder.path={path}", "model.patch_size=1", "data.source=video")
    train(options(*own, "train.steps=1"))
    weights = path / "diffusion_pytorch_model.safetensors"
    for part, complaint in (("decoder", None), ("encoder", "the encoder at autoencoder.path")):
        tensors = {
            name: tensor + 0.1 if name.startswith(part) else tensor
            for name, tensor in load_file(weights).items()
        }
        save_file(tensors, weights)
        if complaint is None:
            train(options(*own, "train.steps=2"))
        else:
            with pytest.raises(ScdError, match=complaint):
                train(options(*own, "train.steps=3"))


def test_sharded_weights_are_not_compared(options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ScdError, match="sharded weights differ by design"):
        make_accelerator(options("train.check_weights_every=1"))


def test_a_validation_that_cannot_be_is_refused_at_the_start(options, doom_root):
    with pytest.raises(
        ScdError, match=r"40 frames, but validation .* needs 41; train.sample_every"
    ):
        train(options("train.sample_every=9", "eval.context_frames=37"))


def test_a_run_goes_on_with_the_clips_it_began_with(options, finished, doom_root, tmp_path, capsys):
    """They may be moved; other ones would stand under the same sample numbers."""
    root = shutil.copytree(doom_root, tmp_path / "moved")
    more = ["name=finished", f"data.root={root}", "train.steps=7"]
    entries = read_json(root / "train.json")
    write_json(root / "train.json", entries[:-1])
    with pytest.raises(ScdError, match=r"clips of data\.train_list were 3 clips \(.*, are 2 clips"):
        train(options(*more))
    write_json(root / "train.json", entries)
    train(options(*more))
    assert "with 3 clips of train.json" in capsys.readouterr().out


def test_not_a_number_is_not_applied(options):
    o = options("name=nan")
    accelerator = make_accelerator(o)
    task = launch.build_task(o, accelerator)
    trainer = Trainer(o, task, accelerator)
    before = {k: v.clone() for k, v in task.network.state_dict().items()}
    forward = task.objective.forward
    task.objective.forward = lambda batch: {"loss": forward(batch)["loss"] * float("nan")}
    with pytest.raises(ScdError, match=r"step 3: 3 steps in a row .* no weights were changed"):
        trainer.run()
    for name, tensor in task.network.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("loss", "norms", "limit", "bad"),
    [
        (1.0, [1.0, 100.0], 10.0, False),  # the critic's may be large
        (1.0, [100.0, 1.0], 10.0, True),
        (1.0, [100.0, 100.0], None, False),
        (float("inf"), [1.0, 1.0], None, True),
        (1.0, [1.0, float("nan")], 10.0, True),
    ],
)
def test_what_a_bad_step_is(loss, norms, limit, bad):
    assert bool(is_bad_step(torch.tensor(loss), torch.tensor(norms).unbind(), limit)) == bad


def test_latents_of_another_autoencoder_are_refused(
    options, doom_root, tiny_autoencoder_path, tmp_path
):
    own = shutil.copytree(doom_root, tmp_path / "doom")
    autoencoder = ["model.patch_size=2", f"autoencoder.path={tiny_autoencoder_path}"]
    o = options("name=latents", f"data.root={own}", *autoencoder)
    encode_dataset(o)
    o.data.source = "latents"
    train(o)
    weights = Path(tiny_autoencoder_path) / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    try:
        with pytest.raises(ScdError, match="made by another autoencoder"):
            train(o)
    finally:
        data[-1] ^= 1
        weights.write_bytes(data)


def test_autoencoder_trains_and_loads(doom_root, tmp_path):
    o = load_options(
        ROOT / "options/dcae_doom.yml",
        [
            f"data.root={doom_root}",
            f"output_root={tmp_path}",
            "data.frame_stride=9",
            "autoencoder.encoder_channels=[8,8,8,8]",
            "autoencoder.decoder_channels=[8,8,8,8]",
            "autoencoder.lpips_weight=0",
            "train.steps=3",
            "train.batch_size=2",
            "train.workers=0",
            "train.sample_every=3",
            "eval.videos=2",
        ],
    )
    train(o)
    log = [json.loads(line) for line in (o.output / "log.jsonl").read_text().splitlines()]
    assert set(log[-1]["validation"]) >= {"psnr", "ssim"}
    assert (o.output / "samples/step-00000003/reconstructions.png").exists()
    codec = load_codec(str(o.output / "exported"))
    assert isinstance(codec, LatentCodec)
    latents = codec.encode(torch.rand(1, 2, 3, 64, 64))
    assert latents.shape == (1, 2, 8, 8, 8)
    assert codec.autoencoder.config.scaling_factor != 1.0


# What a checkpoint promises


def test_manifest_names_every_file(options):
    folder = train(options("name=manifest", "train.steps=2")) / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    assert manifest["files"].keys() == files.keys()
    for name, path in files.items():
        assert manifest["files"][name] == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert (manifest["format"], manifest["step"]) == (2, 2)
    assert manifest["run"]["options"]["train"]["steps"] == 2
    assert manifest["git_commit"] == git_commit()


def test_a_save_that_reads_back_differently_does_not_count(finished, monkeypatch):
    state = load_checkpoint(latest_checkpoint(finished))
    state.step = 8
    plain = checkpoint._write

    def flip_a_bit(path, content, metadata):
        plain(path, content, metadata)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "_write", flip_a_bit)
    with pytest.raises(ScdError, match=r"step-00000008.*model.safetensors reads back differently"):
        checkpoint.save_checkpoint(finished, state, 1)
    assert [p.name for p in sorted(finished.iterdir())] == ["step-00000004", "step-00000006"]


def test_what_killed_saves_left_is_cleared_and_the_damaged_set_aside(options, capsys):
    o = options("name=mess", "train.keep_checkpoints=1", "train.save_every=3")
    whole = options("name=tidy", "train.keep_checkpoints=1", "train.save_every=3")
    train(whole)
    folder = train(o, stop_after=4)
    for name in (".step-00000006.1", f".step-00000006.{os.getpid()}"):
        (folder / name).mkdir()
    shutil.copytree(folder / "step-00000003", folder / "step-00000006")
    (folder / "step-00000006/ema.safetensors").write_bytes(b"")
    train(o)
    assert "step-00000006: skipped, its manifest is that of step 3" in (capsys.readouterr().out)
    assert {p.name for p in folder.iterdir()} == {"step-00000006", "passed-over-step-00000006"}
    assert_same_state(whole.output / "checkpoints", folder)


def test_what_cannot_be_deleted_does_not_end_the_run(options, monkeypatch, capsys):
    """NFS keeps files that another process has open."""
    plain = shutil.rmtree

    def busy(path, ignore_errors=False):
        if Path(path).name.startswith(".step-") and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        plain(path, ignore_errors=ignore_errors)

    given = ("name=open", "train.keep_checkpoints=1", "train.save_every=1")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        folder = train(options(*given, "train.steps=2"))
        train(options(*given, "train.steps=3"))
    assert "cannot be deleted yet" in capsys.readouterr().err
    assert latest_checkpoint(folder).name == "step-00000003"
    assert len(list(folder.glob(".step-*"))) == 2
    train(options(*given, "train.steps=4"))
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


def test_without_a_whole_checkpoint_nothing_starts_over(options, finished):
    for path in finished.glob("*/manifest.json"):
        path.write_text("{")
    with pytest.raises(ScdError, match=r"finished/checkpoints: none of the 2 checkpoints is whole"):
        train(options("name=finished"))


# What resuming promises


def test_global_generators_have_no_say(options, monkeypatch):
    """Noise and order are functions of (seed, step, sample): no generator needs to be saved."""
    folders = []
    for name, seed in (("one", 1), ("other", 2)):
        plain = Trainer._train_step

        def scrambled(self, *arguments, plain=plain, seed=seed):
            for seeded in (torch.manual_seed, np.random.seed, random.seed):
                seeded(1000 * seed + self.step)
            before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
            out = plain(self, *arguments)
            assert torch.equal(before[0], torch.get_rng_state())
            assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
            return out

        monkeypatch.setattr(Trainer, "_train_step", scrambled)
        folders.append(train(options(f"name={name}", "train.steps=3")))
        monkeypatch.setattr(Trainer, "_train_step", plain)
    assert_same_state(*folders)


def test_changed_optimizer_options_count_after_resuming(options):
    train(options("name=betas", "train.steps=2"))
    changed = ["optim.betas=[0.5,0.6]", "optim.weight_decay=0.2", "optim.lr=1e-5"]
    changed += ["optim.muon_lr=1e-4"]
    folder = train(options("name=betas", "train.steps=3", *changed))
    adamw, muon = load_checkpoint(folder / "step-00000003").optimizer["param_groups"]
    assert adamw["betas"] == (0.5, 0.6)
    assert adamw["weight_decay"] == muon["weight_decay"] == 0.2
    assert (adamw["initial_lr"], muon["initial_lr"]) == (1e-5, 1e-4)


def test_a_validation_that_a_kill_prevented_is_made_up_for(options, monkeypatch):
    o = options("name=unmeasured", "train.sample_every=2")
    accelerator = make_accelerator(o)
    task = launch.build_task(o, accelerator)
    done = []

    def validate(network, folder):
        if len(done) == 1:
            done.append("died")
            raise KeyboardInterrupt
        done.append(folder.name)
        return {"psnr": 1.0}

    monkeypatch.setattr(task, "validate", validate)
    with pytest.raises(KeyboardInterrupt):
        Trainer(o, task, accelerator).run()
    Trainer(o, task, accelerator).run()
    assert done == ["step-00000002", "died", "step-00000004", "step-00000006"]
    entries = [json.loads(line) for line in (o.output / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "validation" in e] == [2, 4, 6]
    Trainer(o, task, accelerator).run()
    assert len(done) == 4


# What is seen from outside


def test_log_entries_and_heartbeat(options, monkeypatch):
    beats = []
    monkeypatch.setattr(
        watchdog, "write_json", lambda path, value: (beats.append(value), write_json(path, value))
    )
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.0)
    o = options("name=watched", "train.steps=2")
    launch.run_experiment(o)
    states = [beat["state"] for beat in beats]
    assert states == ["starting", "training", "training", "saving", "exporting", "finished"]
    assert [beat["step"] for beat in beats] == [None, 0, 1, 2, 2, 2]
    assert json.loads((o.output / "heartbeat.json").read_text()) == beats[-1]
    assert beats[-1]["pid"] == os.getpid() and beats[-1]["host"] == socket.gethostname()
    entry = json.loads((o.output / "log.jsonl").read_text().splitlines()[-1])
    assert entry.keys() >= {"step", "loss", "grad_norm", "lr"}
    used = lr_multiplier(entry["step"] - 1, o.optim, o.train.steps)  # by this step, not the next
    assert entry["lr"] == pytest.approx(used * o.optim.lr) and used != lr_multiplier(2, o.optim, 2)
    assert 0 < entry["data_wait"] < 1 and entry["memory_gib"] > 0.1
    assert entry["clips_per_second"] == pytest.approx(2 / entry["seconds"])


def test_a_bad_step_leaves_running_statistics_alone(doom_root, tmp_path):
    """Batch norms take them from the forward pass, before anybody knows that the step is bad."""
    small = ["autoencoder.encoder_channels=[8,8,8,8]", "autoencoder.decoder_channels=[8,8,8,8]"]
    small += ["autoencoder.decoder_norm=batch_norm", "autoencoder.lpips_weight=0", "eval.videos=2"]
    small += ["train.steps=1", "train.batch_size=2", "train.workers=0", "optim.skip_grad_norm=1e-9"]
    o = load_options(
        ROOT / "options/dcae_doom.yml",
        [f"data.root={doom_root}", f"output_root={tmp_path}", "data.frame_stride=9", *small],
    )
    accelerator = make_accelerator(o)
    task = launch.build_task(o, accelerator)
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    trainer = Trainer(o, task, accelerator)
    trainer.run()
    assert trainer.bad_steps.in_a_row == 1
    for name, value in task.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_error_leaves_no_data_workers(options, monkeypatch):
    """They ignore SIGTERM; a traceback that is kept must not keep them."""

    def fail(*_):
        raise RuntimeError("in the middle of a step")

    monkeypatch.setattr(Trainer, "_train_step", fail)
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="middle") as kept:
        train(options("train.workers=2"))
    assert kept.tb is not None
    assert set(multiprocessing.active_children()) == before
