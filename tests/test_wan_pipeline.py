"""Text to video: streamed decoding, the pipeline, and `scd wan generate`, on tiny random Wans."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from scd.cli import main
from scd.data.prompts import write_embedding, write_prompt_list
from scd.data.video import VideoFile, VideoWriter, write_video
from scd.errors import ScdError
from scd.evaluation import streams
from scd.options import RolloutOptions
from scd.rollout import Rollout
from scd.utils.seeding import generator
from scd.wan import CausalWan, SCDWan, SCDWanPipeline
from scd.wan.convert import convert
from scd.wan.sampling import load_pipeline
from scd.wan.video_codec import WanCodec
from scd.wan.video_decoder import VideoDecoder
from tests.test_wan import TEXT, disturbed, make, name, tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH, LENGTH = 32, 64, 5
SIZE = {"height": HEIGHT, "width": WIDTH}
FAST = {"steps": 2, "guidance": "none"}
SPLIT = {"encoder_frame": "shift", "fusion": "token_concat", "first_frame": True}
KINDS = [{}, {"chunk_frames": 2}, SPLIT]


def make_vae(**config) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return disturbed(AutoencoderKLWan(**{"base_dim": 2, **config}), 0.05)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return make_vae()


def make_pipeline(config: dict, vae: AutoencoderKLWan, **more) -> SCDWanPipeline:
    pipeline = SCDWanPipeline(make(config), vae, rollout=FAST, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def texts(*seeds: int) -> Tensor:
    return torch.stack([torch.randn(LENGTH, TEXT, generator=seeded(seed)) for seed in seeds])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Decoding


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"base_dim": 3, "num_res_blocks": 1, "temperal_downsample": [True, False, False]},
        {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
        {"latents_mean": [0] * 16, "latents_std": [1] * 16},
        {"dtype": torch.bfloat16},
    ],
    ids=name,
)
def test_streamed_decoding_is_whole_decoding(config):
    """Bit for bit; as streams side by side, too."""
    dtype = {**config}.pop("dtype", torch.float32)
    vae = make_vae(**{k: v for k, v in config.items() if k != "dtype"}).to(dtype)
    latents = torch.randn(2, 5, 16, 4, 6, generator=seeded(3))
    std, mean = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (vae.config.latents_std, vae.config.latents_mean)
    )
    whole = vae.decode((latents.transpose(1, 2) * std + mean).to(dtype)).sample
    whole = (whole.float() + 1) / 2
    decoder, other = VideoDecoder(vae), VideoDecoder(vae)
    pictures = []
    for frame in latents.unbind(1):
        pictures.append(decoder.decode(frame))
        other.decode(frame.flip(0))
    counts = [part.shape[1] for part in pictures]
    assert counts[0] == 1 and len(set(counts[1:])) == 1
    streamed = torch.cat(pictures, dim=1).transpose(1, 2)
    assert torch.equal(streamed, whole)
    if dtype == torch.float32:  # what training decodes its samples with
        assert torch.equal(WanCodec(vae).decode(latents).transpose(1, 2), whole)
    rounded = WanCodec(vae, "bf16").decode(latents).transpose(1, 2)
    assert (rounded - whole).abs().mean() < 0.03
    assert torch.equal(rounded, whole) == (dtype == torch.bfloat16)
    assert 0 <= streamed.min() < 0.4 and 0.6 < streamed.max() <= 1
    assert streamed.diff(dim=2).abs().mean() > 0.01


def test_decoding_is_in_the_type_of_the_weights_under_autocast(vae):
    latents = torch.randn(1, 16, 4, 6, generator=seeded(3))
    expected = VideoDecoder(vae).decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(VideoDecoder(vae).decode(latents), expected)


@torch.no_grad()
def test_encoding_takes_the_mode_and_draws_nothing(vae):
    video, codec = torch.rand(1, 5, 3, HEIGHT, WIDTH, generator=seeded(3)), WanCodec(vae)
    found = codec.encode(video)
    assert torch.equal(codec.encode(video), found)
    mode = vae.encode(video.transpose(1, 2) * 2 - 1).latent_dist.mode().transpose(1, 2)
    assert torch.equal(found, codec.scale(mode))


def test_decoding_keeps_as_much_of_a_long_stream_as_of_a_short_one(vae):
    decoder, kept = VideoDecoder(vae), []
    for number in range(8):
        decoder.decode(torch.randn(1, 16, 4, 6, generator=seeded(number)))
        kept.append(decoder.bytes_kept)
    assert kept[0] > 0 and len(set(kept[2:])) == 1


# --- The pipeline


@pytest.mark.parametrize("config", KINDS, ids=name)
def test_a_call_is_a_rollout_and_the_autoencoder(config, vae):
    pipeline = make_pipeline(config, vae)
    given = {**SIZE, "num_frames": 10, "prompt_embeds": texts(1, 2)}
    seeds = [seeded(3), seeded(4)]
    guided = {"guidance": "condition", "guidance_scale": 3.0, "negative_prompt_embeds": texts(5)}
    frames = pipeline(**given, generator=seeds, **guided).frames
    assert frames.shape == (2, 10, 3, HEIGHT, WIDTH)
    settings = RolloutOptions(steps=2, guidance="condition", guidance_scale=3.0)
    rollout = Rollout(pipeline.transformer, settings, max_frames=4)
    rollout.reset(
        torch.zeros(2, 0, 16, HEIGHT // 8, WIDTH // 8),
        generator=[seeded(3), seeded(4)],
        text=texts(1, 2),
        negative_text=texts(5, 5),
    )
    latents = torch.stack([rollout.step() for _ in range(4)], dim=2)
    std, mean = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (vae.config.latents_std, vae.config.latents_mean)
    )
    with torch.no_grad():
        whole = (vae.decode(latents * std + mean).sample.transpose(1, 2) + 1) / 2
    assert torch.equal(frames, whole[:, :10])
    # A video does not depend on those beside it; random networks enlarge what rounding does.
    alone = pipeline(**{**given, "prompt_embeds": texts(2)}, generator=[seeded(4)], **guided).frames
    assert (alone[0] - frames[1]).abs().max() < 1e-3 < frames.std() / 50
    # One text for all, and channels last.
    array = pipeline(**given, **guided, output_type="np").frames
    assert isinstance(array, np.ndarray) and array.shape == (2, 10, HEIGHT, WIDTH, 3)


def test_a_stream_gives_the_pictures_of_a_call(vae):
    pipeline = make_pipeline(SPLIT, vae)
    given = {**SIZE, "prompt_embeds": texts(1)}
    whole = pipeline(**given, num_frames=11, generator=seeded(2)).frames
    stream = pipeline.stream(**given, num_frames=11, generator=seeded(2))
    parts = list(stream)
    assert [part.shape[1] for part in parts] == [1, 4, 4, 2]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    with pytest.raises(ScdError, match="the video is complete"):
        stream.step()
    rounded = pipeline.stream(**given, num_frames=1, precision="bf16")
    assert rounded.decoder.precision == rounded.rollout.precision == "bf16"
    one = list(pipeline.stream(**given, num_frames=1, generator=seeded(2)))
    assert len(one) == 1 and torch.equal(one[0], whole[:, :1])


@pytest.mark.parametrize("config", KINDS, ids=name)
def test_a_stream_without_end_has_constant_memory(config, vae):
    """Beyond its window the KV cache, the text and the decoder's features stay what they are."""
    pipeline = make_pipeline(config, vae)
    given = {**SIZE, "prompt_embeds": texts(1), "generator": seeded(2)}
    stream = pipeline.stream(**given, window=4, sink_frames=2)
    held, tensors = [], []
    for number in range(12):
        pictures = next(stream)
        assert torch.isfinite(pictures).all() and pictures.shape[1] == (4 if number else 1)
        cache = stream.rollout.cache
        tensors.append((cache.keys.data_ptr(), cache.values.data_ptr()))
        held.append(
            [x.nbytes for x in (cache.keys, cache.values, *cache.text)]
            + [stream.decoder.bytes_kept]
        )
    assert all(sizes == held[2] for sizes in held[2:]) and len(set(tensors)) == 1
    assert cache.frames > cache.window.frames
    # Sink frames stay: of chunks the first one, of an SCD the learned start and two frames.
    with pytest.raises(ScdError, match="without end needs a window"):
        pipeline.stream(**given)


def test_a_prompt_changes_in_the_middle(vae):
    """Before the change the pictures are those of one prompt, behind it they are not."""
    pipeline = make_pipeline(SPLIT, vae)
    given = {**SIZE, "num_frames": 13, "guidance": "condition", "guidance_scale": 2.0}
    given |= {"prompt_embeds": texts(1, 2), "negative_prompt_embeds": texts(3)}

    def frames(change: Tensor | None) -> Tensor:
        stream = pipeline.stream(**given, generator=seeded(4))
        parts = []
        for number in range(4):
            if number == 2 and change is not None:
                stream.set_prompt(prompt_embeds=change)
            parts.append(next(stream))
        return torch.cat(parts, dim=1)

    same, other = frames(None), frames(texts(7))
    assert torch.equal(same[:, :5], other[:, :5])
    assert not torch.equal(same[:, 5:9], other[:, 5:9])
    assert torch.equal(frames(texts(1, 2)), same)
    with pytest.raises(ScdError, match="3 of prompt for 2 videos"):
        frames(texts(1, 2, 3))


def test_actions_steer(vae):
    model = disturbed(SCDWan.from_wan(tiny_wan(), 3, 1, 1, first_frame=True, num_actions=3))
    pipeline = SCDWanPipeline(model, vae, rollout=FAST)
    pipeline.set_progress_bar_config(disable=True)
    given = {**SIZE, "num_frames": 9, "prompt_embeds": texts(1)}
    left, right = (
        pipeline(**given, actions=torch.tensor([[0, 0, last]]), generator=seeded(1)).frames
        for last in (1, 2)
    )
    assert torch.equal(left[:, :5], right[:, :5]) and not torch.equal(left[:, 5:], right[:, 5:])
    frames = pipeline(**given, actions=[[0, 0, 1]], generator=seeded(1)).frames
    tensor = torch.tensor([[0, 0, 1]])
    assert torch.equal(frames, pipeline(**given, actions=tensor, generator=seeded(1)).frames)
    with pytest.raises(ScdError, match=r"actions are torch\.float32, not integers"):
        pipeline(**given, actions=torch.zeros(1, 3))
    with pytest.raises(ScdError, match=r"actions have shape \(1, 2\), expected \(1, 3\)"):
        pipeline(**given, actions=torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("config", KINDS, ids=name)
def test_save_and_load(config, vae, tmp_path):
    settings = {"steps": 3, "guidance": "none", "window": 4}
    options = {"source": "somewhere"}
    pipeline = SCDWanPipeline(make(config), vae, rollout=settings, options=options)
    pipeline.save_pretrained(tmp_path)
    loaded = SCDWanPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(loaded.transformer) is type(pipeline.transformer)
    assert loaded.text_encoder is None and loaded.tokenizer is None
    assert RolloutOptions(**loaded.config.rollout) == RolloutOptions(**settings)
    assert (tmp_path / "options.yml").read_text() == "source: somewhere\n"
    given = {**SIZE, "num_frames": 5, "prompt_embeds": texts(1)}
    for one in (pipeline, loaded):
        one.set_progress_bar_config(disable=True)
    before, after = (p(**given, generator=seeded(2)).frames for p in (pipeline, loaded))
    assert torch.equal(before, after)
    half = SCDWanPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, use_safetensors=True)
    half.set_progress_bar_config(disable=True)
    rounded = half(**given, generator=seeded(2)).frames
    assert half.vae.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert 0 < (rounded - before).abs().mean() < 0.05 < before.std()
    loaded.transformer = pipeline.transformer  # set again, and saved again
    loaded.save_pretrained(tmp_path / "again")
    SCDWanPipeline.from_pretrained(tmp_path / "again", use_safetensors=True)


def test_with_its_text_encoder(vae, tmp_path):
    """Prompts give what their embeddings give; text encoder and tokenizer are saved along."""
    pytest.importorskip("transformers", reason="needs the extra: pip install -e .[wan]")
    from scd.wan.text import load_text_encoder
    from tests.test_wan_text import make_text_encoder

    make_text_encoder(tmp_path / "text")
    tokenizer, encoder = load_text_encoder(str(tmp_path / "text"), torch.device("cpu"))
    encoder = encoder.float()
    pipeline = make_pipeline(SPLIT, vae, text_encoder=encoder, tokenizer=tokenizer)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = SCDWanPipeline.from_pretrained(tmp_path / "saved", use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    embeds = pipeline.encode_prompt(["a &amp;amp; cat", "a dog runs"])
    assert torch.equal(loaded.encode_prompt(["a & cat", "a dog runs"]), embeds)
    given = {**SIZE, "num_frames": 5, "guidance": "condition", "guidance_scale": 3.0}
    found = loaded(["a & cat", "a dog runs"], "grass", **given, generator=seeded(1)).frames
    expected = pipeline(
        **given,
        prompt_embeds=embeds,
        negative_prompt_embeds=pipeline.encode_prompt("grass"),
        generator=seeded(1),
    ).frames
    assert torch.equal(found, expected)
    stream = loaded.stream("a cat", num_frames=9, **SIZE, generator=seeded(1))
    stream.step()
    stream.set_prompt("a dog")


def test_mistakes_are_explained(vae):
    pipeline = make_pipeline(SPLIT, vae)
    good = {**SIZE, "num_frames": 5, "prompt_embeds": texts(1)}
    guided = {"guidance": "condition", "guidance_scale": 2.0}
    for change, message in (
        ({"prompt": "a cat"}, "give either prompt or prompt_embeds"),
        ({"prompt_embeds": None}, "give either prompt or prompt_embeds"),
        ({"prompt": "a cat", "prompt_embeds": None}, "has no text encoder"),
        (guided, "has no text encoder"),
        ({**guided, "negative_prompt_embeds": texts(1, 2)}, "2 of negative_prompt for 1 videos"),
        ({"height": 40}, "pictures of 40x64 .height x width.: 16 must divide"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"steps": 2, "stride": 3}, "unknown setting 'stride'"),
        ({"generator": [seeded(1), seeded(2)]}, "2 generators for 1 videos"),
        ({"output_type": "pil"}, "output_type is 'pil'"),
        ({"prompt_embeds": texts(1)[..., :3]}, r"the text is \(1, 5, 3\)"),
    ):
        with pytest.raises(ScdError, match=message):
            pipeline(**{**good, **change})
    with pytest.raises(ScdError, match="SCDWanPipeline cannot offload"):
        pipeline.enable_model_cpu_offload()


# --- Files


def frames_in(path: Path) -> int:
    try:
        return len(VideoFile(path))
    except ScdError:
        return 0


def test_a_video_in_pieces(tmp_path):
    """As at once; while it is written, and after an interruption, it can be watched."""
    ramp = np.linspace(0, 255, 30 * 64 * 80 * 3).reshape(30, 64, 80, 3).astype(np.uint8)
    write_video(tmp_path / "whole.mp4", ramp, 8)
    path, unfinished = tmp_path / "pieces.mp4", tmp_path / "pieces.part.mp4"
    with VideoWriter(path, 64, 80, 8) as writer:
        writer.write(ramp[:5])
        until = time.monotonic() + 60
        while frames_in(unfinished) < 4:  # ffmpeg works beside
            assert time.monotonic() < until, "the first pictures are not written at once"
            time.sleep(0.1)
        for start in range(5, 30, 4):
            writer.write(ramp[start : start + 4])
    assert not unfinished.exists()
    whole, pieces = VideoFile(tmp_path / "whole.mp4"), VideoFile(path)
    assert len(whole) == len(pieces) == 30 and pieces.fps == 8
    difference = whole.frames(np.arange(30)).astype(int) - pieces.frames(np.arange(30))
    assert np.abs(difference).mean() < 3
    assert (pieces.frames(np.array([17]))[0] == pieces.frames(np.arange(30))[17]).all()
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "x.mp4", 64, 80, 8) as writer:
        writer.write(ramp[:10])
        raise KeyboardInterrupt
    assert not (tmp_path / "x.mp4").exists()
    assert len(VideoFile(tmp_path / "x.part.mp4")) == 10
    with (
        pytest.raises(ScdError, match=r"y\.mp4: ffmpeg cannot write it"),
        VideoWriter(tmp_path / "y.mp4", 64, 80, -1) as writer,
    ):
        writer.write(np.zeros((4000, 64, 80, 3), np.uint8))


# --- Commands


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory) -> Path:
    """What `scd wan convert` makes of a tiny Wan."""
    root = tmp_path_factory.mktemp("wan")
    tiny_wan().save_pretrained(root / "source/transformer")
    vae.save_pretrained(root / "source/vae")
    split = {"encoder_layers": 3, "decoder_first": 1, "decoder_last": 1, "first_frame": True}
    convert(str(root / "source"), root / "scd", lambda wan: SCDWan.from_wan(wan, **split))
    convert(str(root / "source"), root / "causal", CausalWan.from_wan)
    return root


@pytest.fixture(scope="module")
def embeds(tmp_path_factory) -> Path:
    """A folder as `scd wan encode-prompts` writes it."""
    out = tmp_path_factory.mktemp("embeds")
    prompts = ["a cat", "a dog", "a long story of a cat", ""]
    listed = write_prompt_list(out, "tests", 8, "", {prompt: prompt for prompt in prompts})
    for number, prompt in enumerate(prompts):
        write_embedding(out / "embeddings" / listed.files[prompt], texts(number)[0])
    return out


def command(model: Path, embeds: Path, *arguments: str) -> list[str]:
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--prompt-embeds", str(embeds)]
    return ["wan", "generate", str(model), *size, *arguments, "rollout.steps=2"]


@pytest.mark.parametrize("kind", ["scd", "causal"])
def test_generate(kind, folder, embeds, tmp_path, capsys):
    out = tmp_path / "out/video.mp4"
    arguments = ["--prompt", "a cat", "--frames", "7", "--seed", "3", "rollout.precision=fp32"]
    assert main(command(folder / kind, embeds, *arguments, "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert f"{out}: seed 3; first picture after" in printed
    video = VideoFile(out)
    assert len(video) == 7 and video.fps == 16
    frames = video.frames(np.arange(7))
    assert frames.shape == (7, HEIGHT, WIDTH, 3)
    # Its pictures are the pipeline's, as far as the video's coding lets one see.
    pipeline = SCDWanPipeline.from_pretrained(folder / kind, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.cat([texts(0), torch.zeros(1, 3, TEXT)], dim=1)
    negative = torch.cat([texts(3), torch.zeros(1, 3, TEXT)], dim=1)
    expected = pipeline(
        **SIZE,
        num_frames=7,
        num_inference_steps=2,
        generator=generator("cpu", "video", 3),
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        precision="fp32",
    ).frames[0]
    difference = torch.from_numpy(frames).movedim(-1, 1) / 255 - expected
    assert difference.abs().mean() < 0.02 < expected.std()
    assert difference.mean().abs() < 1e-3  # levels are rounded, not cut off


def test_a_pipeline_is_loaded_in_the_precision_of_its_rollouts(folder):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pipeline = load_pipeline(folder / "scd", [f"rollout.precision={precision}"])
        assert pipeline.vae.dtype == pipeline.transformer.dtype == dtype


def test_several_seeds_and_a_later_prompt(folder, embeds, tmp_path):
    out = ["--out", str(tmp_path / "video.mp4")]
    more = ["--prompt", "a cat", "--frames", "9", "--videos", "2", "rollout.guidance=none"]
    more += ["rollout.window=2"]
    assert main(command(folder / "scd", embeds, *more, *out)) == 0
    first, second = (VideoFile(tmp_path / f"video-{i}.mp4").frames(np.arange(9)) for i in (0, 1))
    assert (first != second).any()
    later = ["--then", "1", "a cat", "--then", "5", "a dog"]
    more = [*more[:4], *later, "rollout.guidance=none", "rollout.window=2"]
    assert main(command(folder / "scd", embeds, *more, *out)) == 0
    changed = VideoFile(tmp_path / "video.mp4").frames(np.arange(9))
    difference = np.abs(changed.astype(int) - first).mean(axis=(1, 2, 3))
    assert difference[:5].max() < 1 < difference[5:].min()


def test_generate_with_the_text_encoder(folder, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra: pip install -e .[wan]")
    pytest.importorskip("ftfy", reason="needs the extra: pip install -e .[wan]")
    from tests.test_wan_text import make_text_encoder

    source, out = make_text_encoder(tmp_path / "text"), tmp_path / "video.mp4"
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--frames", "5"]
    arguments = [*size, "--prompt", "a cat", "--text-encoder", str(source), "--out", str(out)]
    assert main(["wan", "generate", str(folder / "scd"), *arguments, "rollout.steps=1"]) == 0
    assert len(VideoFile(out)) == 5


def test_vbench(folder, embeds, tmp_path, capfd):
    """Names, seeds and numbers as VBench's own tool wants them; what is there stays."""
    prompts, extended, out = tmp_path / "all.txt", tmp_path / "long.txt", tmp_path / "videos"
    prompts.write_text("a cat\n\na dog\na cat\n")
    extended.write_text("a long story of a cat\na dog\na long story of a cat\n")
    arguments = ["--vbench", str(prompts), "--out", str(out), "--frames", "5"]
    arguments += ["--extended", str(extended), "--seed", "10", "rollout.guidance=none"]
    # A command that fails before its first video binds the folder to nothing.
    assert main(command(folder / "scd", embeds, *arguments, "--height", "17")) == 1
    assert main(command(folder / "scd", embeds, *arguments)) == 0
    names = {f"{prompt}-{i}.mp4" for prompt in ("a cat", "a dog") for i in range(5)}
    assert {path.name for path in out.iterdir()} == names
    assert "a dog-4.mp4: seed 14;" in capfd.readouterr().out
    about = json.loads((tmp_path / "videos.json").read_text())
    assert about["seed"] == 10 and about["rollout"]["steps"] == 2 and len(about["model"][0]) == 64
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "a cat-2.mp4").unlink()
    assert main(command(folder / "scd", embeds, *arguments)) == 0
    after = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {path.name for path in before if before[path] != after[path]} == {"a cat-2.mp4"}
    # Other settings, another model: nothing is mixed.
    negative = ["--negative-prompt", "a dog"]
    for model, more in (("scd", ["--seed", "11"]), ("scd", negative), ("causal", [])):
        assert main(command(folder / model, embeds, *arguments, *more)) == 1
        assert "were made otherwise" in capfd.readouterr().err
    shutil.copytree(embeds, tmp_path / "embeds")
    changed = json.loads((embeds / "prompts.json").read_text()) | {"text_encoder": "another"}
    (tmp_path / "embeds/prompts.json").write_text(json.dumps(changed))
    shutil.copytree(folder / "scd", tmp_path / "scd")
    vae = tmp_path / "scd/vae/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(vae).items()}, vae)
    for model, texts_in in ((folder / "scd", tmp_path / "embeds"), (tmp_path / "scd", embeds)):
        assert main(command(model, texts_in, *arguments)) == 1
        assert "were made otherwise" in capfd.readouterr().err
    # What an earlier version wrote says less, and is gone on with.
    lines = json.loads((tmp_path / "videos.json").read_text())
    del lines["autoencoder"], lines["text_encoder"]
    (tmp_path / "videos.json").write_text(json.dumps(lines))
    # Another process makes one of the videos that are missing.
    for number in (2, 3):
        (out / f"a cat-{number}.mp4").unlink()
    code = "import sys, time; from pathlib import Path; from scd.utils.locks import claim\n"
    code += "with claim(Path(sys.argv[1]), sys.argv[2]) as mine: "
    code += "print(mine, flush=True); time.sleep(60)"
    held = [sys.executable, "-c", code, str(tmp_path / "videos.lock"), "a cat-3.mp4"]
    with subprocess.Popen(held, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"True\n"
        assert main(command(folder / "scd", embeds, *arguments)) == 0
        other.kill()
    assert (out / "a cat-2.mp4").exists() and not (out / "a cat-3.mp4").exists()
    assert "left to other processes: 1" in capfd.readouterr().out
    assert main(command(folder / "scd", embeds, *arguments)) == 0
    assert {path.name for path in out.iterdir()} == names


def test_mistakes_of_commands_are_one_line(folder, embeds, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("slash.txt").write_text("a cat/dog")
    Path("one.txt").write_text("a cat")
    Path("two.txt").write_text("a cat\na dog")
    (tmp_path / "other").mkdir()
    Path("other/model_index.json").write_text('{"_class_name": "SCDPipeline"}')
    Path("birds.txt").write_text("a cat\na bird")
    (tmp_path / "old").mkdir()
    Path("old/a cat-0.mp4").write_bytes(b"made before")
    shutil.copytree(folder / "scd", tmp_path / "thin")
    config = json.loads(Path("thin/transformer/config.json").read_text())
    config["encoder_layers"] += 1
    Path("thin/transformer/config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "scd", tmp_path / "pickled")
    weights = Path("pickled/vae/diffusion_pytorch_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    good = ["--out", "x.mp4", "--prompt", "a cat"]
    model = folder / "scd"
    for where, arguments, message in (
        (tmp_path / "no", good, "no: no such file or folder"),
        (tmp_path, good, "neither a folder with a model_index.json"),
        (tmp_path / "thin", good, "weights lack encoder.blocks.3.attn1"),
        (tmp_path / "pickled", good, "pickled: not a readable pipeline of a Wan"),
        (tmp_path / "other", good, "a pipeline of another kind (SCDPipeline), not of a Wan"),
        (model, ["--out", "x.avi", "--prompt", "a cat"], "x.avi: videos are mp4 files"),
        (model, ["--out", "x.mp4", "--prompt", "a bird"], "has no prompt 'a bird'"),
        (model, [*good, "--then", "x", "a dog"], "--then x: give the number of a picture"),
        (model, [*good, "--then", "81", "a dog"], "--then 81: the video ends before"),
        (model, [*good, "--fps", "0"], "--fps must lie between 0.1 and 1000, not 0.0"),
        (model, [*good, "--out", __file__ + "/x/y.mp4"], "test_wan_pipeline.py is a file, not a"),
        (model, [*good, "--videos", "0"], "--videos must be at least 1"),
        (model, ["--out", "other", "--prompt", "a cat"], "other: a folder: give the name"),
        (model, ["--out", "one.txt", "--vbench", "one.txt"], "one.txt: a file: with --vbench"),
        (model, ["--out", "x", "--vbench", "birds.txt"], "no embedding of 1 prompts"),
        (
            model,
            ["--out", "x", "--vbench", "two.txt", "--extended", "birds.txt"],
            "no embedding of 1 prompts, such as 'a bird'",
        ),
        (
            model,
            ["--out", "x", "--vbench", "one.txt", "--negative-prompt", "blurry"],
            "no embedding of 1 prompts, such as 'blurry'",
        ),
        (model, ["--out", "old", "--vbench", "one.txt"], "old.json: is missing"),
        (model, [*good, "--extended", "one.txt"], "--extended belongs to --vbench"),
        (model, [*good, "--videos", "-1"], "--videos must be at least 1"),
        (model, [*good, "optim.lr=1"], "only options of rollout can be changed"),
        (model, [*good, "rollout.stepz=1"], "did you mean 'rollout.steps'"),
        (model, [*good, "rollout.steps=many"], "rollout.steps=many"),
        (model, [*good, "rollout.sink_frames=3"], "sink_frames"),
        (model, ["--out", "x", "--vbench", "slash.txt"], "cannot be a file's name"),
        (
            model,
            ["--out", "x", "--vbench", "two.txt", "--extended", "one.txt"],
            "1 lines for the 2",
        ),
    ):
        assert main(command(where, embeds, *arguments)) == 1
        captured = capfd.readouterr().err
        last = captured.splitlines()[-1]
        assert last.startswith("error: ") and message in last, captured
    assert not list(tmp_path.glob("x*")) and not Path("one.txt.json").exists()
    assert main(["wan", "measure", "empty"]) == 1
    assert "no videos (mp4) to measure" in capfd.readouterr().err


def test_measure(tmp_path, capsys):
    """A video that blurs, comes to rest and turns red; one that stays as it is."""
    noise = np.random.default_rng(0).integers(64, 192, (16, 64, 80, 3)).astype(np.float32)
    fading = noise.copy()
    fading[8:] = 128 + (fading[8:] - 128) / 4
    fading[8:, ..., 0] += 40
    for stem, video in (("steady", noise), ("fading", fading)):
        write_video(tmp_path / f"{stem}.mp4", video.astype(np.uint8), 16, crf=0)
    for unfinished in ("x.part.mp4", ".x.4711.mp4"):
        (tmp_path / unfinished).write_bytes(b"")
    assert main(["wan", "measure", str(tmp_path), "--windows", "2"]) == 0
    found = json.loads((tmp_path / "streams.json").read_text())
    assert set(found) == {"steady.mp4", "fading.mp4"}
    for key in ("sharpness", "motion"):
        assert found["steady.mp4"][key] == pytest.approx([1, 1], abs=0.03)
        assert found["fading.mp4"][key] == pytest.approx([1, 0.25], abs=0.03)
    assert found["steady.mp4"]["drift"] == pytest.approx([0, 0], abs=1)
    assert found["fading.mp4"]["drift"] == pytest.approx([0, 40], abs=2)
    printed = capsys.readouterr().out
    assert "sharpness →1" in printed and "| mean" in printed
    assert main(["wan", "measure", str(tmp_path), "--windows", "9"]) == 1
    assert main(["wan", "measure", str(tmp_path), "--windows", "1"]) == 1


def test_videos_are_measured_in_pieces_as_at_once(tmp_path, monkeypatch):
    """The last frame of the first piece is sharper than all others, and counts once."""
    noise = np.random.default_rng(0).integers(0, 64, (20, 32, 64, 3), np.uint8)
    noise[4] *= 4
    write_video(tmp_path / "video.mp4", noise, 16, crf=0)
    monkeypatch.setattr(streams, "FRAMES_AT_ONCE", 5)
    pieces = streams.measure_streams(tmp_path, 2)["video.mp4"]
    monkeypatch.setattr(streams, "FRAMES_AT_ONCE", 10)
    for key, values in streams.measure_streams(tmp_path, 2)["video.mp4"].items():
        assert pieces[key] == pytest.approx(values, rel=1e-4), key


def test_what_convert_writes_is_a_pipeline(folder):
    pipeline = SCDWanPipeline.from_pretrained(folder / "causal", use_safetensors=True)
    assert isinstance(pipeline.transformer, CausalWan)
    assert pipeline.config.rollout == asdict(RolloutOptions(**pipeline.config.rollout))
    rollout = RolloutOptions(**pipeline.config.rollout)  # as Wan is sampled
    assert (rollout.steps, rollout.shift, rollout.guidance_scale) == (50, 5.0, 5.0)
