"""The whole post-training by its commands, in miniature: every stage starts from the one before."""

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from scd.cli import main
from scd.models.load import load_checkpoint_for_use
from scd.options import load_options
from scd.training.run_log import read_log

ROOT = Path(__file__).parent.parent
TRAINING = """
echo "$@" >>trainings
mkdir -p "experiments/$(basename "$1" .yml)/exported" experiments/scd_doom/checkpoints/step-00000125
touch experiments/scd_doom/checkpoints/step-00000125/ema.safetensors
"""


@pytest.fixture
def train(doom_root: Path, tmp_path: Path, fresh_accelerate: None, one_thread: None):
    small = [
        *(f"data.root={doom_root}", f"output_root={tmp_path}", "train.mixed_precision=fp32"),
        *("data.source=video", "autoencoder.path=null", "model.patch_size=16", "model.heads=1"),
        *("train.batch_size=2", "train.log_every=1", "train.workers=0", "train.compile=false"),
        *("eval.context_frames=4", "eval.new_frames=4", "eval.videos=2", "data.frames=8"),
        *("eval.comparisons=[]", "optim.warmup_steps=0", "distill.context_frames=4"),
    ]

    def run(file: str | Path, name: str, steps: int, *overrides: str) -> Path:
        """Train, and return the exported folder."""
        given = [*small, f"name={name}", f"train.steps={steps}", *overrides]
        assert main(["train", "--opt", str(file), *given]) == 0
        losses = [e["loss"] for e in read_log(tmp_path / name / "log.jsonl") if "loss" in e]
        assert len(losses) == steps and torch.tensor(losses).isfinite().all()
        return tmp_path / name / "exported"

    return run


def test_every_stage_runs_by_its_command(train, tmp_path: Path) -> None:
    weights = "transformer/diffusion_pytorch_model.safetensors"
    bidirectional = ("init_from=null", "model.layers=3", "flow.prefix_frames=[2,6]")
    teacher = train("options/bidirectional_dit_doom.yml", "teacher", 6, *bidirectional)
    early = train("options/bidirectional_dit_doom.yml", "early", 2, *bidirectional)
    split = tmp_path / "student"
    layers = ["--encoder-layers", "2", "--decoder-layers", "2", "--decoder-from", "first-and-last"]
    assert main(["split", str(teacher), *layers, "--out", str(split)]) == 0
    student = train(split / "options.yml", "student", 4, f"init_from={split}/model.safetensors")
    sizes = ["model.encoder_layers=2", "model.decoder_layers=2"]
    weak = train("options/scd_doom_weak.yml", "weak", 2, *sizes)
    start = f"init_from={student}/{weights}"
    resampled = train("options/scd_doom_resampled.yml", "resampled", 4, *sizes, start)
    guidance = [f"distill.weak_teacher={weak}", "distill.guidance_scale=1.5"]
    consistent = train(
        *("options/scd_doom_consistency.yml", "consistency", 4, *sizes, "distill.levels=6"),
        *(f"init_from={resampled}/{weights}", f"distill.teacher={resampled}", *guidance),
    )
    guidance[0] = f"distill.weak_teacher={early}"  # of the teacher's kind
    distilled = train(
        *("options/scd_doom_distilled.yml", "distilled", 4, *sizes, "distill.critic_updates=2"),
        *(f"init_from={consistent}/{weights}", f"distill.teacher={teacher}", *guidance),
    )
    tuned = train(
        *("options/scd_doom_long.yml", "long", 4, *sizes, "data.frames=16"),
        *("distill.window_frames=8", f"init_from={distilled}/{weights}"),
        *(f"distill.teacher={teacher}", *guidance),
    )
    # Each stage has moved the weights of the one before.
    stages = (student, resampled, consistent, distilled, tuned)
    kept = [load_checkpoint_for_use(folder) for folder in stages]
    name = "encoder.blocks.0.mlp.up.weight"
    tensors = [loaded.model.state_dict()[name] for loaded in kept]
    assert not any(torch.equal(before, after) for before, after in pairwise(tensors))
    assert kept[3].options.rollout.solver == "consistency" and kept[3].options.rollout.steps == 2

    folders = [str(teacher), str(student), str(distilled)]
    for folder in folders:
        assert main(["evaluate", folder]) == 0
    for steps in ("1", "2"):  # a few-step student works with either
        assert main(["evaluate", str(distilled), f"rollout.steps={steps}"]) == 0
    out = tmp_path / "table"
    assert main(["compare", *folders, "--out", str(out)]) == 0
    entries = json.loads((out / "compare.json").read_text())["models"]
    assert [entry["name"] for entry in entries] == ["teacher", "student", "distilled"]
    card = tmp_path / "teacher_card"
    assert main(["export", str(teacher), "--out", str(card)]) == 0
    text = (card / "README.md").read_text()
    assert "frame by frame" not in text and "distill.teacher=teacher_card" in text
    card = tmp_path / "card"
    assert main(["export", str(distilled), "--out", str(card)]) == 0
    text = (card / "README.md").read_text()
    assert f"distilled (dmd) from {teacher}, guided away from {early}" in text


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_script_asks_for_trainings_that_exist(gpus: int, tmp_path: Path) -> None:
    """Each starts from what an earlier one leaves, and a second call repeats none."""
    (tmp_path / "scripts").mkdir()
    for name in ("posttrain.sh", "common.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    (tmp_path / "scripts/train.sh").write_text(TRAINING)
    (tmp_path / "scripts/inference.sh").write_text('echo "$1" >>evaluations')
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n[ $1 = -m ] || echo {gpus}\n")
    python.chmod(0o755)
    command = ["bash", str(tmp_path / "scripts/posttrain.sh")]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
    trainings = [line.split() for line in (tmp_path / "trainings").read_text().splitlines()]
    made = []
    for file, *overrides in trainings:
        options = load_options(ROOT / file, overrides)
        teachers = (options.distill.teacher, options.distill.weak_teacher)
        for needed in filter(None, (options.init_from, *teachers)):
            assert needed.startswith("assets/") or Path(needed).parts[1] in made, needed
        made.append(options.name)
        assert file == f"options/{options.name}.yml"
        assert (options.train.batch_size > 4) == bool(gpus)
    assert len(made) == len(set(made)) == 5
    first = "experiments/scd_doom/exported" if gpus else "assets/pretrained/scd_doom"
    assert (tmp_path / "evaluations").read_text().splitlines()[0] == first
    if gpus:
        shutil.rmtree(tmp_path / "experiments/scd_doom/checkpoints")
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 1 and "is of another training" in refused.stderr
