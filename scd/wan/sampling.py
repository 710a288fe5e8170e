"""Generate videos of prompts into files: one, several seeds of one, or a whole benchmark."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scd.data.prompts import PromptFolder, read_lines
from scd.data.video import VideoWriter
from scd.errors import ScdError, reason
from scd.models.weights import weight_files
from scd.options.reader import change_rollout
from scd.utils.files import MAX_NAME_BYTES, read_json, sha256, write_json
from scd.utils.locks import claim
from scd.utils.paths import from_user, why_missing
from scd.utils.precision import resolve_precision, with_weights_in
from scd.utils.seeding import generator
from scd.wan.from_options import options_in
from scd.wan.text import MAX_TOKENS, TextEncoder, clean_prompt, encode_prompts, load_text_encoder
from scd.wan.training_run import load_pipeline_of_checkpoint
from scd.wan.wan_pipeline import SCDWanPipeline

FPS = 16.0  # of Wan's videos


@dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """What a video is made of, beside its first prompt.

    Attributes:
        frames: pictures.
        seed: of all noise.
        negative_prompt: None: the one of the folder of embeddings, or else an empty one.
        later_prompts: (picture, prompt) each: given to the first latent frame whose pictures begin
            there or later.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = FPS
    seed: int = 0
    negative_prompt: str | None = None
    later_prompts: Sequence[tuple[int, str]] = ()


class Texts:
    """The embeddings of prompts: from a folder, or else from the text encoder, loaded when needed.

    Args:
        folder: as `scd wan encode-prompts` writes it; None: the text encoder.
        source: of the text encoder, see `scd.wan.text.load_text_encoder`.
    """

    def __init__(self, folder: Path | None, source: str, device: torch.device):
        self._folder = None if folder is None else PromptFolder(folder)
        self._source = source
        # What makes the embeddings, and their number of tokens.
        self.made_by = [source, MAX_TOKENS]
        if self._folder is not None:
            self.made_by = [self._folder.text_encoder, self._folder.length]
        self._device = device
        self._encoder: TextEncoder | None = None

    def negative(self, prompt: str | None) -> str:
        """Choose the negative prompt: the given one, else the folder's, else an empty one."""
        if prompt is not None:
            return prompt
        return "" if self._folder is None else self._folder.negative_prompt

    def check(self, prompts: Iterable[str]) -> None:
        """Refuse prompts that the folder has no embedding of, before any video is made."""
        if self._folder is not None:
            self._folder.check(prompts)

    def __call__(self, prompt: str) -> Tensor:
        """Find the embedding of one prompt, (1, length, text_dim)."""
        if self._folder is not None:
            return self._folder.embedding(prompt)[None].to(self._device)
        if self._encoder is None:
            self._encoder = load_text_encoder(self._source, self._device)
        return encode_prompts(*self._encoder, [clean_prompt(prompt)])


def load_pipeline(path: Path, overrides: list[str]) -> SCDWanPipeline:
    """Load a pipeline's folder or a checkpoint of a run, onto a GPU if there is one.

    The folder's text encoder is left out.

    Args:
        overrides: `rollout.key=value`, on top of what was saved with it.

    Raises:
        ScdError: there is none, it is damaged, or an override is wrong.
    """
    run = options_in(path)
    pipeline = _read_folder(path) if run is None else load_pipeline_of_checkpoint(path, run)
    settings = change_rollout(pipeline.settings(), overrides)
    pipeline.register_settings(asdict(settings), pipeline.config.options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(settings.precision, device)
    pipeline.transformer = with_weights_in(pipeline.transformer, precision)
    pipeline.vae = with_weights_in(pipeline.vae, precision)
    return pipeline.to(device)


def _read_folder(folder: Path) -> SCDWanPipeline:
    index = folder / "model_index.json"
    if not folder.exists():
        raise ScdError(f"{folder}: {why_missing(folder, 'file or folder')}")
    if not index.is_file():
        raise ScdError(
            f"{folder}: neither a folder with a {index.name}, as `scd wan convert` and `scd "
            f"export` write it, nor the ema.safetensors of a Wan's run: give one of these"
        )
    found = read_json(index)
    kind = found.get("_class_name") if isinstance(found, dict) else None
    if kind != SCDWanPipeline.__name__:  # diffusers would load another's parts, and only warn
        raise ScdError(f"{folder}: holds a pipeline of another kind ({kind}), not of a Wan")
    without_text: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    try:
        pipeline = SCDWanPipeline.from_pretrained(folder, use_safetensors=True, **without_text)
    except ScdError:
        raise
    except Exception as error:  # diffusers raises many kinds for damaged folders
        raise ScdError(f"{folder}: not a readable pipeline of a Wan ({reason(error)})") from error
    return pipeline


def generate_videos(
    pipeline: SCDWanPipeline,
    texts: Texts,
    prompt: str,
    request: VideoRequest,
    out: Path,
    videos: int = 1,
) -> None:
    """Generate videos of a prompt into `out`, or with several seeds into `<out>-0.mp4` and so on.

    The seed of number i is that of the request, and i more.

    Raises:
        ScdError: a value does not fit, or a file cannot be written.
    """
    if out.suffix != ".mp4":
        raise ScdError(f"{out}: videos are mp4 files")
    for number in range(videos):
        path = out if videos == 1 else out.with_name(f"{out.stem}-{number}.mp4")
        generate_video(pipeline, texts, prompt, replace(request, seed=request.seed + number), path)


def generate_benchmark(
    pipeline: SCDWanPipeline,
    texts: Texts,
    model: Path,
    prompts: Path,
    request: VideoRequest,
    out: Path,
    videos: int = 5,
    extended: Path | None = None,
) -> None:
    """Generate videos of many prompts under the names that VBench's own tool looks for.

    They are `<prompt>-<index>.mp4`, index 0 to 4; seeds as in `generate_videos`. What all of them
    have in common is written to `<out>.json`. Videos that are there already stay. Any number of
    processes share the work, by locks in `<out>.lock`.

    Args:
        model: what the pipeline was loaded from.
        prompts: a prompt in every line, such as VBench's `all_dimension.txt`.
        extended: in the same lines what the model is given instead; names stay those of `prompts`.

    Raises:
        ScdError: a prompt that cannot be a name, other numbers of lines, or a folder of videos that
            were made otherwise.
    """
    names, given = _read_benchmark(prompts, extended, videos)
    negative = texts.negative(request.negative_prompt)
    common = {
        "model": [sha256(path) for path in weight_files(model)],
        "autoencoder": [sha256(path) for path in sorted(_vae_folder(model).glob("*.safetensors"))],
        "text_encoder": texts.made_by,
        "rollout": dict(pipeline.config.rollout),
        "negative_prompt": negative,
        "extended": None if extended is None else sha256(extended),
        **{key: getattr(request, key) for key in ("frames", "height", "width", "fps", "seed")},
    }
    texts.check([*given, negative])
    _write_common(out, common)
    others = 0
    wanted = dict(zip(names, given, strict=True)).items()
    for (name, text), number in product(wanted, range(videos)):
        path = out / f"{name}-{number}.mp4"
        with claim(out.with_name(f"{out.name}.lock"), path.name) as mine:
            others += not mine
            if mine and not path.exists():
                one = replace(request, seed=request.seed + number)
                generate_video(pipeline, texts, text, one, path)
    if others:
        print(f"{out}: left to other processes: {others}, which they were making")


def _read_benchmark(
    prompts: Path, extended: Path | None, videos: int
) -> tuple[list[str], list[str]]:
    """Read the names of a benchmark's videos, and in the same lines what the model is given."""
    names = read_lines(prompts)
    given = names if extended is None else read_lines(extended)
    if len(given) != len(names):
        raise ScdError(f"{extended}: {len(given)} lines for the {len(names)} of {prompts}")
    for name in names:
        longest = f"{name}-{videos}.part.mp4"
        if "/" in name or "\0" in name or len(longest.encode()) > MAX_NAME_BYTES:
            raise ScdError(
                f"{prompts}: {name[:80]!r} cannot be a file's name: put longer prompts into a file "
                f"for --extended"
            )
    return names, given


def _write_common(out: Path, common: dict[str, Any]) -> None:
    """Write what all videos of a folder have in common; refuse a folder of others."""
    about = out.with_name(f"{out.name}.json")
    if any(out.glob("*.mp4")):  # otherwise a command failed before its first video
        if not about.exists():
            raise ScdError(
                f"{about}: is missing, so how the videos of {out} were made is unknown: choose "
                f"another folder"
            )
        before = read_json(about)
        if not isinstance(before, dict) or before != {key: common.get(key) for key in before}:
            raise ScdError(
                f"{about}: the videos of {out} were made otherwise: choose another folder"
            )
    write_json(about, common)


def _vae_folder(model: Path) -> Path:
    """Find the autoencoder of a pipeline's folder, or of a run's checkpoint."""
    run = options_in(model)
    return model / "vae" if run is None else from_user(str(run.autoencoder.path))


def generate_video(
    pipeline: SCDWanPipeline, texts: Texts, prompt: str, request: VideoRequest, path: Path
) -> None:
    """Generate a video, and write its pictures as soon as they are there.

    Raises:
        ScdError: a value does not fit, or the file cannot be written.
    """
    text, negative = texts(prompt), texts(texts.negative(request.negative_prompt))
    changes = [(at, texts(later)) for at, later in sorted(request.later_prompts, reverse=True)]
    started = time.perf_counter()
    stream = pipeline.stream(
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        generator=generator(pipeline.transformer.device, "video", request.seed),
        prompt_embeds=text,
        negative_prompt_embeds=negative,
    )
    first, shown = 0.0, 0
    with (
        VideoWriter(path, request.height, request.width, request.fps) as writer,
        tqdm(total=request.frames, desc=path.name[:40], unit="picture") as bar,
    ):
        while shown < request.frames:
            while changes and changes[-1][0] <= shown:
                stream.set_prompt(prompt_embeds=changes.pop()[1])
            pictures = next(stream)[0]  # (1 or 4, 3, H, W)
            writer.write((pictures.movedim(1, -1) * 255).round().byte().cpu().numpy())
            first = first or time.perf_counter() - started
            shown += len(pictures)
            bar.update(len(pictures))
    took = time.perf_counter() - started
    print(f"{path}: seed {request.seed}; first picture after {first:.2f} s, all after {took:.2f} s")
