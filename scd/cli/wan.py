"""Commands for pretrained text-to-video models: wan convert, encode-prompts, generate, measure."""

import argparse
from functools import partial

from scd.cli.arguments import Commands, add_overrides
from scd.errors import ScdError
from scd.utils.paths import from_user, to_read

BELONGS_TO = {  # options of `scd wan convert`, by the types of model that have them
    "encoder_layers": ("scd",),
    "decoder_first": ("scd",),
    "decoder_last": ("scd",),
    "encoder_frame": ("scd",),
    "fusion": ("scd",),
    "chunk_frames": ("causal",),
    "num_actions": ("scd", "causal", "bidirectional"),
}


def convert(a: argparse.Namespace) -> None:
    given = {name: value for name in BELONGS_TO if (value := getattr(a, name)) is not None}
    for name in given:
        if a.type not in BELONGS_TO[name]:
            raise ScdError(f"--{name.replace('_', '-')} does not belong to --type {a.type}")
    from scd.wan import BidirectionalWan, CausalWan, SCDWan
    from scd.wan.convert import convert as convert_wan

    if a.type != "scd":
        kind = CausalWan if a.type == "causal" else BidirectionalWan
        convert_wan(a.source, a.out, partial(kind.from_wan, **given), a.weights)
    else:  # a prompt alone has no frame to begin with, so the first one is learned too
        make = partial(SCDWan.from_wan, first_frame=True, **given)
        convert_wan(a.source, a.out, make, a.weights)


def encode_prompts(a: argparse.Namespace) -> None:
    from scd.wan.encode_prompts import encode_prompt_file

    encode_prompt_file(a.prompts, a.out, a.text_encoder, a.negative_prompt, a.batch_size)


def generate(a: argparse.Namespace) -> None:
    if a.extended is not None and a.vbench is None:
        raise ScdError("--extended belongs to --vbench")
    later = []
    for picture, prompt in a.then:
        if not picture.isdecimal() or a.vbench is not None:
            raise ScdError(f"--then {picture}: give the number of a picture, not with --vbench")
        later.append((int(picture), prompt))
        if int(picture) >= a.frames:
            raise ScdError(f"--then {picture}: the video ends before, after {a.frames} pictures")
    if a.videos is not None and a.videos < 1:
        raise ScdError(f"--videos must be at least 1, not {a.videos}")
    if not 0.1 <= a.fps <= 1000:
        raise ScdError(f"--fps must lie between 0.1 and 1000, not {a.fps}")
    if (file := next((folder for folder in a.out.parents if folder.is_file()), None)) is not None:
        raise ScdError(f"{a.out}: {file} is a file, not a folder")
    if a.vbench is None and a.out.is_dir():
        raise ScdError(f"{a.out}: a folder: give the name of an mp4 file")
    if a.vbench is not None and a.out.is_file():
        raise ScdError(f"{a.out}: a file: with --vbench, give a folder")
    import torch

    from scd.wan import sampling

    pipeline = sampling.load_pipeline(a.model, a.overrides)
    device: torch.device = pipeline.transformer.device
    texts = sampling.Texts(a.prompt_embeds, a.text_encoder, device)
    request = sampling.VideoRequest(
        frames=a.frames,
        height=a.height,
        width=a.width,
        fps=a.fps,
        seed=a.seed,
        negative_prompt=a.negative_prompt,
        later_prompts=later,
    )
    videos = a.videos or (1 if a.vbench is None else 5)
    if a.vbench is None:
        sampling.generate_videos(pipeline, texts, a.prompt, request, a.out, videos)
    else:
        sampling.generate_benchmark(
            pipeline, texts, a.model, a.vbench, request, a.out, videos, a.extended
        )


def measure(a: argparse.Namespace) -> None:
    from scd.evaluation.streams import measure_streams

    measure_streams(a.folder, a.windows)


def add_commands(commands: Commands) -> None:
    wan = commands.add_parser("wan", help="pretrained text-to-video models (Wan2.1)")
    wan_commands = wan.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_convert, _add_encode_prompts, _add_generate, _add_measure):
        add(wan_commands)


def _add_convert(commands: Commands) -> None:
    p = commands.add_parser("convert", help="make a causal or separable model of a Wan")
    p.add_argument(
        "source",
        help="folder, or OWNER/NAME on the Hugging Face hub, in diffusers' format or in Wan's own",
    )
    p.add_argument("--out", type=from_user, required=True, help="folder to write to")
    p.add_argument(
        "--weights",
        type=from_user,
        metavar="FILE",
        help="read the transformer's weights here, such as a checkpoint of Self-Forcing",
    )
    p.add_argument(
        "--type",
        choices=["scd", "causal", "bidirectional"],
        default="scd",
        help="separable; dense and causal; or as it is, to teach (default: %(default)s)",
    )
    for name, default, what in (
        ("encoder-layers", "all but --decoder-last", "the encoder's layers, Wan's first"),
        ("decoder-first", 5, "the decoder's layers from Wan's beginning"),
        ("decoder-last", 5, "the decoder's layers from Wan's end"),
        ("chunk-frames", 1, "frames that a causal model denoises together"),
        ("num-actions", 0, "actions, one a frame"),
    ):
        p.add_argument(f"--{name}", type=int, help=f"{what} (default: {default})")
    p.add_argument(
        "--encoder-frame",
        choices=["shift", "noise"],
        help="what the encoder makes a frame's context of: the clean frame before it, or also the "
        "frame itself as noise (default: shift)",
    )
    p.add_argument(
        "--fusion",
        choices=["token_concat", "middle"],
        help="how the decoder joins context and noisy tokens (default: token_concat)",
    )
    p.set_defaults(run=convert)


def _add_encode_prompts(commands: Commands) -> None:
    p = commands.add_parser("encode-prompts", help="write the embeddings of prompts, once")
    p.add_argument("prompts", type=to_read, help="a prompt in every line; or .json: captions")
    p.add_argument("--out", type=from_user, required=True, help="folder to write to")
    p.add_argument(
        "--negative-prompt", metavar="TEXT", help="(default: the folder's, at first an empty one)"
    )
    p.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    _add_text_encoder(p)
    p.set_defaults(run=encode_prompts)


def _add_generate(commands: Commands) -> None:
    p = commands.add_parser("generate", help="make videos of prompts, picture by picture")
    p.add_argument(
        "model",
        type=to_read,
        help="folder, as `scd wan convert` writes it, or a run's ema.safetensors",
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT")
    what.add_argument(
        "--vbench",
        type=to_read,
        metavar="FILE",
        help="make videos of every line, named as VBench's own tool wants them",
    )
    p.add_argument("--out", type=from_user, required=True, help="mp4 file; with --vbench, a folder")
    p.add_argument(
        "--extended",
        type=to_read,
        metavar="FILE",
        help="with --vbench: what the model is given in place of each line",
    )
    p.add_argument(
        "--then",
        nargs=2,
        action="append",
        default=[],
        metavar=("PICTURE", "TEXT"),
        help="another prompt from this picture on, or from the next chunk of a model of chunks; "
        "may be repeated",
    )
    p.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    p.add_argument(
        "--prompt-embeds",
        type=to_read,
        metavar="FOLDER",
        help="take the prompts' embeddings from here (`scd wan encode-prompts`)",
    )
    _add_text_encoder(p)
    for name, default, what in (
        ("frames", 81, "pictures of a video"),
        ("height", 480, "pixels"),
        ("width", 832, "pixels"),
        ("seed", 0, "of the first video; the next ones count on"),
    ):
        help = f"{what} (default: %(default)s)"
        p.add_argument(f"--{name}", type=int, default=default, help=help)
    p.add_argument("--fps", type=float, default=16.0, help="(default: %(default)s)")
    p.add_argument("--videos", type=int, help="videos of a prompt (default: 1; with --vbench, 5)")
    add_overrides(p)
    p.set_defaults(run=generate)


def _add_measure(commands: Commands) -> None:
    p = commands.add_parser("measure", help="sharpness, motion and drift of long videos")
    p.add_argument("folder", type=to_read, help="folder of mp4 files")
    p.add_argument(
        "--windows", type=int, default=4, help="parts of each video (default: %(default)s)"
    )
    p.set_defaults(run=measure)


def _add_text_encoder(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--text-encoder",
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        metavar="SOURCE",
        help="folder or repository on the hub with text_encoder/ and tokenizer/ (default: "
        "%(default)s, up to 23 GB)",
    )
