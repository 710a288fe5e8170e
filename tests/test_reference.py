"""Our network against outputs of the paper's public code on its own (random) weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scd.errors import ScdError
from scd.models import SCD, load_reference_checkpoint
from scd.rollout import generate

FOLDER = Path(__file__).parent / "data/reference"
TOLERANCE = 2e-5  # absolute, fp32; measured: 1.5e-6


@pytest.fixture(scope="module", params=["token_concat", "concat"])
def case(request):
    with safe_open(str(FOLDER / f"action_{request.param}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("w."): t for k, t in tensors.items() if k.startswith("w.")}
    model = load_reference_checkpoint(weights, config["patch"], request.param)
    return model, tensors, config


def test_configuration_is_read_off_the_tensors(case):
    model, _, config = case
    assert model.config.heads == config["heads"]
    assert model.config.encoder_layers == config["enc_layers"]
    assert model.config.decoder_layers == config["dec_layers"]
    assert model.config.channels == config["channels"]
    assert (model.config.condition, model.config.num_conditions) == ("action", 4)


@torch.no_grad()
def test_context(case):
    model, t, config = case
    context = model.encode(t["latents"], t["actions"][:, : config["frames"]])
    assert (context.flatten(1, 2) - t["encoder_context"]).abs().max() < TOLERANCE


@torch.no_grad()
def test_velocity(case):
    model, t, config = case
    actions = t["actions"][:, : config["frames"]]
    velocity = model.velocity(t["latents"], t["noisy"], t["timesteps"], actions)
    assert (velocity - t["velocity"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_rollout(case, scale):
    model, t, config = case
    new = generate(
        model,
        t["rollout_context"],
        actions=t["actions"][:, : config["context"] + config["unroll"]],
        num_frames=config["unroll"],
        num_steps=config["steps"],
        guidance_scale=scale,
        guidance="condition",
        noise=t["rollout_noise"],
    )
    assert (new - t[f"rollout_guidance_{scale}"]).abs().max() < TOLERANCE


def adjacent_pairs(halves: torch.Tensor) -> torch.Tensor:
    """A head's channels 0, 32, 1, 33, …: the order in which the reference stores rotated pairs."""
    order = [i + 32 * half for i in range(32) for half in (0, 1)]
    heads = halves.unflatten(0, (-1, 64))
    return heads[:, order].reshape(halves.shape)


def reference_names(model: SCD) -> dict[str, torch.Tensor]:
    """A model's weights under the reference's names: the loader's inverse, written out here."""
    names = {
        "embed": "x_embedder",
        "unembed": "proj_out",
        "conditioning.time": "timestep_embedder",
        "conditioning.table": f"{model.config.condition}_embedder.embedding_table",
        "attention.out": "attn.to_out.0",
        "attention.norm": "attn.norm",
        "modulation_attention": "norm1",
        "modulation_mlp": "norm2",
        "mlp.up": "mlp.net.0.proj",
        "mlp.down": "mlp.net.2",
        "blocks": "transformer_blocks",
        "fuse": "decoder_input_proj",
    }
    out = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(f".{ours}", f".{theirs}")
        if "attention.qkv" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                reordered = third if letter == "v" else adjacent_pairs(third)
                out[name.replace("attention.qkv", f"attn.to_{letter}")] = reordered
        elif "attn.norm" in name:
            out[f"{name}.weight"] = adjacent_pairs(tensor)
        else:
            out[name] = tensor
    return out


@pytest.mark.parametrize(
    "config",
    [
        {"patch_size": 2, "condition": "label", "num_conditions": 7},
        {"fusion": "add"},
        {"fusion": "token_concat_with_proj", "condition": "action", "num_conditions": 3},
        {"modulate_context": False},
        {"modulate_context": False, "modulate_output": False},
    ],
)
def test_other_configurations_load(config):
    torch.manual_seed(0)
    model = SCD(channels=4, heads=1, encoder_layers=2, decoder_layers=1, **config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loaded = load_reference_checkpoint(
        reference_names(model), config.get("patch_size", 1), config.get("fusion", "token_concat")
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_differences_are_named(case):
    _, t, _ = case
    weights = {k.removeprefix("w."): v for k, v in t.items() if k.startswith("w.")}
    fusion = "concat" if "decoder.decoder_input_proj.weight" in weights else "token_concat"
    broken = dict(weights)
    del broken["encoder.x_embedder.bias"]
    broken["decoder.surplus.weight"] = torch.zeros(3)
    with pytest.raises(ScdError, match=r"surplus.*encoder\.embed\.bias") as error:
        load_reference_checkpoint(broken, 1, fusion)
    assert "\n" not in str(error.value)
    with pytest.raises(ScdError, match="not a reference SCD checkpoint"):
        load_reference_checkpoint({"a": torch.zeros(1)})
