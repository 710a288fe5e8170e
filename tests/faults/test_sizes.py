"""A few bytes that announce any amount: refused before memory is taken, with all differences."""

import io
import json
import mmap
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scd.cli import main
from scd.data.clips import read_actions
from scd.data.latents import read_latents
from scd.data.video import VideoFile, write_video
from scd.errors import ScdError
from scd.models.autoencoder import load_codec
from scd.models.load import load_checkpoint_for_use
from scd.models.reference import load_reference_checkpoint
from scd.options import load_options, options_from_json
from scd.utils.files import MAX_JSON_BYTES, read_json
from tests.faults.test_foreign_files import SMALL, TINY, options_json, tiny_model
from tests.faults.trials import Kind, try_damage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def swollen_member(path: Path, value: object, name: str, size: int) -> None:
    """A file of `torch.save` with one member replaced by zeros, which compress to nothing."""
    whole = io.BytesIO()
    torch.save(value, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, bytes(size) if member.endswith(name) else old.read(member))


class Numbers:
    """Pickled, a call that only asks for memory."""

    def __reduce__(self) -> tuple:
        return bytearray, (2**36,)


def saved(folder: Path, name: str, value: object) -> Path:
    torch.save(value, folder / name)
    return folder / name


def announcing(folder: Path, options: dict, model: torch.nn.Module | None = None) -> Path:
    """Our own checkpoint, with other options in its metadata."""
    path = folder / "ema.safetensors"
    tensors = (model or tiny_model()).state_dict()
    save_file(tensors, path, {"options": json.dumps(options), "step": "1"})
    return path


def with_model(**values: object) -> dict:
    options = json.loads(options_json())
    return {**options, "model": {**options["model"], **values}}


def swollen_latents(folder: Path) -> None:
    swollen_member(folder / "l.pt", torch.zeros(8, 4, 4, 4), "data/0", 2**29)
    read_latents(folder / "l.pt")


def repeated_latents(folder: Path) -> None:
    """One number, and strides of zero: of a petabyte, said to be."""
    values = torch.zeros(1).as_strided((10**6, 32, 10**3, 10**3), (0, 0, 0, 0))
    read_latents(saved(folder, "l.pt", values))


def swollen_actions(folder: Path) -> None:
    np.savez_compressed(folder / "a.npz", actions=np.zeros(2**23 + 8, np.int64))
    read_actions(folder / "a.npz")


def long_list(folder: Path) -> None:
    with open(folder / "l.json", "wb") as file:
        file.write(b"[")
        file.truncate(MAX_JSON_BYTES + 2)
    read_json(folder / "l.json")


def long_options(folder: Path) -> None:
    (folder / "o.yml").write_text("name: " + "x" * 2**20)
    load_options(folder / "o.yml")


def wide_autoencoder(folder: Path, **changes: object) -> None:
    kl = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(kl))
    save_file({"x": torch.zeros(9)}, folder / "diffusion_pytorch_model.safetensors")
    load_codec(str(folder))


HOSTILE: dict[str, Callable[[Path], object]] = {
    "latents swollen by compression": swollen_latents,
    "latents that repeat one number": repeated_latents,
    "a pickle that asks for memory": lambda f: read_latents(saved(f, "l.pt", Numbers())),
    "the same in a state dict": lambda f: load_reference_checkpoint(
        saved(f, "ema.pth", {"encoder.x_embedder.weight": Numbers()})
    ),
    "a tensor of nothing, but wide": lambda f: load_reference_checkpoint(
        saved(
            f,
            "ema.pth",
            {
                "encoder.x_embedder.weight": torch.zeros(64 * 10**6, 0),
                "encoder.transformer_blocks.0.x": torch.zeros(1),
                "decoder.transformer_blocks.0.x": torch.zeros(1),
            },
        )
    ),
    "a block of a high number": lambda f: load_reference_checkpoint(
        saved(
            f,
            "ema.pth",
            {
                "encoder.x_embedder.weight": torch.zeros(64, 4),
                "encoder.transformer_blocks.999999999.x": torch.zeros(1),
                "decoder.transformer_blocks.0.x": torch.zeros(1),
            },
        )
    ),
    "actions swollen by compression": swollen_actions,
    "a list of gigabytes": long_list,
    "long options": long_options,
    "a million heads": lambda f: load_checkpoint_for_use(announcing(f, with_model(heads=10**6))),
    "more heads than numbers count": lambda f: load_checkpoint_for_use(
        announcing(f, with_model(heads=10**15))
    ),
    "a billion layers": lambda f: load_checkpoint_for_use(
        announcing(f, with_model(encoder_layers=10**9))
    ),
    "a billion actions": lambda f: load_checkpoint_for_use(
        announcing(f, with_model(condition="action", num_conditions=10**9))
    ),
    "a wide autoencoder": lambda f: wide_autoencoder(f, block_out_channels=[64, 10**6]),
    "a deep autoencoder": lambda f: wide_autoencoder(f, layers_per_block=10**9),
    "a header beyond the file": lambda f: read_latents(header_of(f, 2**40)),
    "a header of gigabytes": lambda f: read_latents(header_of(f, 2**27)),
}


def header_of(folder: Path, length: int) -> Path:
    path = folder / "l.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate(min(length + 8, 2**28))
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_what_announces_too_much_is_refused(name: str, tmp_path: Path) -> None:
    """In a process of its own, which may not swell (see `try_damage`)."""
    made = Kind(name, {"nothing": b""}, HOSTILE[name], damage=lambda name, data, rng: data)
    tally = try_damage(made, tmp_path, trials=1)
    assert not tally.wrong, tally.wrong
    assert tally.refused == 1


def test_frames_beyond_the_memory_are_refused(tmp_path: Path, monkeypatch) -> None:
    write_video(tmp_path / "v.mp4", np.zeros((12, 128, 128, 3), np.uint8), 8)
    video = VideoFile(tmp_path / "v.mp4")
    monkeypatch.setattr("scd.data.video.MAX_ARRAY_BYTES", 4 * 128 * 128 * 3)
    assert video.frames(np.arange(4)).shape == (4, 128, 128, 3)
    with pytest.raises(ScdError, match=r"v\.mp4: 5 frames of 128x128 pixels are more than"):
        video.frames(np.arange(5))


def test_all_differences_are_listed(tmp_path: Path) -> None:
    path = announcing(tmp_path, with_model(heads=2, decoder_layers=2))
    with pytest.raises(ScdError, match=r"does not fit the model in \d+ tensors: ") as caught:
        load_checkpoint_for_use(path)
    told = str(caught.value)
    assert told.count(", the model's ") == 20 and told.endswith(" more") and "\n" not in told
    count = int(told.split(" in ")[1].split()[0])
    assert f"and {count - 20} more" in told
    tensors = {**tiny_model().state_dict()}
    tensors["decoder.unembed.bias"] = tensors["decoder.unembed.bias"].int()
    save_file(tensors, path, {"options": options_json()})
    with pytest.raises(ScdError, match=r"in 1 tensors: decoder\.unembed\.bias is .* torch\.int32"):
        load_checkpoint_for_use(path)


def test_options_that_make_it_another_model_are_refused(tmp_path: Path) -> None:
    path = announcing(tmp_path, json.loads(options_json()))
    load_checkpoint_for_use(path, None, ["rollout.steps=3", "data.root=elsewhere"])
    load_checkpoint_for_use(path, str(TINY), [*SMALL])
    other = ["flow.prediction=velocity", "model.condition=none", "model.num_conditions=0"]
    other += ["eval.swapped_actions=[]"]
    for options in (None, str(TINY)):
        with pytest.raises(ScdError, match="does not fit the options: ") as caught:
            load_checkpoint_for_use(path, options, [*SMALL, *other])
        for difference in (
            "model.condition is action in the checkpoint, none in the options",
            "model.num_conditions is 4 in the checkpoint, 0 in the options",
            "flow.prediction is data in the checkpoint, velocity in the options",
        ):
            assert difference in str(caught.value)


def test_a_damaged_checkpoint_is_not_evaluated(tmp_path: Path) -> None:
    """A flipped bit that no format notices, but the manifest beside does."""
    path = announcing(tmp_path, json.loads(options_json()))
    loaded = load_checkpoint_for_use(path)
    for described in (loaded.source["sha256"], {"bytes": 1, "sha256": loaded.source["sha256"]}):
        manifest = {"files": {path.name: described}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        whole = path.read_bytes()
        load_checkpoint_for_use(path)
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
        with pytest.raises(ScdError, match=r"ema\.safetensors: damaged, it is not the file"):
            load_checkpoint_for_use(path)
        path.write_bytes(whole)


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_what_is_no_checkpoint_is_named(
    command: str, tmp_path: Path, tiny_autoencoder_path: str, capfd: pytest.CaptureFixture
) -> None:
    """By its own name, whatever else is missing (the published autoencoder, most of all)."""
    text = tmp_path / "notes.txt"
    text.write_text("no checkpoint")
    tensors = saved(tmp_path, "tensors.pth", {"a": torch.zeros(2)})
    autoencoder = Path(tiny_autoencoder_path) / "diffusion_pytorch_model.safetensors"
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    step = tmp_path / "step-00000010"
    step.mkdir()
    (step / "ema.safetensors").touch()
    for path, told in (
        (text, "no checkpoint, neither safetensors nor"),
        (tmp_path, "no such weights file"),
        (step, f"give {step}/ema.safetensors"),
        (tensors, "not a reference SCD checkpoint"),
        (autoencoder, "not a reference SCD checkpoint"),
        (empty, "not a readable safetensors file"),
    ):
        assert main([command, str(path)]) == 1
        error = capfd.readouterr().err
        assert error.startswith(f"error: {path}: ") and told in error and error.count("\n") == 1


def test_plain_data_names_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """OmegaConf would fill it in, and the name of a folder would tell."""
    monkeypatch.setenv("SECRET", "told")
    for text in ("${oc.env:SECRET}", "x${seed}", "${"):
        with pytest.raises(ScdError, match="name is plain data"):
            load_options(TINY, [f"name='{text}'"])
        with pytest.raises(ScdError, match="name is plain data"):
            options_from_json(json.dumps({"name": text}), "checkpoint")


def test_a_trial_that_swells_hangs_or_dies_is_wrong(tmp_path: Path, monkeypatch) -> None:
    """The trials can fail."""
    import os
    import time

    ways: dict[str, Callable[[Path], object]] = {
        "hangs or dies (Alarm clock)": lambda _: time.sleep(9),
        "hangs or dies (Segmentation fault)": lambda _: os.kill(os.getpid(), 11),
        "takes ": lambda _: touch_new_memory(400),
        "ValueError: x": lambda _: raise_(ValueError("x")),
        "y z": lambda _: raise_(ScdError("cannot allocate y z")),
    }
    for told, act in ways.items():
        seconds = 0.5 if "Alarm" in told else 30.0
        monkeypatch.setattr("tests.faults.trials.LONGEST_SECONDS", seconds)
        made = Kind("way", {"f": b"x"}, act, damage=lambda name, data, rng: data)
        tally = try_damage(made, tmp_path, trials=2)
        assert tally.tried == 2 and len(tally.wrong) == 2 and told in tally.wrong[1]


def touch_new_memory(mib: int) -> None:
    """Take memory that no freed block of this process can stand in for."""
    taken = mmap.mmap(-1, mib * 2**20)
    for _ in range(mib):
        taken.write(b"x" * 2**20)


def raise_(error: Exception) -> None:
    raise error
