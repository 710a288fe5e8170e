"""Codecs and the two stages of an autoencoder's training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from scd.data.lists import read_list, write_list
from scd.errors import ScdError
from scd.models.autoencoder import (
    Codec,
    LatentCodec,
    PixelCodec,
    autoencoder_hash,
    build_autoencoder,
    encode_alike,
    encoder_hash,
    load_codec,
)
from scd.models.discriminator import DETAIL_GAIN, PatchDiscriminator, haar_bands
from scd.models.load import build_world_model, load_checkpoint_for_use
from scd.options import AutoencoderOptions, Options, load_options
from scd.pipeline import SCDPipeline, pipeline_of
from scd.rollout import Rollout
from scd.training.autoencoder_objective import (
    DecoderObjective,
    ReconstructionLoss,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    last_layer,
)
from scd.training.autoencoder_task import AutoencoderTask, Predictor
from scd.training.checkpoint import latest_checkpoint, load_checkpoint
from scd.training.ema import averaged_tensors
from scd.training.run_log import read_log
from scd.utils.seeding import generator
from tests.test_model import make_model
from tests.test_training import ROOT, assert_same_state, train

WORLD_MODEL = ["task=world_model", "model.encoder_layers=1", "model.decoder_layers=1"]


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def kl_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A variational autoencoder of random weights: 4 latent channels, 4x downsampling."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kl")
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def options(doom_root, tiny_autoencoder_path, tmp_path):
    def make(*overrides: str) -> Options:
        small = [
            f"data.root={doom_root}",
            f"output_root={tmp_path}",
            f"autoencoder.path={tiny_autoencoder_path}",
            "autoencoder.lpips_weight=0",
            "data.frame_stride=9",
            "discriminator.channels=8",
            "optim.warmup_steps=0",
            "train.steps=4",
            "train.batch_size=2",
            "train.workers=0",
            "train.save_every=2",
            "train.sample_every=0",
            "train.log_every=1",
            "train.mixed_precision=fp32",
            "eval.videos=2",
        ]
        return load_options(ROOT / "options/dcae_doom_adversarial.yml", [*small, *overrides])

    return make


# Codecs


def test_a_folder_copied_without_what_its_links_point_to_is_reported(
    tmp_path, tiny_autoencoder_path
):
    shared, folder = tmp_path / "shared", tmp_path / "vae"
    shutil.copytree(tiny_autoencoder_path, shared)
    folder.mkdir()
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    for name in names:
        (folder / name).symlink_to(Path("../shared") / name)
    load_codec(str(folder))
    for name in reversed(names):
        (shared / name).unlink()
        with pytest.raises(ScdError, match=rf"{name}: .*a link to \.\./shared/{name}.*cp -rL"):
            load_codec(str(folder))
    with pytest.raises(ScdError, match=r"a link to .*cp -rL"):
        encoder_hash(str(folder))
    (tmp_path / "linked").symlink_to(tmp_path / "gone")
    with pytest.raises(ScdError, match=rf"{tmp_path}/linked is a link to {tmp_path}/gone"):
        load_codec(str(tmp_path / "linked"))


@pytest.mark.parametrize("at", ["", "https://huggingface.co/", "hf://"])
def test_a_name_on_the_hub_is_refused_with_how_to_fetch_it(at):
    with pytest.raises(ScdError) as caught:
        load_codec(f"{at}stabilityai/sd-vae-ft-mse")
    told = "hf download stabilityai/sd-vae-ft-mse --local-dir FOLDER, then autoencoder.path=FOLDER"
    assert told in str(caught.value)


@torch.no_grad()
def test_a_variational_autoencoder_is_a_codec(kl_path, tmp_path):
    codec = load_codec(kl_path)
    assert isinstance(codec, LatentCodec)
    assert (codec.channels, codec.downsampling) == (4, 4)
    video = torch.rand(2, 3, 3, 16, 16)
    images = video.flatten(0, 1)
    mode = codec.autoencoder.encode(images * 2 - 1).latent_dist.mode()
    assert torch.allclose(codec.encode_images(images), mode, atol=1e-5)
    latents = codec.encode(video)
    assert latents.shape == (2, 3, 4, 4, 4)
    torch.testing.assert_close(latents.flatten(0, 1), (mode - 0.25) * 0.5)
    decoded = codec.autoencoder.decode(mode).sample
    expected = ((decoded + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(codec.decode(latents).flatten(0, 1), expected)


@torch.no_grad()
def test_a_mean_and_a_deviation_for_every_channel(kl_path, tmp_path):
    """`latents_mean` and `latents_std`, as newer configs of diffusers have them."""
    folder = tmp_path / "kl"
    shutil.copytree(kl_path, folder)
    config = json.loads((folder / "config.json").read_text())
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    numbers = {"latents_mean": mean, "latents_std": std, "shift_factor": None}
    (folder / "config.json").write_text(json.dumps({**config, **numbers}))
    codec = load_codec(str(folder))
    video = torch.rand(1, 2, 3, 16, 16)
    mode = codec.encode_images(video[0])
    latents = codec.encode(video)[0]
    for channel in range(4):
        expected = (mode[:, channel] - mean[channel]) * 0.5 / std[channel]
        torch.testing.assert_close(latents[:, channel], expected)
    decoded = (codec.autoencoder.decode(mode).sample + 1) / 2
    torch.testing.assert_close(codec.decode(latents[None])[0], decoded.clamp(0, 1))
    for wrong in ([0.1, 0.2], [0.1, 0.2, 0.3, "x"], 1.0):
        (folder / "config.json").write_text(json.dumps({**config, "latents_mean": wrong}))
        with pytest.raises(ScdError, match=r"latents_mean is .*, not a number a channel"):
            load_codec(str(folder))


@torch.no_grad()
def test_a_decoder_that_is_trained_on_keeps_the_latents(kl_path, tmp_path):
    """So nothing has to be encoded again after the decoder's stage."""
    autoencoder = load_codec(kl_path).autoencoder

    def hashes() -> tuple[str, str]:
        autoencoder.save_pretrained(tmp_path)
        return autoencoder_hash(str(tmp_path)), encoder_hash(str(tmp_path))

    whole, encoder = hashes()
    autoencoder.post_quant_conv.bias += 1
    of_decoder = hashes()
    assert of_decoder[0] != whole and of_decoder[1] == encoder
    autoencoder.quant_conv.bias += 1
    assert hashes()[1] != encoder
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ScdError, match="not a readable weights file"):
        encoder_hash(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("scaling_factor", 0.25), ("shift_factor", 0.5), ("latents_std", [1.0, 1.0, 2.0, 1.0])],
)
def test_latents_of_another_scale_are_others(kl_path, tmp_path, key, value):
    """And those of another decoder alone are the same."""
    codec = load_codec(kl_path)
    with torch.no_grad():
        codec.autoencoder.post_quant_conv.bias += 1
    assert encode_alike(codec, load_codec(kl_path))
    codec.autoencoder.register_to_config(**{key: value})
    codec.autoencoder.save_pretrained(tmp_path)
    assert not encode_alike(load_codec(kl_path), load_codec(str(tmp_path)))


def test_a_hash_tells_types_and_shapes_of_equal_bytes_apart(tmp_path):
    hashes = set()
    for tensor in (torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32)):
        save_file({"encoder.weight": tensor}, tmp_path / "diffusion_pytorch_model.safetensors")
        hashes.add(encoder_hash(str(tmp_path)))
    assert len(hashes) == 3


def test_a_pipeline_keeps_a_variational_autoencoder(kl_path, tmp_path):
    vae = load_codec(kl_path).autoencoder
    SCDPipeline(transformer=make_model(channels=4), vae=vae).save_pretrained(tmp_path)
    loaded = SCDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.vae, AutoencoderKL) and loaded.vae.config.shift_factor == 0.25
    video = torch.rand(1, 2, 3, 16, 16)
    frames = loaded(video, num_frames=1, num_inference_steps=1, guidance="none").frames
    assert frames.shape == (1, 3, 3, 16, 16)


@pytest.mark.parametrize("kind", ["AutoencoderKLWan", None])
def test_other_kinds_of_autoencoders_are_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ScdError, match=r"_class_name is .*, not one of AutoencoderDC, Auto"):
        load_codec(str(tmp_path))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_codec_computes_in_its_precision_whatever_is_around(kl_path, precision, dtype):
    codec = LatentCodec(load_codec(kl_path).autoencoder, precision)
    seen = []
    for part in (codec.autoencoder.encoder, codec.autoencoder.decoder):
        part.conv_out.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for around in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            pixels = codec.decode(codec.encode(torch.rand(1, 1, 3, 16, 16)))
        assert pixels.dtype == torch.float32
    assert set(seen) == {dtype} and len(seen) == 4


def codecs(kl_path: str, tiny_autoencoder_path: str) -> list[Codec]:
    return [PixelCodec(), load_codec(kl_path), load_codec(tiny_autoencoder_path)]


def test_a_clip_of_no_frames_has_latents_of_no_frames(kl_path, tiny_autoencoder_path):
    for codec in codecs(kl_path, tiny_autoencoder_path):
        latents = codec.encode(torch.zeros(2, 0, 3, 32, 48))
        side = codec.downsampling
        assert latents.shape == (2, 0, codec.channels, 32 // side, 48 // side)
        assert codec.decode(latents).shape == (2, 0, 3, 32, 48)


def test_the_decoders_norm_is_an_option():
    stages = {"block_types": ["ResBlock"] * 2, "channels": [8] * 2, "layers": [1] * 2}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stages.items()}
    for norm, count in (("batch_norm", 2), ("rms_norm", 0)):
        built = build_autoencoder(AutoencoderOptions(latent_channels=8, decoder_norm=norm, **sides))
        found = [m for m in built.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(found) == count


def test_the_decoders_norm_is_that_of_its_own_res_blocks():
    kinds = ["ResBlock", "EfficientViTBlock"]
    stages = {"channels": [32] * 2, "layers": [1] * 2}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stages.items()}
    sides |= {"encoder_block_types": kinds[::-1], "decoder_block_types": kinds}
    built = build_autoencoder(
        AutoencoderOptions(latent_channels=8, decoder_norm="batch_norm", **sides)
    )
    found = [name for name, m in built.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert found and all(name.startswith("decoder.up_blocks.0.") for name in found)


# The discriminator's parts


def test_receptive_fields():
    """A logit's gradient reaches as many pixels as promised."""
    for layers, wanted in ((1, 17), (2, 35), (3, 71)):
        images = torch.rand(1, 3, 128, 128, requires_grad=True)
        discriminator = PatchDiscriminator(8, layers)
        plain = (m for m in discriminator.net if not isinstance(m, nn.GroupNorm))  # it sees all
        discriminator.net = nn.Sequential(*plain)
        logits = discriminator(images)
        assert logits.shape[-1] == 128 // 2**layers - 2
        middle = logits.shape[-1] // 2
        (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
        rows = gradient[0].abs().sum(dim=(0, 2)).nonzero().flatten()
        assert int(rows[-1] - rows[0]) + 1 == wanted


def test_wavelet_bands():
    """They hold all of an image; what is smooth is in the coarse one, stripes are in a detail."""
    images = torch.randn(2, 3, 6, 8)
    bands = haar_bands(images)
    assert bands.shape == (2, 12, 5, 7)
    coarse, across, down, diagonal = bands.chunk(4, dim=1)
    torch.testing.assert_close(coarse, avg_pool2d(images, 2, stride=1))
    details = (across, down, diagonal)
    first = coarse + sum(detail / DETAIL_GAIN for detail in details)
    torch.testing.assert_close(first, images[..., :-1, :-1])
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 6, 8)  # 5 x 7 bands of 3 channels
    strength = [float(band.abs().sum()) for band in haar_bands(stripes).chunk(4, dim=1)]
    assert strength == [0, DETAIL_GAIN * 3 * 5 * 7, 0, 0]


def test_the_discriminator_soon_sees_blur():
    """Faint grain is seen within some steps; without the gain, the loss stays at 1."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(16, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, betas=(0.5, 0.9))
    for _ in range(60):
        smooth = interpolate(torch.randn(8, 3, 8, 8), scale_factor=4, mode="bilinear")
        real = smooth + 0.05 * torch.randn(8, 3, 32, 32)
        loss = discriminator_hinge(discriminator(real), discriminator(smooth))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


def test_hinge_losses_and_their_gradients():
    """Logits beyond the margin give no gradient; the generator's is −1/n everywhere."""
    real = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    fake = torch.tensor([-3.0, -0.5, 2.0, 4.0], requires_grad=True)
    loss = discriminator_hinge(real, fake)
    assert loss.item() == pytest.approx(0.5 * ((3 + 0.5 + 0) / 3 + (0 + 0.5 + 3 + 5) / 4))
    loss.backward()
    assert real.grad.tolist() == pytest.approx([-1 / 6, -1 / 6, 0])
    assert fake.grad.tolist() == pytest.approx([0, 1 / 8, 1 / 8, 1 / 8])
    fake.grad = None
    generator_hinge(fake).backward()
    assert fake.grad.tolist() == [-0.25] * 4
    assert float(discriminator_hinge(torch.zeros(3), torch.zeros(3))) == 1


def test_adaptive_weight_by_hand():
    """At w: ∇ Σ(3·w·x) = 3x, ∇ Σ(w·y)² = 2(w·y)y."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.5])
    weight = adaptive_weight(3 * (w @ x), (w @ y) ** 2, w)
    assert float(weight) == pytest.approx(15 / (4 * 1.25**0.5), rel=1e-5)
    assert not weight.requires_grad and w.grad is None
    assert float(adaptive_weight(3 * (w @ x), 0 * (w @ y), w)) == 1e4


@pytest.mark.parametrize("frames", [1, 2])
def test_one_backward_serves_both_sides(tiny_autoencoder_path, frames):
    """The decoder's gradient is that of its own loss alone, the discriminator's that of its.

    The discriminator judges every frame, or pairs of neighbours.
    """
    autoencoder = load_codec(tiny_autoencoder_path).autoencoder
    autoencoder.decoder.requires_grad_(True)
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 2, frames)
    loss = ReconstructionLoss(0, torch.device("cpu"))
    objective = DecoderObjective(autoencoder, loss, discriminator, 0.3, frames)
    batch = {"video": torch.rand(2, 2, 3, 32, 32), "latents": torch.randn(2, 2, 8, 4, 4)}
    values = objective(batch)
    values["loss"].backward()

    images = batch["video"].flatten(0, 1) * 2 - 1
    decoded = autoencoder.decode(batch["latents"].flatten(0, 1)).sample
    clips, decoded_clips = (x.view(4 // frames, -1, 32, 32) for x in (images, decoded))
    l1, generator = (decoded - images).abs().mean(), -discriminator(decoded_clips).mean()
    layer = last_layer(autoencoder)
    norms = [torch.autograd.grad(v, layer, retain_graph=True)[0].norm() for v in (l1, generator)]
    assert float(values["adaptive_weight"]) == pytest.approx(float(norms[0] / norms[1]), rel=1e-3)
    total = l1 + 0.3 * values["adaptive_weight"] * generator
    decoding = list(autoencoder.decoder.parameters())
    for p, g in zip(decoding, torch.autograd.grad(total, decoding), strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    judged = discriminator_hinge(discriminator(clips), discriminator(decoded_clips.detach()))
    judging = list(discriminator.parameters())
    for p, g in zip(judging, torch.autograd.grad(judged, judging), strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in autoencoder.encoder.parameters())


# The stage as an experiment


def test_the_adversarial_stage_resumes_to_the_bit_and_leaves_the_encoder(options, capsys):
    straight = train(options("name=straight", "train.sample_every=4"))
    train(options("name=resumed"), stop_after=3)
    resumed = train(options("name=resumed"))
    assert_same_state(straight, resumed)
    a, b = (load_checkpoint(latest_checkpoint(folder)) for folder in (straight, resumed))
    early = load_checkpoint(straight / "step-00000002")
    for name, tensor in a.critic["model"].items():
        assert torch.equal(tensor, b.critic["model"][name])
        if name.endswith("weight"):
            assert not torch.equal(tensor, early.critic["model"][name])
    moments = [state.critic["optimizer"]["state"] for state in (a, b)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) == len(a.critic["model"])
    for number, values in moments[0].items():
        for key, value in values.items():
            assert torch.equal(value, moments[1][number][key])

    o = options("name=straight")
    given = load_file(Path(o.autoencoder.path) / "diffusion_pytorch_model.safetensors")
    for name, tensor in given.items():
        assert torch.equal(a.model[name], tensor) == name.startswith("encoder."), name
        if name.startswith("encoder."):
            assert torch.equal(a.ema[name], tensor)
    log = read_log(o.output / "log.jsonl")[1:]  # after what it was trained on
    assert {"l1", "generator", "discriminator", "adaptive_weight"} <= log[0].keys()
    assert log[0]["critic_grad_norm"] > 0 and log[0]["grad_norm"] > 0
    assert set(log[-1]["validation"]) >= {"psnr", "ssim"}
    assert (o.output / "samples/step-00000004/reconstructions.png").exists()
    exported, start = (load_codec(str(p)) for p in (o.output / "exported", o.autoencoder.path))
    assert exported.factor == start.factor

    (straight / "step-00000004/adversary.pt").write_bytes(b"")
    assert latest_checkpoint(straight).name == "step-00000002"
    assert "adversary.pt is damaged" in capsys.readouterr().out


def test_the_first_stage_continues_from_given_weights(doom_root, tmp_path):
    def sizes(last: int) -> list[str]:
        values = {
            "block_types": "[ResBlock,ResBlock]",
            "channels": f"[8,{last}]",
            "layers": "[0,1]",
        }
        return [
            f"autoencoder.{s}_{k}={v}" for s in ("encoder", "decoder") for k, v in values.items()
        ]

    def first_stage(name: str, *overrides: str, last: int = 8) -> dict[str, torch.Tensor]:
        small = [
            *(f"data.root={doom_root}", f"output_root={tmp_path}", "autoencoder.lpips_weight=0"),
            *("train.steps=1", "train.batch_size=2", "train.workers=0", "train.sample_every=0"),
            *("optim.warmup_steps=0", "data.frame_stride=9", "train.mixed_precision=fp32"),
            *("eval.videos=2", f"name={name}", *sizes(last), *overrides),
        ]
        o = load_options(ROOT / "options/dcae_doom.yml", small)
        return dict(load_checkpoint(latest_checkpoint(train(o))).model)

    given = first_stage("first")
    weights = f"init_from={tmp_path}/first/checkpoints/step-00000001/model.safetensors"
    continued = first_stage("second", weights, "optim.lr=1e-9", "seed=5")
    other = first_stage("third", "optim.lr=1e-9", "seed=5")
    for name, tensor in given.items():
        torch.testing.assert_close(continued[name], tensor, atol=1e-6, rtol=0)
    assert any(not torch.allclose(other[name], tensor, atol=1e-3) for name, tensor in given.items())
    with pytest.raises(ScdError, match="the model's"):
        first_stage("fourth", weights, last=16)


def test_a_variational_autoencoders_decoder_trains(options, kl_path):
    o = options(f"autoencoder.path={kl_path}", "train.steps=1")
    state = load_checkpoint(latest_checkpoint(train(o)))
    given = load_file(Path(kl_path) / "diffusion_pytorch_model.safetensors")
    changed = {n.split(".")[0] for n, t in given.items() if not torch.equal(state.model[n], t)}
    assert changed == {"decoder", "post_quant_conv"}
    assert isinstance(load_codec(str(o.output / "exported")).autoencoder, AutoencoderKL)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["autoencoder.path=null"], "discriminator.weight=0.5 needs autoencoder.path"),
        (["discriminator.weight=0"], "autoencoder.world_model is null, discriminator.weight is 0"),
        (["init_from=x"], "init_from with autoencoder.path"),
        (["train.gradient_checkpointing=true"], "gradient_checkpointing: only task world_model"),
        (
            ["autoencoder.path=null", "discriminator.weight=0", "autoencoder.world_model=x"],
            "autoencoder.world_model=x needs autoencoder.path",
        ),
        (["autoencoder.world_model=x"], "autoencoder.predicted_frames=3: as many as data.frames=2"),
        (
            ["autoencoder.world_model=x", "data.frames=4", "autoencoder.predicted_frames=2"],
            "discriminator.frames=2 does not divide the decoded frames of a clip",
        ),
        (["discriminator.weight=-1"], "discriminator.weight must not be negative"),
        (["autoencoder.decoder_layers=[1]"], "autoencoder.decoder_layers: the decoder's stage"),
        (["train.compile=true"], "train.compile with discriminator.weight"),
        (["discriminator.channels=12"], "discriminator.channels=12 must be a multiple of 8"),
        (["discriminator.layers=5"], "too many for frames of 64 pixels"),
        (["discriminator.frames=3"], "discriminator.frames=3 does not divide the decoded frames"),
        (WORLD_MODEL, "only task autoencoder has a discriminator"),
        (
            [*WORLD_MODEL, "discriminator.weight=0", "autoencoder.world_model=x"],
            "autoencoder.world_model=x: only task autoencoder trains a decoder",
        ),
        (["autoencoder.latent_channels=8"], "latent_channels: the decoder's stage"),
        (["autoencoder.decoder_norm=batchnorm"], "did you mean 'batch_norm'?"),
    ],
)
def test_contradictory_options_are_refused(options, overrides, complaint):
    with pytest.raises(ScdError) as caught:
        options(*overrides)
    assert complaint in str(caught.value)


def test_sharding_is_refused(options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ScdError, match=r"autoencoder is not sharded.*without fsdp2\.yaml"):
        train(options())


def test_frames_that_do_not_divide_are_refused(options):
    with pytest.raises(ScdError, match=r"data\.frame_size=60 does not divide by 8"):
        train(options("data.frame_size=60"))


# A decoder that learns from predictions


@pytest.fixture
def decoder_options(doom_root, tiny_autoencoder_path, tmp_path):
    """Make options of the stage, with an untrained world model of random weights."""
    codec = load_codec(tiny_autoencoder_path)
    sizes = ["model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"]
    at = [f"data.root={doom_root}", f"autoencoder.path={tiny_autoencoder_path}"]
    o = load_options(ROOT / "options/scd_doom_tiny.yml", [*at, *sizes, "rollout.steps=2"])
    torch.manual_seed(0)
    model = build_world_model(o, codec)
    for parameter in model.parameters():  # what is zero at first would hide the actions
        nn.init.normal_(parameter, std=0.2)
    assert isinstance(codec, LatentCodec)
    pipeline_of(o, model, codec.autoencoder).save_pretrained(tmp_path / "world")

    def make(*overrides: str) -> Options:
        small = [
            *(*at, f"output_root={tmp_path}", f"autoencoder.world_model={tmp_path}/world"),
            *("autoencoder.lpips_weight=0", "data.frames=6", "autoencoder.predicted_frames=2"),
            *("optim.warmup_steps=0", "optim.schedule=constant", "optim.decay_steps=0"),
            *("train.steps=4", "train.batch_size=2", "train.workers=0", "train.save_every=2"),
            *("train.sample_every=0", "train.log_every=1", "train.mixed_precision=fp32"),
            *("eval.videos=2", "name=decoder"),
        ]
        return load_options(ROOT / "options/dcae_doom_decoder.yml", [*small, *overrides])

    return make


def test_a_decoder_gets_the_latents_of_a_rollout(decoder_options):
    """The last given frame and those after it, from their own actions, in one batch or not."""
    o = decoder_options()
    task = AutoencoderTask(o, torch.device("cpu"))
    torch.manual_seed(0)
    video = torch.randint(256, (2, 6, 3, 64, 64), dtype=torch.uint8)
    batch = {"video": video, "actions": torch.tensor([[0, 1, 2, 3, 1, 2]] * 2), "sample": [5, 9]}
    ready = task.prepare(batch)
    assert ready["video"].shape == (2, 3, 3, 64, 64)
    torch.testing.assert_close(ready["video"], video[:, 3:] / 255)

    codec, world = (
        load_codec(o.autoencoder.path),
        load_checkpoint_for_use(Path(str(o.autoencoder.world_model))),
    )
    latents = codec.encode(video / 255)
    rollout = Rollout(world.model, world.options.rollout, 6)
    generators = [generator("cpu", o.seed, "decoder", sample) for sample in (5, 9)]
    rollout.reset(latents[:, :4], batch["actions"][:, :4], None, generators)
    frames = [latents[:, 3], *(rollout.step(batch["actions"][:, i]) for i in (4, 5))]
    expected = torch.stack(frames, dim=1) / codec.factor + codec.shift
    torch.testing.assert_close(ready["latents"], expected, atol=1e-5, rtol=1e-5)

    single = task.prepare({k: v[1:] for k, v in batch.items()})
    torch.testing.assert_close(single["latents"], ready["latents"][1:], atol=1e-4, rtol=1e-4)
    future = video.clone()
    future[:, 4:] = 0  # the pictures that are predicted are seen by the loss alone
    torch.testing.assert_close(
        task.prepare({**batch, "video": future})["latents"], ready["latents"], atol=1e-6, rtol=0
    )
    for last, differs in ((4, [False, True, True]), (5, [False, False, True])):
        actions = batch["actions"].clone()
        actions[:, last] = 0
        other = task.prepare({**batch, "actions": actions})["latents"]
        changed = [not torch.allclose(other[:, i], ready["latents"][:, i]) for i in range(3)]
        assert changed == differs


def test_validation_in_batches_finds_the_same(decoder_options, tmp_path, monkeypatch):
    sizes, found = [], []
    plain = Predictor.continue_clips

    def noted(self, latents, batch):
        sizes.append(len(latents))
        return plain(self, latents, batch)

    monkeypatch.setattr(Predictor, "continue_clips", noted)
    for size in (1, 2):
        task = AutoencoderTask(decoder_options(f"eval.batch_size={size}"), torch.device("cpu"))
        found.append(task.validate(task.network, tmp_path))
    assert sizes == [1, 1, 2]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_predicted_frames_alone_are_compared_with_theirs(
    decoder_options, tmp_path, monkeypatch
):
    """Predicted exactly, they score as their reconstructions do; the given one has no say."""

    def exact(_, latents, batch):
        given, predicted = latents[:, -3:].split([1, 2], dim=1)
        return torch.cat([torch.zeros_like(given), predicted], dim=1)

    monkeypatch.setattr(Predictor, "continue_clips", exact)
    task = AutoencoderTask(decoder_options(), torch.device("cpu"))
    found = task.validate(task.network, tmp_path)["predicted_psnr"]
    codec = LatentCodec(task.network)
    real = torch.cat([clips["video"] for clips in task._validation_clips(6)])[:, 4:]
    with torch.no_grad():
        errors = (codec.decode(codec.encode(real)).clamp(0, 1) - real).square()
    expected = (-10 * errors.mean(dim=(2, 3, 4)).log10()).mean()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_validation_frames_are_of_a_time_of_their_own(decoder_options, doom_root, tmp_path):
    """Also where two are of the same video."""
    own = shutil.copytree(doom_root, tmp_path / "doom")
    write_list(own / "val.json", 2 * read_list(own / "val.json")[:1])
    task = AutoencoderTask(decoder_options(f"data.root={own}"), torch.device("cpu"))
    one, other = task._validation_frames()
    assert not torch.equal(one, other)


@pytest.mark.parametrize("weight", [0, 0.5])
def test_the_decoder_stage_resumes_to_the_bit_and_leaves_the_encoder(decoder_options, weight):
    given = (f"discriminator.weight={weight}", "discriminator.channels=8", "discriminator.frames=3")
    straight = train(decoder_options("name=straight", "train.sample_every=4", *given))
    train(decoder_options("name=resumed", *given), stop_after=3)
    assert_same_state(straight, train(decoder_options("name=resumed", *given)))
    o = decoder_options("name=straight", *given)
    state = load_checkpoint(latest_checkpoint(straight))
    start = load_file(Path(str(o.autoencoder.path)) / "diffusion_pytorch_model.safetensors")
    for name, tensor in start.items():
        assert torch.equal(state.model[name], tensor) == name.startswith("encoder."), name
    last = read_log(o.output / "log.jsonl")[-1]["validation"]
    assert last["psnr"] != last["predicted_psnr"] and 0 < last["predicted_psnr"] < 30
    exported = load_codec(str(o.output / "exported"))
    assert exported.factor == load_codec(o.autoencoder.path).factor
    assert encoder_hash(str(o.output / "exported")) == encoder_hash(o.autoencoder.path)


def test_a_world_model_of_other_latents_or_speed_is_refused(decoder_options, tmp_path):
    with pytest.raises(ScdError, match=r"was trained with data\.frame_stride=1, but here .*=2"):
        AutoencoderTask(decoder_options("data.frame_stride=2"), torch.device("cpu"))
    vae = tmp_path / "world/vae"
    autoencoder = load_codec(str(vae)).autoencoder
    autoencoder.decoder.conv_in.bias.data += 1  # the latents are its encoder's
    autoencoder.double().save_pretrained(vae)  # and the same numbers, however they are stored
    AutoencoderTask(decoder_options(), torch.device("cpu"))
    autoencoder.encoder.conv_in.bias.data += 1
    autoencoder.save_pretrained(vae)
    with pytest.raises(ScdError, match=r"its latents are not those of autoencoder\.path="):
        AutoencoderTask(decoder_options(), torch.device("cpu"))
    with pytest.raises(ScdError, match="nowhere"):
        missing = decoder_options("autoencoder.world_model=nowhere")
        AutoencoderTask(missing, torch.device("cpu"))


# Batch norm and the mean of the weights


def test_running_statistics_are_averaged_like_weights(doom_root, tmp_path):
    """shadow ← shadow + (1 − d)(value − shadow), d = (1 + n)/(10 + n), as for the weights."""
    small = [
        f"data.root={doom_root}",
        f"output_root={tmp_path}",
        "data.frame_stride=9",
        "autoencoder.encoder_channels=[8,8,8,8]",
        "autoencoder.decoder_channels=[8,8,8,8]",
        "autoencoder.decoder_norm=batch_norm",
        "autoencoder.lpips_weight=0",
        "train.steps=3",
        "train.batch_size=2",
        "train.workers=0",
        "train.save_every=1",
        "train.keep_checkpoints=9",
        "train.sample_every=0",
        "eval.videos=2",
    ]
    o = load_options(ROOT / "options/dcae_doom.yml", small)
    folder = train(o)
    network = build_autoencoder(o.autoencoder)
    running = [n for n in network.state_dict() if n.endswith(("running_mean", "running_var"))]
    assert len(running) == 2 * 8
    assert len(averaged_tensors(network)) == len(list(network.parameters())) + len(running)
    states = [load_checkpoint(folder / f"step-{step:08d}") for step in (1, 2, 3)]
    for name in running:
        shadow = states[0].model[name]  # the first step has no past
        for n, state in enumerate(states[1:], 1):
            shadow = shadow + (1 - (1 + n) / (10 + n)) * (state.model[name] - shadow)
        torch.testing.assert_close(states[-1].ema[name], shadow)
        assert not torch.equal(states[-1].ema[name], states[-1].model[name])
    exported = load_codec(str(o.output / "exported")).autoencoder.state_dict()
    for name in running:
        torch.testing.assert_close(exported[name], states[-1].ema[name].half().float())
