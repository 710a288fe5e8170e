"""`scd validate`: counts that are right, and every broken clip named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.cli import main
from scd.data.latents import read_latents, write_latents
from scd.data.lists import ClipEntry, read_list, write_list
from scd.data.video import write_video
from scd.options import load_options
from scd.training.encode import encode_dataset
from scd.utils.files import read_json

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "options/scd_doom_tiny.yml")


@pytest.fixture(scope="module")
def encoded_root(
    doom_root: Path, tmp_path_factory: pytest.TempPathFactory, tiny_autoencoder_path: str
) -> Path:
    root = tmp_path_factory.mktemp("encoded") / "doom"
    shutil.copytree(doom_root, root)
    encode_dataset(load_options(TINY, overrides(root, tiny_autoencoder_path)))
    return root


@pytest.fixture
def root(encoded_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(encoded_root, tmp_path / "doom")
    return tmp_path / "doom"


def overrides(root: Path, autoencoder: str) -> list[str]:
    return [
        f"data.root={root}",
        f"autoencoder.path={autoencoder}",
        "train.mixed_precision=fp32",
        "train.batch_size=2",
        "eval.videos=2",
    ]


@pytest.fixture
def validate(
    root: Path, tiny_autoencoder_path: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> Callable[..., tuple[int, str, dict]]:
    """Status, output and JSON report of `scd validate` with some overrides."""

    def run(*more: str) -> tuple[int, str, dict]:
        report = tmp_path / "report.json"
        common = ["--opt", TINY, "--json", str(report), *overrides(root, tiny_autoencoder_path)]
        capsys.readouterr()
        status = main(["validate", *common, *more])
        told = capsys.readouterr()
        assert (status == 1) == ("broken clips: " in told.err)
        return status, told.out, read_json(report)

    return run


def test_a_whole_data_set(root: Path, validate: Callable) -> None:
    status, out, report = validate()
    assert status == 0 and report["warnings"] == [] and "broken:" not in out
    train, val = report["lists"]
    assert (train["clips"], val["clips"], train["broken"]) == (3, 2, [])
    assert train["frames"] == {"total": 120, "min": 40, "median": 40, "max": 40}
    assert train["sizes"] == {"64x64": 3}
    counts = np.zeros(4, int)
    for entry in read_list(root / "train.json"):
        counts += np.bincount(np.load(root / str(entry.action_path))["actions"], minlength=4)
    assert train["actions"] == {str(a): int(n) for a, n in enumerate(counts) if n}
    assert f"turn left {counts[1] / 120:.1%}" in out
    assert list(train["latents"].values()) == [3] and val["latents"] == {}
    assert next(iter(train["latents"])).startswith("8x8x8 by ")


def test_the_content_hash_follows_the_content(root: Path, validate: Callable) -> None:
    def content() -> str:
        return validate("data.source=video")[2]["lists"][0]["content_hash"]

    before, entries = content(), read_list(root / "train.json")
    (root / "elsewhere").mkdir()
    shutil.copy(root / "train/00000.mp4", root / "elsewhere/a.mp4")
    moved = replace(entries[0], video_path="elsewhere/a.mp4", latent_path=None)
    write_list(root / "train.json", [*entries[:0:-1], moved])
    assert content() == before  # neither names, nor order, nor latents
    for other in (replace(entries[0], label=1), replace(entries[0], caption="a cat")):
        write_list(root / "train.json", [other, *entries[1:]])
        assert content() != before
    write_list(root / "train.json", entries)
    path = root / "train/00000.npz"
    actions = np.load(path)["actions"]
    actions[7] = (actions[7] + 1) % 4
    np.savez(path, actions=actions)
    assert content() != before


def truncate(root: Path) -> None:
    path = root / "train/00000.mp4"
    path.write_bytes(path.read_bytes()[:-3000])


def spoil_the_end(root: Path) -> None:
    """What only reading to the end shows."""
    path = root / "val/00001.npz"
    video = np.zeros((40, 64, 64, 3), np.uint8)
    np.savez(path, video=video, actions=np.zeros(40, int))
    data = bytearray(path.read_bytes())
    data[200_000] ^= 1
    path.write_bytes(data)
    entries = read_list(root / "val.json")
    write_list(root / "val.json", [entries[0], ClipEntry("val/00001.npz")])


def short_actions(root: Path) -> None:
    np.savez(root / "train/00000.npz", actions=np.zeros(39, np.int64))


def unknown_actions(root: Path) -> None:
    np.savez(root / "train/00000.npz", actions=np.full(40, 4))


def without_actions(root: Path) -> None:
    entries = read_list(root / "train.json")
    write_list(root / "train.json", [replace(entries[0], action_path=None), *entries[1:]])


def without_latents(root: Path) -> None:
    entries = read_list(root / "train.json")
    write_list(root / "train.json", [replace(entries[0], latent_path=None), *entries[1:]])


def latents(change: Callable[[torch.Tensor], torch.Tensor], made_by: str | None = None) -> Callable:
    def write(root: Path) -> None:
        from safetensors.torch import save_file

        path = root / str(read_list(root / "train.json")[0].latent_path)
        values = change(read_latents(path)).contiguous()
        if made_by is None:
            save_file({"latents": values}, path)
        else:
            write_latents(path, values, made_by)

    return write


def missing_latents(root: Path) -> None:
    (root / str(read_list(root / "train.json")[0].latent_path)).unlink()


def another_size(root: Path) -> None:
    write_video(root / "val/00000.mp4", np.zeros((40, 64, 80, 3), np.uint8), 8)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (truncate, "train/00000.mp4: "),
        (lambda root: (root / "train/00000.mp4").unlink(), "train/00000.mp4: no such video"),
        (lambda root: (root / "val/00000.npz").unlink(), "val/00000.npz: no such file"),
        (spoil_the_end, "val/00001.npz: no npz file with a key 'video'"),
        (short_actions, "train/00000.npz: 39 actions for 40 frames"),
        (unknown_actions, "train/00000.npz: actions 4 to 4"),
        (without_actions, "train.json: entry 0 has no action_path"),
        (without_latents, "train.json: entry 0 has no latent_path"),
        (latents(lambda x: x.clone().fill_(float("nan"))), "latents are not finite"),
        (latents(lambda x: x[:-1]), "39 latents for 40 frames"),
        (latents(lambda x: x[:, :4]), "latents of 4x8x8, but the options make 8x8x8"),
        (latents(lambda x: x, "another"), "made by another, not by the options' autoencoder"),
        (missing_latents, "no such latent file"),
        (
            another_size,
            "val/00000.mp4: frames of 64x80 pixels, but data.frame_size is 64",
        ),
    ],
)
def test_what_is_broken_is_named(
    root: Path, validate: Callable, spoil: Callable[[Path], None], complaint: str
) -> None:
    spoil(root)
    status, out, report = validate()
    assert status == 1
    broken = [line for found in report["lists"] for line in found["broken"]]
    assert len(broken) == 1 and complaint in broken[0], broken
    assert f"broken: {broken[0]}" in out


def test_all_that_is_broken_is_named(root: Path, validate: Callable) -> None:
    truncate(root)
    (root / "train/00002.npz").unlink()
    another_size(root)
    status, out, report = validate()
    assert status == 1 and out.count("broken: ") == 3
    assert [len(found["broken"]) for found in report["lists"]] == [2, 1]
    assert report["lists"][0]["frames"]["total"] == 40
    assert validate("data.resize_shorter=64", "data.source=video")[1].count("broken: ") == 2


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["train.batch_size=4"], "3 clips for batches of 4 (train.batch_size)"),
        (["train.gradient_accumulation=2"], "3 clips for batches of 4"),
        (["data.frames=41"], "3 of 3 clips are shorter than the 41 frames of data.frames"),
        (["eval.new_frames=33"], "2 of 2 clips are shorter than the 41 frames of eval."),
        (["eval.videos=3"], "2 clips for eval.videos=3"),
        (["data.val_list=train.json"], "3 clips are in the training list as well"),
    ],
)
def test_what_is_suspicious_is_reported(
    validate: Callable, overrides: list[str], warning: str
) -> None:
    status, out, report = validate(*overrides)
    assert status == 0
    assert len(report["warnings"]) == 1 and warning in report["warnings"][0]
    assert f"warning: {report['warnings'][0]}" in out


@pytest.mark.parametrize(
    ("frames", "new_frames", "warned"),
    [
        (14, 6, []),
        (15, 6, ["train.json: 3 of 3 clips are shorter than the 43 frames of data.frames:"]),
        (14, 7, ["val.json: 2 of 2 clips are shorter than the 43 frames of eval.context_frames"]),
    ],
)
def test_every_third_frame_ends_a_clip_at_the_last_that_is_used(
    validate: Callable, frames: int, new_frames: int, warned: list[str]
) -> None:
    """Of 40 frames: 14, or 8 of context and 6 new ones."""
    _, _, report = validate(
        *("data.frame_stride=3", f"data.frames={frames}", f"eval.new_frames={new_frames}"),
        *("model.condition=none", "model.num_conditions=0", "eval.swapped_actions=[]"),
    )
    assert len(report["warnings"]) == len(warned)
    assert all(told in found for told, found in zip(warned, report["warnings"], strict=True))


def test_a_training_video_with_other_actions_is_no_new_video(
    root: Path, validate: Callable
) -> None:
    trained, entries = read_list(root / "train.json")[0], read_list(root / "val.json")
    other = replace(entries[0], video_path=trained.video_path)
    write_list(root / "val.json", [other, *entries[1:]])
    _, _, report = validate()
    (warning,) = report["warnings"]
    assert "1 clips are in the training list as well" in warning


def test_actions_behind_the_last_frame_do_not_count(root: Path, validate: Callable) -> None:
    before = validate()[2]["lists"][0]["actions"]
    path = root / "train/00000.npz"
    np.savez(path, actions=np.append(np.load(path)["actions"], [3] * 5))
    report = validate()[2]
    assert report["lists"][0]["actions"] == before and report["lists"][0]["broken"] == []


def test_labels_are_counted_and_checked(root: Path, validate: Callable) -> None:
    for name in ("train", "val"):
        entries = read_list(root / f"{name}.json")
        labelled = [replace(e, label=n % 2, action_path=None) for n, e in enumerate(entries)]
        write_list(root / f"{name}.json", labelled)
    by_label = ["data.source=video", "model.condition=label", "eval.swapped_actions=[]"]
    status, out, report = validate(*by_label, "model.num_conditions=2")
    assert status == 0 and report["lists"][0]["labels"] == {"0": 2, "1": 1}
    assert "2, of 1 to 2 clips" in out
    status, out, _ = validate(*by_label, "model.num_conditions=1")
    assert status == 1 and "entry 1 has label 1, but the model knows 0 to 0" in out


def test_one_list_without_options(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["validate", "--list", str(root / "train.json")]) == 0
    assert "| clips" in capsys.readouterr().out
    another_size(root)
    shutil.copy(root / "val.json", root.parent / "mine.json")
    arguments = ["validate", "--list", str(root.parent / "mine.json"), "--root", str(root)]
    assert main(arguments) == 0
    assert "frames of 2 sizes" in capsys.readouterr().out
    (root / "val/00001.mp4").unlink()
    assert main(arguments) == 1
    assert "broken clips: 1 of 2, named above" in capsys.readouterr().err
    for wrong in (["--list", "no.json"], ["--list", "no.json", "a=b"], ["--opt", TINY, "--root=x"]):
        assert main(["validate", *wrong]) == 1
    told = capsys.readouterr().err
    assert "no.json: no such file" in told and "'a=b'" in told and "--root belongs" in told
