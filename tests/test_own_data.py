"""Bringing your own data: the commands of scd/data/README.md, and real clips, end to end."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from scd.cli import main
from scd.data.lists import ClipEntry, write_list

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "scd/data/README.md"
REAL_CLIPS = ROOT.parent / "shared/real_clips"
SCRIPTS = {"encode.sh": "encode", "train.sh": "train", "inference.sh": "evaluate"}
SMALL_MODEL = [
    "model.heads=1",
    "model.encoder_layers=1",
    "model.decoder_layers=1",
    "train.steps=1",
    "train.batch_size=1",
    "train.workers=0",
]
SMALL_EVALUATION = ["rollout.steps=1", "eval.videos=1", "eval.saved_videos=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None):
    """Run in another folder, without metric weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "no weights"))
    (tmp_path / "assets").symlink_to(ROOT / "assets")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def run(command: str) -> None:
    """One command of the page, small: few and short episodes, one step of a tiny model."""
    command = re.sub(r"(--train-episodes) \d+", r"\1 3", command)
    command = re.sub(r"(--val-episodes) \d+", r"\1 1", command)
    command = re.sub(r"(--frames) \d+", r"\1 24", command)
    command = re.sub(r"(--clips) \d+", r"\1 1", command)
    program, *arguments = shlex.split(command.replace("step-00000040", "step-00000001"))
    if program == "rm":
        subprocess.run(["bash", "-c", command], check=True)
        return
    if program.startswith("./scripts/"):
        action = SCRIPTS[program.removeprefix("./scripts/")]
        assert (ROOT / program).is_file()
        arguments = [action, *([] if action == "evaluate" else ["--opt"]), *arguments]
    else:
        assert program == "scd"
    small = {
        "train": SMALL_MODEL,
        "evaluate": SMALL_EVALUATION,
        "play": ["--measure", "2", "rollout.steps=1"],
    }.get(arguments[0], [])
    assert main([*arguments, *small]) == 0, command


def test_the_commands_of_the_page_work(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (options,) = blocks("yaml")
    (tmp_path / "options").mkdir()
    (tmp_path / "options/mine.yml").write_text(options)
    for name in ("scd_doom_keys_tiny", "scd_doom_tiny"):  # and its base
        shutil.copy(ROOT / f"options/{name}.yml", tmp_path / "options")
    commands = [
        line
        for block in blocks("bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    assert {command.split()[0] for command in commands} >= {"scd", "rm", "./scripts/encode.sh"}
    for command in commands:
        run(command)
    for name in ("mine", "plain"):
        report = json.loads((tmp_path / f"experiments/{name}/metrics.json").read_text())
        assert np.isfinite(report["rows"]["model"]["psnr"])
        assert (tmp_path / f"experiments/{name}/samples/00000.mp4").exists()
    told = capsys.readouterr().out.splitlines()
    (played,) = (json.loads(line) for line in told if line.startswith('{"results"'))
    assert [result["worlds"] for result in played["results"]] == [["model"]]  # no Doom beside it


def test_every_option_that_the_page_names_is_one() -> None:
    from scd.options import known_keys

    known = set(known_keys())
    named = set(re.findall(r"`((?:data|model|train|eval|autoencoder)\.\w+)", PAGE.read_text()))
    assert len(named) >= 5 and named <= known


# --- Clips that nobody here made


@pytest.fixture(scope="module")
def real_clips() -> Path:
    if not REAL_CLIPS.is_dir():
        pytest.skip(f"{REAL_CLIPS} is absent: no clips of other people to test with")
    return REAL_CLIPS


OPTIONS = """\
name: real
task: world_model
data: {root: data, frames: 4}
model: {patch_size: 16, encoder_layers: 1, decoder_layers: 1}
rollout: {guidance: none}
train: {steps: 1, batch_size: 2, mixed_precision: fp32}
eval: {context_frames: 2, new_frames: 8, videos: 2}
"""


def train_and_measure(tmp_path: Path, *overrides: str) -> dict:
    (tmp_path / "real.yml").write_text(OPTIONS)
    assert main(["validate", "--opt", "real.yml", *overrides]) == 0
    assert main(["train", "--opt", "real.yml", *SMALL_MODEL, *overrides]) == 0
    checkpoint = "experiments/real/checkpoints/step-00000001/ema.safetensors"
    assert main(["evaluate", checkpoint, *SMALL_EVALUATION]) == 0
    return json.loads((tmp_path / "experiments/real/metrics.json").read_text())["rows"]


def test_a_clip_of_dmlab_trains_and_is_measured(
    real_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a.npz", "b.npz"):
        shutil.copy(real_clips / "dmlab.npz", tmp_path / "data" / name)
    assert main(["make-lists", "data", "--val-fraction", "0.5"]) == 0
    rows = train_and_measure(
        tmp_path,
        "model.condition=action",
        "model.num_conditions=3",
        "eval.swapped_actions=[0, 1]",
        "data.action_names=[left, right, forward]",
    )
    assert np.isfinite(rows["model"]["psnr"]) and "left and right swapped" in rows
    out = capsys.readouterr().out
    assert "300 / 300 / 300" in out and "64x64: 1" in out
    assert "1 clips are in the training list as well" in out


def test_a_clip_of_ucf101_trains_and_is_measured(
    real_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "data/CliffDiving").mkdir(parents=True)
    clip = "CliffDiving/v_CliffDiving_g01_c01.mp4"
    shutil.copy(real_clips / "ucf101_cliff_diving.mp4", tmp_path / "data" / clip)
    for name in ("train.json", "val.json"):
        write_list(tmp_path / "data" / name, [ClipEntry(clip, label=22)])
    by_label = ["model.condition=label", "model.num_conditions=101"]
    rows = train_and_measure(tmp_path, *by_label, "data.resize_shorter=64", "data.mirror=true")
    assert np.isfinite(rows["model"]["psnr"])
    assert "240x320: 1" in capsys.readouterr().out
    assert main(["validate", "--opt", "real.yml", *by_label]) == 1
    assert "but data.frame_size is 64; data.resize_shorter scales" in capsys.readouterr().out
    assert main(["train", "--opt", "real.yml", "name=refused", *SMALL_MODEL, *by_label]) == 1
    assert "frames of 240x320 pixels, but data.frame_size is 64" in capsys.readouterr().err
