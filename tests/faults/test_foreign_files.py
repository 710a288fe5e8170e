"""No surprise from outside: damaged and hostile files end in `ScdError`, or are read.

Short by default; SCD_FAULTS=full tries thousands. Prints what was tried with `-s`.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save

from scd.data.clips import ClipFolder, read_actions
from scd.data.hub import HubFile, unpack
from scd.data.latents import check_latents, latent_header, read_latents
from scd.data.published import Notes, adopt_lists
from scd.data.video import NpzVideo, write_video
from scd.data.video_checks import KEPT, VideoChecks
from scd.errors import ScdError
from scd.evaluation.metrics import METRICS, AvailableMetrics
from scd.evaluation.samples import SampleFolder
from scd.evaluation.summary import markdown, summarize, tables
from scd.models.autoencoder import load_codec
from scd.models.load import load_checkpoint_for_use
from scd.models.reference import load_reference_checkpoint
from scd.models.scd import SCD
from scd.models.weights import load_matching
from scd.options import load_options
from scd.training.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from scd.training.optimizer import OptimizedModel
from scd.training.resume import refuse_other_run, run_identity
from scd.utils.files import sha256
from tests.faults.mutate import mutated
from tests.faults.trials import FULL, Kind, try_damage
from tests.test_reference import reference_names

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "options/scd_doom_tiny.yml"
SMALL = ["model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1", "name=fuzz"]
SMALL += ["autoencoder.path=null", "data.source=video", "model.patch_size=16"]
SHORT_TRIALS, FULL_TRIALS = 40, 1000
MAKERS: dict[str, Callable[[Path], Kind]] = {}


def kind(make: Callable[[Path], Kind]) -> Callable[[Path], Kind]:
    MAKERS[make.__name__] = make
    return make


def folder_bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tiny_model() -> SCD:
    torch.manual_seed(0)
    return SCD(3, 16, 1, 1, 1, condition="action", num_conditions=4, prediction="data")


def in_memory(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    return in_memory(lambda file: np.savez_compressed(file, **arrays))


ACTIONS = np.arange(12) % 4
VIDEO = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


@kind
def options(_: Path) -> Kind:
    """YAML as text and, being its superset, as JSON."""
    plain = json.dumps(json.loads(options_json()))

    def damage(name: str, data: bytes, rng: Random) -> bytes:
        return mutated(name, rng.choice([data, plain.encode()]), rng)

    def careful(name: str, data: bytes, rng: Random) -> bytes:
        try:
            return damage(name, data, rng)
        except ValueError:  # the text is no JSON
            return damage("options.txt", data, rng)

    files = {"options.yml": TINY.read_bytes()}
    return Kind("options", files, lambda folder: load_options(folder / "options.yml"), careful)


def options_json() -> str:
    identity = run_identity(load_options(TINY, SMALL), 1)
    return json.dumps(identity["options"])


@kind
def overrides(_: Path) -> Kind:
    texts = ["train.steps=3", "optim.betas=[0.9, 0.99]", "name=a", "data.root=x", "seed=7"]
    files = {f"{number}.txt": text.encode() for number, text in enumerate(texts)}

    def read(folder: Path) -> None:
        paths = sorted(folder.iterdir())
        load_options(TINY, [path.read_bytes().decode(errors="surrogateescape") for path in paths])

    return Kind("overrides", files, read)


@kind
def clip_list(folder: Path) -> Kind:
    write_video(folder / "v.mp4", VIDEO, 8)
    entry = {"video_path": "v.mp4", "action_path": "a.npz", "label": 1}
    files = {"list.json": json.dumps([entry, entry | {"video_path": "./v.mp4"}]).encode()}
    files["a.npz"] = npz(actions=ACTIONS)
    fixed = (folder / "v.mp4").read_bytes()

    def read(folder: Path) -> None:
        (folder / "v.mp4").write_bytes(fixed)
        for condition in ("action", "label"):
            clips = ClipFolder(folder, "list.json", "video", condition, 4)
            for number in range(min(len(clips), 3)):
                clips.read(number, 4)

    return Kind("list and actions", files, read)


@kind
def dmlab(_: Path) -> Kind:
    def read(folder: Path) -> None:
        NpzVideo(folder / "clip.npz").frames(np.arange(4))
        read_actions(folder / "clip.npz")

    return Kind("DMLab npz", {"clip.npz": npz(video=VIDEO, actions=ACTIONS)}, read)


@kind
def latents(_: Path) -> Kind:
    values = torch.randn(12, 8, 4, 4)
    files = {
        "l.safetensors": save({"latents": values}, {"autoencoder": "me"}),
        "l.pt": in_memory(lambda file: torch.save(values, file)),
    }

    def read(folder: Path) -> None:
        for name in files:
            latent_header(folder / name)
            read_latents(folder / name)[torch.arange(4)].float().sum()
        check_latents([folder / name for name in files], "me", (8, 4, 4))

    return Kind("latents", files, read)


@kind
def model(_: Path) -> Kind:
    metadata = {"options": options_json(), "step": "7"}
    files = {"ema.safetensors": save(tiny_model().state_dict(), metadata)}
    return Kind("model", files, lambda folder: load_checkpoint_for_use(folder / "ema.safetensors"))


@kind
def checkpoint(folder: Path) -> Kind:
    """All of a training checkpoint; often with a manifest that agrees with the damage."""
    network, options = tiny_model(), load_options(TINY, SMALL)
    optimizer = torch.optim.AdamW(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    now = run_identity(options, 1)
    state = TrainingState(7, now, weights, weights, optimizer.state_dict())
    save_checkpoint(folder, state, keep=1)

    def finish(folder: Path, rng: Random) -> None:
        path = folder / "step-00000007/manifest.json"
        try:
            manifest = json.loads(path.read_bytes())
            if rng.random() < 0.8:
                for name in manifest["files"]:
                    manifest["files"][name] = renewed(manifest["files"][name], path.with_name(name))
            path.write_text(json.dumps(manifest))
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            pass

    def read(folder: Path) -> None:
        path = latest_checkpoint(folder)
        if path is None:
            return
        state = load_checkpoint(path)
        refuse_other_run(state.run, now, str(path))
        load_matching(network, state.ema, str(path))
        load_matching(network, state.model, str(path))
        learner = OptimizedModel(
            network, [{"params": list(network.parameters()), "lr": 1e-3}], options, True
        )
        learner.start(learner.optimizer, state.step, state.optimizer)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()

    return Kind("training checkpoint", folder_bytes(folder), read, finish=finish)


def renewed(described: object, path: Path) -> object:
    """A manifest's entry for a file as it is now."""
    if isinstance(described, dict):
        return {**described, "sha256": sha256(path), "bytes": path.stat().st_size}
    return sha256(path)


@kind
def reference(_: Path) -> Kind:
    weights = reference_names(SCD(4, 1, 1, 1, 1, condition="action", num_conditions=3))
    files = {"ema.pth": in_memory(lambda file: torch.save(weights, file))}
    return Kind("reference", files, lambda folder: load_reference_checkpoint(folder / "ema.pth"))


@kind
def autoencoder(folder: Path) -> Kind:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)
    return Kind("autoencoder KL", folder_bytes(folder), read_autoencoder)


@kind
def deep_compression(folder: Path) -> Kind:
    path = next(folder.parent.glob("deep*"))
    return Kind("autoencoder DC", folder_bytes(path), read_autoencoder)


def read_autoencoder(folder: Path) -> None:
    with torch.no_grad():
        codec = load_codec(str(folder))
        codec.decode(codec.encode(torch.zeros(1, 1, 3, 16, 16)))


@kind
def video(folder: Path) -> Kind:
    write_video(folder / "v.mp4", VIDEO, 8)
    return Kind(
        "video",
        {"v.mp4": (folder / "v.mp4").read_bytes()},
        lambda folder: VideoChecks(folder).open("v.mp4").frames(np.arange(0, 8, 2)),
    )


@kind
def video_checks(folder: Path) -> Kind:
    write_video(folder / "v.mp4", VIDEO, 8)
    checks = VideoChecks(folder)
    checks.check_all(["v.mp4"])
    whole = (folder / "v.mp4").read_bytes()

    def read(folder: Path) -> None:
        (folder / "v.mp4").write_bytes(whole)
        VideoChecks(folder).open("v.mp4").frames(np.arange(0, 8, 2))

    return Kind("checks of videos", {KEPT: (folder / KEPT).read_bytes()}, read)


@kind
def archive(_: Path) -> Kind:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("a/0.npz", "a/" + "long" * 40 + ".npz", "b/1.npz"):
                info = tarfile.TarInfo(name)
                info.size = 700
                tar.addfile(info, io.BytesIO(bytes(700)))

    def read(folder: Path) -> None:
        outside = folder / "data"
        outside.mkdir()
        before = {path for path in folder.parent.rglob("*") if outside not in path.parents}
        unpack(folder / "shard-0.tar", outside, outside / ".hub/staging")
        after = {path for path in folder.parent.rglob("*") if outside not in path.parents}
        assert before == after

    return Kind("tar", {"shard-0.tar": in_memory(write)}, read)


@kind
def published(_: Path) -> Kind:
    entries = [{"video_path": f"/home/x/{n}.txt", "action_path": "a/0.txt"} for n in range(3)]
    files = {"published.json": json.dumps(entries).encode(), "0.txt": b"", "a/0.txt": b""}

    def read(folder: Path) -> None:
        lists = {folder / "published.json": folder / "train.json"}
        for line in adopt_lists(lists, folder, [folder]):
            if line.startswith("note: "):  # this list is left out, and the others taken
                raise ScdError(line)

    return Kind("published list", files, read)


@kind
def notes(_: Path) -> Kind:
    note = {"identity": "abc", "counts": {".mp4": 3}, "lists": ["train.json"]}
    data = {"complete": "abc", "files": {"shard-0.tar": note}}

    def read(folder: Path) -> None:
        notes = Notes(folder / "fetched.json")
        notes.has(HubFile("shard-0.tar", 1, "abc", None))
        assert isinstance(notes.count((".mp4",)), int) and len(notes.lists()) >= 0

    return Kind("hub notes", {"fetched.json": json.dumps(data).encode()}, read)


@kind
def samples(folder: Path) -> Kind:
    """What `scd measure` reads."""
    protocol = {"videos": 2, "context_frames": 4, "new_frames": 20, "fvd_precision": "fp32"}
    protocol["windows"] = 2
    identity = {"format": 1, "options": {"data": {"frame_size": 32}}}
    SampleFolder.describe(folder, identity, {"model": ["model-seed-0"]}, protocol, {})
    saved = SampleFolder(folder)
    weights = {"i3d": "abc", "i3d_in_2_windows": "abc", "psnr": None, "sharpness": None}
    for number in range(2):
        real = {"i3d": torch.rand(5), "i3d_in_2_windows": torch.rand(2, 5)}
        real["sharpness"] = torch.rand(20)
        saved.write_clip("model-seed-0", number, torch.rand(24, 3, 32, 32))
        saved.write_measurement("real", number, real, weights)
        model = {**real, "psnr": torch.rand(20)}
        saved.write_measurement("model-seed-0", number, model, weights)
    available = AvailableMetrics()
    available.metrics = {name: METRICS[name] for name in ("psnr", "fvd", "sharpness")}
    available.missing, available.hashes = {}, {"i3d": "abc"}

    def read(folder: Path) -> None:
        saved = SampleFolder(folder)
        for set_ in {set_ for sets in saved.rows.values() for set_ in sets}:
            assert folder in saved.measurement_path(set_, 0).parents
            assert ".." not in saved.measurement_path(set_, 0).parts
            saved.read_clip(set_, 0)
            saved.measured_quantities(set_, 0, weights)
        AvailableMetrics(saved.setting)
        markdown(tables(summarize(saved, available)))

    return Kind("saved samples", folder_bytes(folder), read)


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_inputs_are_read_or_refused(
    name: str, tmp_path: Path, tiny_autoencoder_path: str
) -> None:
    if name == "deep_compression":
        shutil.copytree(tiny_autoencoder_path, tmp_path / "deep")
    (tmp_path / "original").mkdir()
    made = MAKERS[name](tmp_path / "original")
    (tmp_path / "trials").mkdir()
    made.read(whole_copy(made, tmp_path / "whole"))  # undamaged, it is read
    tally = try_damage(made, tmp_path / "trials", FULL_TRIALS if FULL else SHORT_TRIALS)
    print(
        f"\n{made.name:20} tried {tally.tried:6}  refused {tally.refused:6}  "
        f"accepted {tally.accepted:6}  wrong {len(tally.wrong):4}"
    )
    assert not tally.wrong, "\n".join(tally.wrong[:40])
    assert tally.refused


def whole_copy(made: Kind, folder: Path) -> Path:
    for name, data in made.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder
