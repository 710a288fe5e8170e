"""Saved parts that do not fit are refused; diffusers only warns of missing weights."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from scd.errors import ScdError
from scd.models import SCD
from scd.models.autoencoder import load_codec
from scd.models.load import build_world_model, load_checkpoint_for_use
from scd.models.weights import load_matching
from scd.options import load_options
from scd.pipeline import SCDPipeline, pipeline_of

ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_autoencoder_path, tmp_path) -> Path:
    torch.manual_seed(0)
    vae = load_codec(str(tiny_autoencoder_path)).autoencoder
    model = SCD(channels=vae.config.latent_channels, heads=1, encoder_layers=2, decoder_layers=1)
    SCDPipeline(model, vae).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, drop: str | None = None, add: str | None = None) -> None:
    tensors = load_file(folder / WEIGHTS)
    if drop is not None:
        del tensors[drop]
    if add is not None:
        tensors[add] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_whole_ones_are_loaded(folder):
    pipeline = SCDPipeline.from_pretrained(folder)
    assert pipeline.transformer.config.encoder_layers == 2
    named = {"pretrained_model_name_or_path": folder / "transformer"}
    model, found = SCD.from_pretrained(**named, output_loading_info=True)
    assert isinstance(model, SCD) and not found["missing_keys"]


@pytest.mark.parametrize("low_memory", [True, False])
def test_models_are_loaded_whole_or_not_at_all(folder, low_memory):
    lost = "encoder.blocks.1.mlp.down.weight"
    given = {"low_cpu_mem_usage": low_memory}
    change(folder / "transformer", drop=lost)
    for load, where in ((SCDPipeline, folder), (SCD, folder / "transformer")):
        with pytest.raises(ScdError, match=f"the model's 1 weights lack {lost}"):
            load.from_pretrained(where, **given)


def test_surplus_weights_are_refused(folder):
    change(folder / "transformer", add="encoder.extra")
    with pytest.raises(ScdError, match=r"have too much: encoder\.extra"):
        SCDPipeline.from_pretrained(folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused(folder, layers):
    change_config(folder / "transformer", encoder_layers=layers)
    with pytest.raises(ScdError, match=r"the model's .* weights"):
        SCDPipeline.from_pretrained(folder)


def test_config_and_options_tell_one_story(tiny_autoencoder_path, tmp_path):
    """Diffusers goes by the one, this project's commands by the other."""
    path = ROOT / "options/scd_doom_tiny.yml"
    options = load_options(path, [f"autoencoder.path={tiny_autoencoder_path}", "model.heads=1"])
    codec = load_codec(options.autoencoder.path)
    model = build_world_model(options, codec)
    folder = tmp_path / "model"
    pipeline_of(options, model, codec.autoencoder).save_pretrained(folder)
    (folder / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="50KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    loaded = load_checkpoint_for_use(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name].cpu(), tensor)
    one = next((folder / "transformer").glob("*.safetensors"))
    with pytest.raises(ScdError, match="weights of an exported model: give its folder"):
        load_checkpoint_for_use(one)
    change_config(folder / "transformer", sigma_min=0.2)
    with pytest.raises(ScdError, match=r"config\.json: sigma_min is 0\.2, but .* in options\.yml"):
        load_checkpoint_for_use(folder)


def test_autoencoders_are_loaded_whole(folder):
    lost = "decoder.conv_in.weight"
    change(folder / "vae", drop=lost)
    with pytest.raises(ScdError, match=f"vae: its config wants {lost}"):
        SCDPipeline.from_pretrained(folder)


def test_parts_are_exchanged(folder):
    """Also those whose weights accelerate keeps elsewhere."""
    pipeline = SCDPipeline.from_pretrained(folder)
    pipeline.register_modules(transformer=pipeline.transformer)
    assert cpu_offload(pipeline.vae, "cpu").decoder.conv_in.weight.is_meta
    SCDPipeline(pipeline.transformer, pipeline.vae)


def test_parts_of_other_channels_are_refused(folder):
    pipeline = SCDPipeline.from_pretrained(folder)
    channels = pipeline.vae.config.latent_channels
    with pytest.raises(ScdError, match=f"{channels} channels, pixels have 3"):
        SCDPipeline(pipeline.transformer, None)
    with pytest.raises(ScdError, match="of 3 channels, the vae makes"):
        SCDPipeline(SCD(channels=3, heads=1), pipeline.vae)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder_frame": "shfit"}, "encoder_frame is 'shfit', .* did you mean 'shift'"),
        ({"prediction": "velocty"}, "did you mean 'velocity'"),
        ({"condition": "actions", "num_conditions": 3}, "did you mean 'action'"),
        ({"condition": "action", "num_conditions": -2}, "num_conditions is -2"),
        ({"condition": "action"}, "contradicts num_conditions 0"),
        ({"patch_size": 0}, "patch_size is 0, not a positive"),
        ({"heads": 0}, "heads is 0"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
    ],
)
def test_arguments_of_no_network(config, message):
    with pytest.raises(ScdError, match=message):
        SCD(**{"heads": 1, "encoder_layers": 1, "decoder_layers": 1, **config})


def test_integers_of_another_type_are_refused():
    """Weights are converted from one precision to another; counters never."""
    network = torch.nn.BatchNorm1d(2)
    weights = {name: tensor.half() for name, tensor in network.state_dict().items()}
    weights["num_batches_tracked"] = network.num_batches_tracked.clone()
    load_matching(network, weights, "here")
    weights["num_batches_tracked"] = network.num_batches_tracked.int()
    with pytest.raises(ScdError, match=r"here: .* num_batches_tracked is \(\) torch\.int32"):
        load_matching(network, weights, "here")
