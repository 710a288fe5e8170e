"""A checkpoint as a folder for others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scd.cli import main
from scd.models.autoencoder import load_codec
from scd.models.load import build_world_model, load_checkpoint_for_use
from scd.models.weights import read_weights
from scd.models.world_model import WorldModel
from scd.options import Options, load_options, options_to_dict
from scd.pipeline import SCDPipeline
from scd.utils.files import sha256


def save_model(options: Options, checkpoint: Path) -> WorldModel:
    torch.manual_seed(0)
    model = build_world_model(options, load_codec(options.autoencoder.path))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.parent.mkdir(parents=True)
    metadata = {"options": json.dumps(options_to_dict(options)), "step": "20"}
    save_file(model.state_dict(), checkpoint, metadata)
    return model


@pytest.fixture
def experiment(tmp_path, doom_root, tiny_autoencoder_path):
    """Write a checkpoint of step 20, its log, and two evaluations, one of them of other weights."""
    shutil.copytree(tiny_autoencoder_path, tmp_path / "models" / "autoencoder")
    options = load_options(
        "options/scd_doom_tiny.yml",
        [f"data.root={doom_root}", f"autoencoder.path={tmp_path}/models/autoencoder",
         "model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1", "train.steps=30"],
    )  # fmt: skip
    folder = tmp_path / "experiments" / "scd_doom_tiny"
    checkpoint = folder / "checkpoints" / "step-00000020" / "ema.safetensors"
    model = save_model(options, checkpoint)
    entries = [(10, 3600.0), (20, 1800.0), (30, 9999.0)]
    log = [json.dumps({"step": step, "loss": 1.0, "seconds": s / 10}) for step, s in entries]
    (folder / "log.jsonl").write_text("\n".join(log) + '\n{"step": 40, "lo')  # cut off by a kill
    for name, digest in (("one", sha256(checkpoint)), ("two", "0" * 64)):
        evaluation = folder / "evaluation" / name
        evaluation.mkdir(parents=True)
        protocol = {"videos": 3, "data": "val.json", "context_frames": 36, "new_frames": 64}
        protocol |= {"rollout_steps": 4, "rollout_window": 47}
        metrics = {"checkpoint": {"sha256": digest}, "protocol": protocol}
        (evaluation / "metrics.json").write_text(json.dumps(metrics))
        (evaluation / "metrics.md").write_text(f"| table of {name} |\n")
    return model.eval(), checkpoint


def test_the_pipeline_has_the_weights_of_the_checkpoint(experiment, tmp_path, capsys):
    model, checkpoint = experiment
    out = tmp_path / "elsewhere" / "doom"
    assert main(["export", str(checkpoint), "--out", str(out), "rollout.steps=3"]) == 0
    pipeline = SCDPipeline.from_pretrained(out)
    for (name, ours), theirs in zip(
        model.state_dict().items(), pipeline.transformer.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert not any(path.is_symlink() for path in out.rglob("*"))
    used = load_checkpoint_for_use(out).options.autoencoder.path
    assert used == str(out / "vae")  # no longer the one it was trained with
    assert load_options(out / "options.yml").rollout.steps == 3
    video = torch.rand(1, 2, 3, 64, 64)
    frames = pipeline(video, num_frames=1, num_inference_steps=1, guidance_scale=1.0).frames
    assert frames.shape == (1, 3, 3, 64, 64)
    main(["export", str(checkpoint), "--out", str(out)])  # again: it replaces the old one
    assert load_options(out / "options.yml").rollout.steps == 4


def test_half_precision_beside_its_autoencoder(experiment, tmp_path):
    model, checkpoint = experiment
    out = tmp_path / "models" / "doom"
    assert main(["export", str(checkpoint), "--out", str(out), "--dtype", "bfloat16"]) == 0
    weights = out / "vae" / "diffusion_pytorch_model.safetensors"
    assert weights.is_symlink()
    assert weights.resolve() == tmp_path / "models" / "autoencoder" / weights.name
    pipeline = SCDPipeline.from_pretrained(out, torch_dtype=torch.float32)
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16().float()), name
    assert pipeline.vae is not None
    # Also where the options name the autoencoder by a link of another name.
    linked, out = tmp_path / "linked", tmp_path / "models" / "second"
    linked.symlink_to(tmp_path / "models" / "autoencoder")
    found = ["--out", str(out), f"autoencoder.path={linked}"]
    assert main(["export", str(checkpoint), *found]) == 0
    linked.unlink()
    assert (out / "vae" / weights.name).resolve() == weights.resolve()


def test_the_card_says_what_it_is(experiment, tmp_path):
    _, checkpoint = experiment
    out = tmp_path / "doom"
    main(["export", str(checkpoint), "--out", str(out)])
    card = (out / "README.md").read_text()
    assert "step 20 of 30, batch size 4, 1.5 hours" in card
    assert "SCD: 1 encoder and 1 decoder layers, 64 wide" in card
    assert "an action per frame: 0 none, 1 turn left, 2 turn right, 3 forward" in card
    assert "3 videos of val.json, 64 new frames after 36 context frames, 4 denoising" in card
    assert "a window of 47 frames:" in card
    assert "table of one" in card and "table of two" not in card
    assert sha256(checkpoint) in card


def test_the_card_of_a_second_export_says_where_the_first_comes_from(experiment, tmp_path):
    _, checkpoint = experiment
    first, second, changed = (tmp_path / name for name in ("first", "second", "changed"))
    assert main(["export", str(checkpoint), "--out", str(first)]) == 0
    card = (first / "README.md").read_text().replace("1.5 hours", "1.5 hours on a moon")
    card = card.replace("64x64 pixels", "64x64 pixels of a crater")
    (first / "README.md").write_text(card)
    assert main(["export", str(first), "--out", str(second)]) == 0
    assert main(["export", str(first), "--out", str(changed), "rollout.steps=2"]) == 0
    for folder in (second, changed):
        found = (folder / "README.md").read_text()
        assert "1.5 hours on a moon" in found and "64x64 pixels of a crater" in found
        assert f"SHA-256 {sha256(checkpoint)}" in found
        assert f"# {folder.name}\n" in found
    assert "table of one" in (second / "README.md").read_text()
    found = (changed / "README.md").read_text()
    assert "table of one" not in found and "has not been evaluated yet" in found


def evaluate(folder, experiment):
    """Leave what an evaluation of an exported folder leaves, without its samples."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    name = experiment / "evaluation" / f"{folder.name}-1f2e3d4c"
    name.mkdir(parents=True)
    protocol = {"videos": 5, "data": "val.json", "context_frames": 8, "new_frames": 16}
    metrics = {"checkpoint": {"sha256": sha256(weights)}}
    metrics["protocol"] = protocol | {"rollout_steps": 1, "rollout_window": 0}
    (name / "metrics.json").write_text(json.dumps(metrics))
    (name / "metrics.md").write_text("| table of the folder |\n")


def test_a_second_export_keeps_the_evaluations_of_the_first(experiment, tmp_path):
    """They lie in the exported folder where that is the folder of its own experiment too."""
    _, checkpoint = experiment
    out = tmp_path / "mine"
    export = ["export", str(checkpoint), "--out", str(out), "name=mine", f"output_root={tmp_path}"]
    assert main(export) == 0
    assert "table of the folder" not in (out / "README.md").read_text()
    evaluate(out, out)
    (out / "samples").mkdir()
    (out / "samples" / "grid.png").write_text("a grid")
    (out / "metrics.md").symlink_to("evaluation/mine-1f2e3d4c/metrics.md")
    (out / "vae" / "old.json").write_text("of an earlier export")
    assert main(export) == 0
    assert (out / "samples" / "grid.png").read_text() == "a grid"
    assert (out / "metrics.md").is_symlink()
    assert (out / "metrics.md").read_text() == "| table of the folder |\n"
    assert not (out / "vae" / "old.json").exists()
    card = (out / "README.md").read_text()
    assert "5 videos of val.json, 16 new frames after 8" in card and "table of the folder" in card


def test_a_model_of_pixels_leaves_nothing_of_an_earlier_autoencoder(experiment, tmp_path):
    _, checkpoint = experiment
    out = tmp_path / "mine"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    options = load_checkpoint_for_use(checkpoint).options
    options.autoencoder.path, options.data.source = None, "video"
    of_pixels = tmp_path / "pixels" / "checkpoints" / "step-00000020" / "ema.safetensors"
    save_model(options, of_pixels)
    assert main(["export", str(of_pixels), "--out", str(out)]) == 0
    assert not (out / "vae").exists()
    assert "none: the model works on pixels" in (out / "README.md").read_text()


def test_the_hash_of_a_model_in_several_files_is_of_them_all(experiment, tmp_path):
    model, checkpoint = experiment
    out = tmp_path / "mine"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    shutil.rmtree(out / "transformer")
    model.save_pretrained(out / "transformer", max_shard_size="200KB")
    files = sorted((out / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    hashes = [load_checkpoint_for_use(out).source["sha256"] for _ in range(2)]
    for file in (files[0], files[-1]):
        save_file({name: 2 * t for name, t in load_file(file).items()}, file, {"format": "pt"})
        hashes.append(load_checkpoint_for_use(out).source["sha256"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_an_export_that_fails_leaves_the_earlier_one_whole(experiment, tmp_path, monkeypatch):
    _, checkpoint = experiment
    out = tmp_path / "mine"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    evaluate(out, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scd.export.os.link", full)
    monkeypatch.setattr("scd.export.shutil.copy2", full)
    assert main(["export", str(checkpoint), "--out", str(out)]) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".mine.*"))


def test_the_card_of_an_exported_folder_has_its_own_evaluation(experiment, tmp_path):
    _, checkpoint = experiment
    first, second = tmp_path / "first", tmp_path / "second"
    named = ["name=mine", f"output_root={tmp_path}/runs"]
    assert main(["export", str(checkpoint), "--out", str(first), *named]) == 0
    evaluate(first, tmp_path / "runs" / "mine")
    assert main(["export", str(first), "--out", str(second), "name=other"]) == 0
    assert "table of the folder" in (second / "README.md").read_text()


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_weights_that_are_not_finite_are_refused(experiment, tmp_path, capsys, value):
    _, checkpoint = experiment
    tensors, metadata = read_weights(checkpoint)
    name = next(iter(tensors))
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[0] = value
    save_file(tensors, checkpoint, metadata)
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "model")]) == 1
    assert f"{name} is not finite" in capsys.readouterr().err


def test_a_model_is_not_exported_over_itself(experiment, tmp_path, capsys):
    _, checkpoint = experiment
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "model")]) == 0
    before = (tmp_path / "model/README.md").read_text()
    (tmp_path / "same").symlink_to(tmp_path / "model")
    for out in ("model", "same"):
        assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / out)]) == 1
        assert "is the model to export itself" in capsys.readouterr().err
    assert (tmp_path / "model/README.md").read_text() == before


def test_a_folder_of_something_else_stays(experiment, tmp_path, capsys):
    _, checkpoint = experiment
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "mine")]) == 1
    assert "holds no pipeline" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
