"""Converting a Wan: every tensor from its place, in all formats; what does not fit is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd.cli import main
from scd.data import hub
from scd.errors import ScdError
from scd.models.weights import SHOWN_DIFFERENCES
from scd.options import RolloutOptions
from scd.wan import CausalWan, SCDWan
from scd.wan.convert import convert, read_autoencoder, read_transformer
from scd.wan.names import read_any_names, to_diffusers_names, to_wan_names
from tests.test_hub import Hub, server  # noqa: F401 (a fixture)
from tests.test_wan import disturbed, tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ["--encoder-layers", "3", "--decoder-first", "1", "--decoder-last", "1"]


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    return tiny_wan()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return disturbed(AutoencoderKLWan(base_dim=2))


@pytest.fixture(scope="module")
def folder(wan, vae, tmp_path_factory) -> Path:
    """In diffusers' format, in several files; read only."""
    folder = tmp_path_factory.mktemp("wan")
    wan.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def own_folder(wan, vae, tmp_path_factory) -> Path:
    """In Wan's own format; read only."""
    folder = tmp_path_factory.mktemp("own")
    save_file(to_wan_names(wan.state_dict()), folder / "diffusion_pytorch_model.safetensors")
    names = {wan_name_of_vae(name): tensor for name, tensor in vae.state_dict().items()}
    torch.save(names, folder / "Wan2.1_VAE.pth")
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 24, "num_heads": 2}
    config |= {"ffn_dim": 32, "freq_dim": 256, "in_dim": 16, "out_dim": 16, "num_layers": 4}
    (folder / "config.json").write_text(json.dumps(config | {"text_len": 512, "eps": 1e-6}))
    return folder


def wan_name_of_vae(name: str) -> str:
    """The name of a tensor of the autoencoder in Wan's own file."""

    def block(match: re.Match) -> str:
        number, kind, part = int(match[1]), match[2], int(match[3])
        return f"upsamples.{4 * number + (3 if kind == 'upsamplers' else part)}."

    name = re.sub(r"up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.", block, name)
    for diffusers, own in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"\bconv_in\b", "conv1"),
        (r"\bnorm_out\b", "head.0"),
        (r"\bconv_out\b", "head.2"),
        (r"mid_block\.resnets\.0\.", "middle.0."),
        (r"mid_block\.resnets\.1\.", "middle.2."),
        (r"mid_block\.attentions\.0\.", "middle.1."),
        (r"down_blocks\.", "downsamples."),
        (r"(middle\.[02]|samples\.\d+)\.norm1\b", r"\1.residual.0"),
        (r"(middle\.[02]|samples\.\d+)\.conv1\b", r"\1.residual.2"),
        (r"(middle\.[02]|samples\.\d+)\.norm2\b", r"\1.residual.3"),
        (r"(middle\.[02]|samples\.\d+)\.conv2\b", r"\1.residual.6"),
        (r"\bconv_shortcut\b", "shortcut"),
    ):
        name = re.sub(diffusers, own, name)
    return name


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_names_there_and_back(wan):
    """Against the names in Wan's code, and against diffusers' own converter."""
    tensors = wan.state_dict()
    own = to_wan_names(tensors)
    of_block = {name.removeprefix("blocks.1.") for name in own if name.startswith("blocks.1.")}
    assert of_block == {
        "modulation",
        *(f"norm3.{kind}" for kind in ("weight", "bias")),
        *(f"ffn.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")),
        *(f"{a}_attn.norm_{x}.weight" for a in ("self", "cross") for x in "qk"),
        *(
            f"{a}_attn.{x}.{kind}"
            for a in ("self", "cross")
            for x in "qkvo"
            for kind in ("weight", "bias")
        ),
    }
    assert own["blocks.1.norm3.weight"] is tensors["blocks.1.norm2.weight"]
    assert own["head.modulation"] is tensors["scale_shift_table"]
    assert {name.split(".")[0] for name in own} == {
        *("patch_embedding", "time_embedding", "time_projection", "text_embedding"),
        *("blocks", "head"),
    }
    assert_equal(to_diffusers_names(own), tensors)
    assert_equal(convert_wan_transformer_to_diffusers(dict(own)), tensors)


@pytest.mark.parametrize("format", ["folder", "own_folder"])
def test_a_folder_is_converted_whole(format, request, wan, vae, tmp_path, capsys):
    folder, out = request.getfixturevalue(format), tmp_path / "out"
    arguments = ["wan", "convert", str(folder), "--out", str(out)]
    assert main([*arguments, *SIZES, "--fusion", "middle", "--num-actions", "2"]) == 0
    assert f"SCDWan, 0.1 million parameters, from {folder}" in capsys.readouterr().out
    model = SCDWan.from_pretrained(out / "transformer", use_safetensors=True)
    sizes = {"encoder_layers": 3, "decoder_first": 1, "decoder_last": 1}
    more = {"fusion": "middle", "first_frame": True, "num_actions": 2}
    assert_equal(model.state_dict(), SCDWan.from_wan(wan, **sizes, **more).state_dict())
    read = AutoencoderKLWan.from_pretrained(out / "vae", use_safetensors=True)
    assert_equal(read.state_dict(), vae.state_dict())
    assert read.config.latents_mean == vae.config.latents_mean
    options = yaml.safe_load((out / "options.yml").read_text())
    assert options["source"] == str(folder)
    RolloutOptions(**options["rollout"])
    # Once more, into the same folder: a causal one.
    assert main([*arguments, "--type", "causal", "--chunk-frames", "3"]) == 0
    model = CausalWan.from_pretrained(out / "transformer", use_safetensors=True)
    assert model.chunk_frames == 3
    assert_equal(model.state_dict(), wan.state_dict())


def test_weights_of_self_forcing(folder, own_folder, wan, tmp_path):
    """The average is taken if there is one; names come with prefixes, also of sharded training."""
    path, other = tmp_path / "self_forcing.pt", disturbed(tiny_wan(), 0.2)
    own = to_wan_names(other.state_dict())
    sharded = {
        "model." + re.sub(r"(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", name): tensor
        for name, tensor in own.items()
    }
    plain = {f"model.{name}": tensor for name, tensor in to_wan_names(wan.state_dict()).items()}
    for parts, expected in (
        ({"generator": plain, "critic": plain, "step": 600}, wan),
        ({"generator_ema": sharded, "generator": plain}, other),
        (own, other),
        (other.state_dict(), other),
    ):
        torch.save(parts, path)
        for base in (folder, own_folder):
            found = read_transformer(base, path)
            assert_equal(found.state_dict(), expected.state_dict())
            assert found.config.num_attention_heads == 2
    save_file(own, tmp_path / "x.safetensors")
    assert_equal(read_any_names(tmp_path / "x.safetensors"), other.state_dict())
    torch.save({"generator": plain | sharded}, path)
    with pytest.raises(ScdError, match="holds tensors twice"):
        read_any_names(path)


class Executed:
    """A pickle that would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"generator_ema": {"model.head.head.weight": Executed(trace)}}, path)
    with pytest.raises(ScdError, match=r"evil\.pt: refused"):
        read_any_names(path)
    torch.save({"generator": {"step": 3}}, path)
    with pytest.raises(ScdError, match="expected a state dict of tensors, or generator_ema or"):
        read_any_names(path)
    assert not trace.exists()


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    swollen = torch.zeros(1).expand(10**12)
    torch.save({"generator": {"head.head.weight": swollen}}, tmp_path / "x.pt")
    with pytest.raises(ScdError, match="expected a state dict of tensors"):
        read_any_names(tmp_path / "x.pt")


def test_what_does_not_fit_is_listed(folder, wan, tmp_path):
    tensors, path = wan.state_dict(), tmp_path / "x.safetensors"

    def error(change: dict[str, Tensor | None]) -> str:
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path)
        with pytest.raises(ScdError) as info:
            read_transformer(folder, path)
        return str(info.value)

    message = error(
        {
            "blocks.3.norm2.bias": None,
            "img_emb.proj.0.weight": torch.zeros(3),
            "proj_out.bias": torch.zeros(5),
        }
    )
    assert "does not fit the model in 3 tensors" in message
    assert "blocks.3.norm2.bias is absent, the model's (24,)" in message
    assert "img_emb.proj.0.weight is (3,), the model's absent" in message
    assert "proj_out.bias is (5,), the model's (64,)" in message
    swapped = {f"blocks.0.norm3.{kind}": tensors[f"blocks.0.norm2.{kind}"] for kind in ("weight",)}
    assert "in 2 tensors" in error({**swapped, "blocks.0.norm2.weight": None})
    assert "x.safetensors: proj_out.bias is not finite" in error(
        {"proj_out.bias": torch.full((64,), torch.nan)}
    )
    everything = dict.fromkeys(list(tensors)[SHOWN_DIFFERENCES + 5 :])
    assert re.search(r"; and \d+ more$", error(everything))


def copied(folder: Path, target: Path, **config) -> Path:
    """A copy of a folder, with changes of its transformer's config."""
    for path in folder.rglob("*.*"):
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(folder)).write_bytes(path.read_bytes())
    file = target / ("transformer/config.json" if (target / "vae").is_dir() else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def test_folders_that_are_no_text_to_video_wan(folder, own_folder, tmp_path):
    cases = [
        (folder, {"_class_name": "WanVACETransformer3DModel"}, "describes a 'WanVACE"),
        (folder, {"num_layers": 10**9}, "1000000000 layers, but"),
        (folder, {"attention_head_dim": 10}, "does not fit the model"),
        (own_folder, {"model_type": "i2v"}, "model_type is 'i2v', not t2v"),
        (own_folder, {"num_heads": 0}, "not the config of a Wan"),
    ]
    for number, (source, change, message) in enumerate(cases):
        with pytest.raises(ScdError, match=message):
            read_transformer(copied(source, tmp_path / str(number), **change))
    with pytest.raises(ScdError, match="holds neither transformer/ nor Wan"):
        read_transformer(tmp_path)
    (second := copied(folder, tmp_path / "two") / "transformer_2").mkdir()
    (second / "config.json").write_text("{}")
    with pytest.raises(ScdError, match="two: has two transformers"):
        read_transformer(second.parent)
    for change in ({"latents_mean": [0.0, 1.0]}, {"temperal_downsample": [True]}):
        other = copied(folder, tmp_path / min(change))
        config = other / "vae/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        with pytest.raises(ScdError, match=r"vae(/config\.json: latents_mean|: announces)"):
            read_autoencoder(other)
    doubled = copied(folder, tmp_path / "doubled")
    shard = min((doubled / "transformer").glob("*.safetensors"))
    save_file(load_file(shard), shard.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ScdError, match="is in another weight file"):
        read_transformer(doubled)
    vae = doubled / "vae/diffusion_pytorch_model.safetensors"
    broken = load_file(vae)
    broken["decoder.conv_in.bias"][0] = torch.nan
    save_file(broken, vae)
    with pytest.raises(ScdError, match=r"vae: decoder\.conv_in\.bias is not finite"):
        read_autoencoder(doubled)
    vae.unlink()
    with pytest.raises(ScdError, match=r"vae/diffusion_pytorch_model\*\.safetensors: no such file"):
        read_autoencoder(doubled)
    (own := copied(own_folder, tmp_path / "own") / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(ScdError, match=r"neither vae/ nor Wan2\.1_VAE\.pth"):
        read_autoencoder(own.parent)


def test_mistakes_are_one_line(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for arguments, message in (
        ([str(folder), "--out", "mine"], "mine exists and holds no converted model"),
        (["no folder", "--out", "x"], "no folder: no such folder in"),
        (
            [str(folder), "--out", "x"],
            "an encoder of 1 and a decoder of 5 + 5 layers: this Wan has 4",
        ),
        (
            [str(folder), "--out", "x", "--type", "causal", "--encoder-frame", "noise"],
            "--encoder-frame does not belong to --type causal",
        ),
        (
            [str(folder), "--out", "x", "--type", "causal", "--num-actions", "-1"],
            "num_actions is -1",
        ),
        ([str(folder), "--out", "x", "--weights", "y.pt"], "y.pt: no such file"),
    ):
        assert main(["wan", "convert", *arguments]) == 1
        captured = capfd.readouterr().err
        assert captured.startswith("error: ") and captured.count("\n") == 1
        assert message in captured
    assert not (tmp_path / "x").exists()


def test_a_run_of_training_is_not_replaced(folder, tmp_path):
    """It has an options.yml as a converted model does."""
    weights = tmp_path / "run/checkpoints/step-00001000/ema.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    (tmp_path / "run/options.yml").write_text("name: run\n")
    assert main(["wan", "convert", str(folder), *SIZES, "--out", str(tmp_path / "run")]) == 1
    assert weights.exists()


def test_by_default_every_block_is_used(tmp_path):
    model = SCDWan.from_wan(tiny_wan(num_layers=12))
    assert (model.config.encoder_layers, model.config.decoder_last) == (7, 5)
    with pytest.raises(ScdError, match=r"an encoder of 13 and a decoder of 5 \+ 5 layers"):
        SCDWan.from_wan(tiny_wan(num_layers=12), encoder_layers=13)


@pytest.mark.parametrize("format", ["folder", "own_folder"])
def test_from_the_hub(format, request, server: Hub, wan, tmp_path, capsys):  # noqa: F811
    """Only what is needed is downloaded, and nothing is left of it."""
    folder = request.getfixturevalue(format)
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    server.files["someone/Wan"] = files | {
        "text_encoder/model.safetensors": b"large",
        "models_t5_umt5-xxl-enc-bf16.pth": b"large",
        "README.md": b"text",
    }
    out = tmp_path / "models/causal"
    convert("someone/Wan", out, CausalWan.from_wan, endpoint=server.url)
    model = CausalWan.from_pretrained(out / "transformer", use_safetensors=True)
    assert_equal(model.state_dict(), wan.state_dict())
    fetched = {
        path.rpartition("/resolve/")[2] for _, path, _ in server.requests if "resolve" in path
    }
    assert not any("text_encoder" in path or "t5" in path or "README" in path for path in fetched)
    assert not list(tmp_path.rglob("*.pth")) and len(list(tmp_path.rglob("*.safetensors"))) == 2
    with pytest.raises(ScdError, match=r"someone/Other: not found on .*404"):
        convert("someone/Other", tmp_path / "x", CausalWan.from_wan, endpoint=server.url)
    server.files["someone/Else"] = {"README.md": b"text"}
    with pytest.raises(ScdError, match="holds no Wan"):
        convert("someone/Else", tmp_path / "x", CausalWan.from_wan, endpoint=server.url)
    server.files["someone/Two"] = files | {"transformer_2/config.json": b"{}"}
    with pytest.raises(ScdError, match="someone/Two: has two transformers"):
        convert("someone/Two", tmp_path / "x", CausalWan.from_wan, endpoint=server.url)


def test_a_download_needs_room_for_what_is_made_of_it(
    folder,
    server: Hub,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    server.files["someone/Wan"] = files
    free = SimpleNamespace(free=hub.RESERVE_BYTES + 2 * sum(map(len, files.values())))
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ScdError, match=r"someone/Wan: needs .* but only .* are free"):
        convert("someone/Wan", tmp_path / "x", CausalWan.from_wan, endpoint=server.url)
    assert not any("resolve" in path for _, path, _ in server.requests)
