"""Commands for pretrained text-to-video models: wan convert."""

import argparse
from functools import partial

from scd.cli.arguments import Commands
from scd.errors import ScdError
from scd.utils.paths import from_user

BELONGS_TO = {  # options of `scd wan convert`, by the types of model that have them
    "encoder_layers": ("scd",),
    "decoder_first": ("scd",),
    "decoder_last": ("scd",),
    "encoder_frame": ("scd",),
    "fusion": ("scd",),
    "chunk_frames": ("causal",),
    "num_actions": ("scd", "causal"),
}


def convert(a: argparse.Namespace) -> None:
    given = {name: value for name in BELONGS_TO if (value := getattr(a, name)) is not None}
    for name in given:
        if a.type not in BELONGS_TO[name]:
            raise ScdError(f"--{name.replace('_', '-')} does not belong to --type {a.type}")
    from scd.wan import CausalWan, SCDWan
    from scd.wan.convert import convert as convert_wan

    if a.type == "causal":
        convert_wan(a.source, a.out, partial(CausalWan.from_wan, **given), a.weights)
    else:  # a prompt alone has no frame to begin with, so the first one is learned too
        make = partial(SCDWan.from_wan, first_frame=True, **given)
        convert_wan(a.source, a.out, make, a.weights)


def add_commands(commands: Commands) -> None:
    wan = commands.add_parser("wan", help="pretrained text-to-video models (Wan2.1)")
    wan_commands = wan.add_subparsers(required=True, metavar="COMMAND")

    p = wan_commands.add_parser("convert", help="make a causal or separable model of a Wan")
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
        choices=["scd", "causal"],
        default="scd",
        help="separable, or dense and causal (default: %(default)s)",
    )
    for name, default, what in (
        ("encoder-layers", 25, "the encoder's layers, Wan's first"),
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
