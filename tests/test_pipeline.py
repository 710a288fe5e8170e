"""`SCDPipeline` in diffusers' own terms."""

import numpy as np
import pytest
import torch

from scd.errors import ScdError
from scd.models.autoencoder import LatentCodec, load_codec
from scd.pipeline import SCDPipeline
from scd.rollout import generate
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
    one, other, said, fewer = (
        p(video, generator=torch.Generator().manual_seed(0), **given, **changes).frames
        for p, changes in (
            (pipeline, {}),
            (loaded, {}),
            (loaded, {"num_inference_steps": 3, "solver": "multistep"}),
            (loaded, {"num_inference_steps": 2}),
        )
    )
    assert torch.equal(one, other) and torch.equal(one, said)
    assert not torch.equal(one, fewer)
    assert loaded.transformer.config.num_conditions == 3


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
    as_tensor = pixel(torch.from_numpy(frames).movedim(-1, 2), output_type="np", **given).frames
    assert np.array_equal(as_tensor[:, :3], out[:, :3])
    again = pixel(out[:, :3], output_type="np", **given).frames  # what came out goes in
    assert np.array_equal(again[:, :3], out[:, :3])
    with pytest.raises(ScdError, match="int64, not uint8 or floats"):
        pixel(frames.astype(np.int64), **given)


def test_refusals(pipeline):
    video, given = arguments()
    with pytest.raises(ScdError, match=r"expected \(B, K, 3, H, W\)"):
        pipeline(video[0], **given)
    with pytest.raises(ScdError, match="actions are"):
        pipeline(video, **{**given, "num_frames": 3})
    with pytest.raises(ScdError, match="output_type"):
        pipeline(video, output_type="pil", **given)
    with pytest.raises(ScdError, match=r"rollout\.steps must be above 0, not 0"):
        pipeline(video, **{**given, "num_inference_steps": 0})
    with pytest.raises(ScdError, match="the lowest and the highest noise level"):
        pipeline(video, guidance_interval=[0.7, 0.3], **given)
    with pytest.raises(ScdError, match="unknown setting 'guidance_weight'; known: steps, solver"):
        pipeline(video, guidance_weight=2.0, **given)
