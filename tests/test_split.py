"""A dense model split into an SCD, and training that starts from given weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scd.analysis.split import Split, split_model, split_options
from scd.cli import main
from scd.errors import ScdError
from scd.models.autoencoder import PixelCodec
from scd.models.load import (
    build_world_model,
    load_checkpoint_for_use,
    refuse_other_prediction,
)
from scd.models.world_model import FirstLook
from scd.options import Options, load_options, options_to_dict

ROOT = Path(__file__).parent.parent
LAYERS = 4


@pytest.fixture
def options(doom_root, tmp_path):
    """Make the options of a dense model with 4 tokens per frame of 64x64 pixels."""

    def make(*overrides: str) -> Options:
        small = [
            f"data.root={doom_root}", "data.source=video", "data.frames=4", "autoencoder.path=null",
            "model.patch_size=32", "model.heads=1", f"model.layers={LAYERS}", "train.steps=1",
            "train.batch_size=2", "train.workers=0", "train.mixed_precision=fp32",
            f"output_root={tmp_path}", "name=dense",
        ]  # fmt: skip
        return load_options(ROOT / "options/causal_dit_doom_tiny.yml", [*small, *overrides])

    return make


@pytest.fixture
def dense(options):
    model = build_world_model(options(), PixelCodec())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("split", "sources"),
    [
        (Split(3, 1), [3]),
        (Split(2, 2), [2, 3]),
        (Split(3, 2, "first-and-last"), [0, 3]),
        (Split(2, 4, "first-and-last"), [0, 1, 2, 3]),
        (Split(4, 4), [0, 1, 2, 3]),
    ],
)
def test_every_tensor_comes_from_its_layer(options, dense, split, sources):
    assert split.decoder_sources(LAYERS) == sources
    model = split_model(dense, PixelCodec(), split_options(options(), split), split)
    weights, taken = dense.state_dict(), dict(model.state_dict())
    for part in ("encoder", "decoder"):
        blocks = range(split.encoder_layers) if part == "encoder" else sources
        for number, source in enumerate(blocks):
            for name in dense.blocks[0].state_dict():
                tensor = taken.pop(f"{part}.blocks.{number}.{name}")
                assert torch.equal(tensor, weights[f"blocks.{source}.{name}"])
        for name in [name for name in taken if name.startswith(f"{part}.")]:
            tensor = taken.pop(name)
            if name.startswith("encoder.norm_out."):
                assert not tensor.any()  # the context is the normed hidden state, unmodulated
            else:
                assert torch.equal(tensor, weights[name.removeprefix(f"{part}.")])
    assert not taken


@torch.no_grad()
def test_without_attention_the_split_computes_what_the_dense_model_does(options, dense):
    """Nothing of history reaches a frame then, and a decoder of all layers is the dense model."""
    for block in dense.blocks:
        block.attention.out.weight.data.zero_()
        block.attention.out.bias.data.zero_()
    split = Split(2, LAYERS)
    model = split_model(dense, PixelCodec(), split_options(options(), split), split)
    latents, noisy = torch.randn(2, 2, 5, 3, 64, 64)
    times, actions = 1000 * torch.rand(2, 5), torch.randint(0, 4, (2, 5))
    expected = dense.velocity(latents, noisy, times, actions)
    assert (model.velocity(latents, noisy, times, actions) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("frame", ["noise", "joint"])
def test_a_first_look_sees_what_the_dense_model_does(options, dense, frame):
    """The same tensors as of `shift`; and the contexts of so many layers, up to the norm."""
    wanted = Split(3, 1, encoder_frame=frame)
    model = split_model(dense, PixelCodec(), split_options(options(), wanted), wanted)
    assert model.config.encoder_frame == frame
    plain = Split(3, 1)
    shifted = split_model(dense, PixelCodec(), split_options(options(), plain), plain)
    for name, tensor in shifted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    latents, noisy = torch.randn(2, 2, 5, 3, 64, 64)
    times, actions = 1000 * torch.rand(2, 4), torch.randint(0, 4, (2, 5))
    seen = []
    dense.blocks[2].register_forward_hook(lambda module, args, out: seen.append(out[:, 4:]))
    dense(latents, noisy[:, None, 1:], times[:, None], actions)
    look = FirstLook(noisy[:, 1:], times)
    contexts = model.encoder(latents[:, :-1], actions, first_look=look)
    expected = torch.nn.functional.layer_norm(seen[0], (model.width,), eps=1e-6)
    assert (contexts - expected).abs().max() < 1e-4


def test_refused_splits(options, dense):
    for split, message in (
        (Split(0, 1), "--encoder-layers 0: choose 1 to 4, the dense model's layers"),
        (Split(1, 5), "--decoder-layers 5"),
        (Split(1, 3, "first-and-last"), "choose an even number"),
    ):
        with pytest.raises(ScdError, match=message):
            split_model(dense, PixelCodec(), split_options(options(), split), split)


def test_a_full_disk_is_reported_in_one_line(options, tmp_path, monkeypatch, capsys):
    assert train(options()) == 0
    capsys.readouterr()

    def full(*arguments):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("scd.analysis.split.save_file", full)
    checkpoint = tmp_path / "dense/checkpoints/step-00000001/ema.safetensors"
    sizes = ["--encoder-layers", "2", "--decoder-layers", "2"]
    assert main(["split", str(checkpoint), *sizes, "--out", str(tmp_path / "half")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "model.safetensors: cannot be written (No space left" in error


@pytest.mark.parametrize(("key", "value"), [("prediction", "velocity"), ("sigma_min", 0.1)])
def test_weights_that_predict_something_else_are_no_beginning(options, dense, tmp_path, key, value):
    path = tmp_path / "model.safetensors"
    save_file(dense.state_dict(), path, {"options": json.dumps(options_to_dict(options()))})
    refuse_other_prediction(path, options())
    with pytest.raises(ScdError, match=rf"its flow\.{key} is .*, but {value} in the options"):
        refuse_other_prediction(path, options(f"flow.{key}={value}"))


def train(options: Options) -> int:
    from omegaconf import OmegaConf

    path = options.output.parent / "given.yml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(options)))
    return main(["train", "--opt", str(path)])


@pytest.mark.slow
def test_split_then_train(options, tmp_path, capsys):
    """The command's folder is all that training needs; its weights are part of the run."""
    assert train(options()) == 0
    checkpoint = tmp_path / "dense/checkpoints/step-00000001/ema.safetensors"
    out = tmp_path / "half"
    command = ["split", str(checkpoint), "--encoder-layers", "2", "--decoder-layers", "2"]
    assert main([*command, "--out", str(out)]) == 0
    made = load_checkpoint_for_use(out / "model.safetensors")
    assert made.options.name == "half"
    assert (made.options.model.encoder_layers, made.options.model.decoder_layers) == (2, 2)
    assert made.options.output == out
    assert main([*command, "--out", str(out)]) == 1
    assert f"--out {out}: already exists" in capsys.readouterr().err
    noise = tmp_path / "noise"
    assert main([*command, "--encoder-frame", "noise", "--out", str(noise)]) == 0
    assert load_checkpoint_for_use(noise / "model.safetensors").model.takes_first_look
    # A step too small to move: training began from those weights.
    arguments = ["train", "--opt", str(out / "options.yml"), "train.save_every=1"]
    assert main([*arguments, "optim.lr=1e-12"]) == 0
    saved = load_file(out / "checkpoints/step-00000001/model.safetensors")
    for name, tensor in made.model.state_dict().items():
        assert (saved[name] - tensor).abs().max() < 1e-9, name
    manifest = json.loads((out / "checkpoints/step-00000001/manifest.json").read_text())
    assert len(manifest["run"]["init_from"]) == 64

    # Moved, the same weights are the same run; others are another.
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes((out / "model.safetensors").read_bytes())
    assert main([*arguments, "train.steps=2", f"init_from={elsewhere}"]) == 0
    save_file({name: tensor + 1 for name, tensor in load_file(elsewhere).items()}, elsewhere)
    capsys.readouterr()
    assert main([*arguments, "train.steps=3", f"init_from={elsewhere}"]) == 1
    assert "the weights at init_from are others" in capsys.readouterr().err
    # Gone, they are not needed any more; but a new run starts from nothing else.
    elsewhere.unlink()
    assert main([*arguments, "train.steps=3", f"init_from={elsewhere}"]) == 0
    assert f"init_from={elsewhere} is gone: the run goes on without it" in capsys.readouterr().out
    manifest = json.loads((out / "checkpoints/step-00000003/manifest.json").read_text())
    assert len(manifest["run"]["init_from"]) == 64
    # Weights that predict data are another model where the velocity is wanted.
    arguments.append(f"init_from={out / 'model.safetensors'}")
    assert main([*arguments, "name=new", "flow.prediction=velocity"]) == 1
    assert "its flow.prediction is data, but velocity in the options" in capsys.readouterr().err
    assert main([*arguments, "name=new", "model.decoder_layers=1"]) == 1
    assert "does not fit the model" in capsys.readouterr().err
    assert main([*arguments, "name=new", "init_from=nowhere.safetensors"]) == 1
    assert "nowhere.safetensors: no such weights file" in capsys.readouterr().err
