"""`SCDPipeline` as a diffusers pipeline."""

import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.utils import hub_utils as diffusers_hub
from huggingface_hub.errors import LocalEntryNotFoundError

from scd import pipeline as pipelines
from scd.errors import ScdError
from scd.models.autoencoder import LatentCodec, PixelCodec, load_codec
from scd.options import RolloutOptions, load_options
from scd.pipeline import SCDPipeline
from scd.rollout import continue_videos, generate
from tests.test_model import make_model


@pytest.fixture(scope="module")
def pipeline(tiny_autoencoder_path):
    codec = load_codec(str(tiny_autoencoder_path))
    pipeline = SCDPipeline(transformer=make_model(channels=8), vae=codec.autoencoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments():
    video = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    actions = torch.tensor([[0, 1, 2, 1, 0], [1, 1, 0, 2, 2]])
    return video, {"actions": actions, "num_frames": 2, "num_inference_steps": 2}


def test_equals_generate(pipeline):
    video, given = arguments()
    seeds = [torch.Generator().manual_seed(i) for i in (3, 4)]
    frames = pipeline(video, generator=seeds, guidance_scale=1.0, **given).frames
    assert frames.shape == (2, 5, 3, 64, 64)
    assert torch.equal(frames[:, :3], video)
    codec = LatentCodec(pipeline.vae)
    new = generate(
        pipeline.transformer,
        codec.encode(video),
        actions=given["actions"],
        num_frames=2,
        num_steps=2,
        generator=[torch.Generator().manual_seed(i) for i in (3, 4)],
    )
    assert (frames[:, 3:] - codec.decode(new)).abs().max() < 1e-5


def test_save_and_load(pipeline, tmp_path):
    settings = {"steps": 3, "guidance": "none", "solver": "multistep", "window": 2}
    pipeline = SCDPipeline(pipeline.transformer, pipeline.vae, settings)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert "model_index.json" in names
    assert "transformer/diffusion_pytorch_model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    loaded = SCDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    video, given = arguments()
    del given["num_inference_steps"]
    one, other, explicit, fewer = (
        p(video, generator=torch.Generator().manual_seed(0), **given, **changes).frames
        for p, changes in (
            (pipeline, {}),
            (loaded, {}),
            (loaded, {"num_inference_steps": 3, "solver": "multistep"}),
            (loaded, {"num_inference_steps": 2}),
        )
    )
    assert torch.equal(one, other) and torch.equal(one, explicit)
    assert not torch.equal(one, fewer)
    assert loaded.transformer.config.num_conditions == 3


def test_sampler_of_a_distilled_model_is_saved(tmp_path):
    """What the pipeline makes after loading is what the engine makes with these settings."""
    settings = RolloutOptions(2, "consistency", "even", 5.0, 3, guidance="none")
    pixel = SCDPipeline(make_model(channels=3, patch_size=16), None, asdict(settings))
    pixel.save_pretrained(tmp_path)
    loaded = SCDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    video, given = arguments()
    del given["num_inference_steps"]
    seeds, same = ([torch.Generator().manual_seed(i) for i in (3, 4)] for _ in range(2))
    frames = loaded(video, generator=seeds, **given).frames[:, 3:]
    new = continue_videos(
        pixel.transformer, settings, PixelCodec().encode(video), 2, given["actions"], generator=same
    )
    assert torch.equal(frames, PixelCodec().decode(new))
    euler = loaded(video, generator=torch.Generator().manual_seed(3), solver="euler", **given)
    assert (frames - euler.frames[:, 3:]).abs().max() > 0.01


def test_pixel_space_and_numpy(tmp_path):
    pixel = SCDPipeline(transformer=make_model(channels=3, patch_size=16))
    pixel.set_progress_bar_config(disable=True)
    pixel.save_pretrained(tmp_path)
    loaded = SCDPipeline.from_pretrained(tmp_path)
    assert loaded.vae is None
    video, given = arguments()
    frames = video.mul(255).byte().movedim(2, -1).numpy()
    out = pixel(frames, output_type="np", **given).frames
    assert isinstance(out, np.ndarray)
    assert out.shape == (2, 5, 64, 64, 3)
    assert np.allclose(out[:, :3], frames / 255, rtol=0, atol=1e-6)
    as_tensor = pixel(torch.from_numpy(frames).movedim(-1, 2), output_type="np", **given).frames
    assert np.array_equal(as_tensor[:, :3], out[:, :3])
    again = pixel(out[:, :3], output_type="np", **given).frames  # what came out goes in
    assert np.array_equal(again[:, :3], out[:, :3])
    turned = frames[..., ::-1]  # from BGR: strides below 0
    both = [
        pixel(one, generator=torch.Generator().manual_seed(0), **given).frames
        for one in (turned.copy(), turned)
    ]
    assert torch.equal(*both)
    for kind in (np.int64, object):
        with pytest.raises(ScdError, match=f"{kind.__name__}, not uint8 or floats"):
            pixel(frames.astype(kind), **given)


def test_actions_of_any_kind(pipeline):
    """Lists, arrays, small integers; of one video, a flat list."""
    video, given = arguments()
    frames = [
        pipeline(video[:1], generator=torch.Generator().manual_seed(0), **{**given, "actions": a})
        for a in (
            given["actions"][:1],
            given["actions"][0].tolist(),
            given["actions"][:1].numpy().astype(np.uint8),
            given["actions"][:1].to(torch.int8),
        )
    ]
    assert all(torch.equal(one.frames, frames[0].frames) for one in frames)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_pixels_are_decoded_in_the_precision_of_the_rollout(pipeline, precision, dtype):
    video, given = arguments()
    seen = []
    hook = pipeline.vae.decoder.conv_out.register_forward_hook(
        lambda module, args, out: seen.append(out.dtype)
    )
    try:
        pipeline(video, **given, precision=precision)
    finally:
        hook.remove()
    assert set(seen) == {dtype}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v * 2 - 1, r"values from -\S+ to \S+: floats must lie in \[0, 1\]"),
        (lambda v: v * 255, r"values from .* to 25\d"),
        (lambda v: v.masked_fill(v > 0.99, float("nan")), "values from nan"),
        (lambda v: v[..., :60], "frames of 64x60, which 16 does not divide"),
        (lambda v: v.numpy().tolist(), "a list, not a tensor"),
    ],
)
def test_videos_that_are_refused(pipeline, change, message):
    video, given = arguments()
    with pytest.raises(ScdError, match=message):
        pipeline(change(video), **given)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([[0, 1], [1, 1, 0]], "not numbers of shape"),
        (torch.rand(2, 5), "float32, not integers"),
        (torch.ones(2, 5, dtype=torch.bool), "bool, not integers"),
        ([["left"] * 5] * 2, "not numbers"),
        (torch.full((2, 5), 9), r"conditions must lie in 0\.\.3"),
    ],
)
def test_actions_that_are_refused(pipeline, actions, message):
    video, given = arguments()
    with pytest.raises(ScdError, match=message):
        pipeline(video, **{**given, "actions": actions})


def test_what_is_pushed_can_be_played(tmp_path, monkeypatch):
    """`options.yml` is pushed too, even by a pipeline that was loaded."""
    pushed = {}

    def upload(self, folder, *args, **kwargs):
        pushed.update({p.name: p.read_text() for p in Path(folder).glob("*.yml")})

    monkeypatch.setattr(SCDPipeline, "_upload_folder", upload)
    made = SimpleNamespace(repo_id="x", save=lambda path: None)
    for asks_the_hub in ("create_repo", "load_or_create_model_card", "populate_model_card"):
        monkeypatch.setattr(diffusers_hub, asks_the_hub, lambda *a, **k: made)
    shipped = Path(__file__).parent.parent / "assets/pretrained/scd_doom"
    older = tmp_path / "older"  # the same with the names of their time
    shutil.copytree(shipped, older)
    for file in (older / "options.yml", older / "model_index.json"):
        text = file.read_text()
        for new, old in (("sink_frames", "window_first"), ("discriminator_lr", "adversary_lr")):
            assert new in text
            text = text.replace(new, old)
        file.write_text(text)
    pipe = SCDPipeline.from_pretrained(older)
    assert pipe.config.rollout["sink_frames"] == 0 == pipe.config.options["rollout"]["sink_frames"]
    assert "adversary_lr" not in pipe.config.options["optim"]
    pipe.push_to_hub("someone/scd_doom")
    path = tmp_path / "options.yml"
    path.write_text(pushed["options.yml"])
    assert load_options(path) == load_options(shipped / "options.yml")


def test_a_name_on_the_hub_is_fetched_and_loaded_as_a_folder(tmp_path, monkeypatch):
    SCDPipeline(make_model(channels=3, patch_size=16)).save_pretrained(tmp_path)
    asked = []

    def fetch(name, allow_patterns, **how):
        assert allow_patterns == ["*.json", "*.md", "*.safetensors", "*.yml"]
        asked.append((name, how))
        return str(tmp_path)

    monkeypatch.setattr(pipelines, "snapshot_download", fetch)
    loaded = SCDPipeline.from_pretrained("someone/model", revision="v1", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert asked == [("someone/model", {"revision": "v1"})]
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "transformer/diffusion_pytorch_model.bin"
    )
    with pytest.raises(OSError, match="safetensors"):  # no pickle in its place
        SCDPipeline.from_pretrained("someone/model")
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ScdError, match="someone/model: holds no pipeline"):
        SCDPipeline.from_pretrained("someone/model")


def test_a_name_that_cannot_be_fetched_is_one_clear_line(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("nothing in the cache\nat all") from OSError("no network")

    monkeypatch.setattr(pipelines, "snapshot_download", offline)
    with pytest.raises(ScdError) as refused:
        SCDPipeline.from_pretrained("someone/model")
    line = str(refused.value)
    assert line.startswith("someone/model: no such folder, and it cannot be fetched from the hub")
    assert "(OSError: no network): check the name" in line and "\n" not in line


def test_a_model_is_not_offloaded(pipeline):
    for refuse in (pipeline.enable_model_cpu_offload, pipeline.enable_sequential_cpu_offload):
        with pytest.raises(ScdError, match="cannot offload"):
            refuse()


def test_refusals(pipeline):
    video, given = arguments()
    with pytest.raises(ScdError, match=r"expected \(B, K, 3, H, W\)"):
        pipeline(video[0], **given)
    with pytest.raises(ScdError, match="actions have shape"):
        pipeline(video, **{**given, "num_frames": 3})
    with pytest.raises(ScdError, match="output_type"):
        pipeline(video, output_type="pil", **given)
    with pytest.raises(ScdError, match=r"rollout\.steps must be above 0, but is 0"):
        pipeline(video, **{**given, "num_inference_steps": 0})
    with pytest.raises(ScdError, match="the lowest and the highest noise level"):
        pipeline(video, guidance_interval=[0.7, 0.3], **given)
    unguided = {"guidance": "none", "guidance_scale": 1.0}
    off = SCDPipeline(pipeline.transformer, pipeline.vae, unguided)
    for changes, message in (
        ({"guidance_scale": 5.0}, "guidance_scale=5 does nothing with guidance='none'"),
        ({"guidance": "context"}, "does nothing with guidance_scale=1"),
        ({"steps": 4.5}, "rollout"),
        ({"window": None}, "rollout"),
        ({"solver": "eulr"}, "did you mean 'euler'"),
    ):
        with pytest.raises(ScdError, match=message):
            off.settings(**changes)
    assert off.settings(guidance="context", guidance_scale=1.5, guidance_interval=(0.0, 0.5))
    assert off.settings(guidance="none", guidance_scale=1.5).guidance == "none"
    numbers = {"steps": np.int64(3), "temperature": np.float64(0.5)}
    assert off.settings(**numbers) == off.settings(steps=3, temperature=0.5)
    interval = off.settings(guidance_interval=np.array([0.0, 0.5]))
    assert interval == off.settings(guidance_interval=torch.tensor([0.0, 0.5]))
    with pytest.raises(ScdError, match=r"rollout\.steps takes a single value"):
        off.settings(steps=np.array([1, 2]))
    with pytest.raises(ScdError, match=r"unknown key 'rollout\.strid'"):
        SCDPipeline(pipeline.transformer, pipeline.vae, {"strid": 1})
    with pytest.raises(ScdError, match="unknown setting 'guidance_weight'; known: steps, solver"):
        pipeline(video, guidance_weight=2.0, **given)
