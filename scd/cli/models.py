"""Commands that give a model to others: export, starts, play."""

import argparse
from concurrent.futures import ThreadPoolExecutor

from scd.cli.arguments import (
    ANY_CHECKPOINT,
    Commands,
    add_options_file,
    add_overrides,
    check_there,
)
from scd.errors import ScdError
from scd.utils.paths import from_user, to_read

STARTS = "assets/starts"


def export(a: argparse.Namespace) -> None:
    for_web = {
        "--starts": a.starts != to_read(STARTS),
        "--weights": a.weights != "fp16",
        "--runtime": a.runtime is not None,
        "--measure": a.measure is not None,
    }
    if not a.web and any(for_web.values()):
        given = ", ".join(flag for flag, there in for_web.items() if there)
        raise ScdError(f"export: {given} is for web pages: add --web, or leave it out")
    if a.web and a.dtype != "float32":
        raise ScdError("export: --dtype is not for web pages: with --web, give --weights")
    if a.web and a.measure is not None:
        from scd.web.losses import measure_formats

        measure_formats(a.checkpoint, a.starts, a.measure, a.overrides)
        return
    if a.out is None:
        raise ScdError("export: give a folder with --out")
    if a.web:
        from scd.web.site import export_site

        export_site(a.checkpoint, a.out, a.starts, a.weights, a.runtime, a.overrides)
        return
    check_there(a.checkpoint)
    import torch

    from scd.export import export_checkpoint

    export_checkpoint(a.checkpoint, a.out, getattr(torch, a.dtype), a.overrides)
    print(f"{a.out}: a pipeline in diffusers' format, made of {a.checkpoint}")


def starts(a: argparse.Namespace) -> None:
    from scd.options import load_options

    options = load_options(a.opt, a.overrides)
    from scd.play.starts import make_starts, named_clips

    make_starts(options, a.out, named_clips(a.clips, a.names), a.frames, a.doom)


def play(a: argparse.Namespace) -> None:
    from scd.play.access import origin_of
    from scd.play.catalog import load_catalog

    origins = frozenset(map(origin_of, a.allow_origin))
    # In a thread that ends: if this one had a team of OpenMP threads too, beside that of the thread
    # that computes the pictures, libgomp would let neither spin, and a picture take twice as long.
    with ThreadPoolExecutor(1) as loading:
        catalog = loading.submit(load_catalog, a.model, a.baseline, a.starts, a.overrides).result()
    if a.measure is not None:
        from scd.play.latency import measure_latency

        measure_latency(catalog, a.measure)
    else:
        from scd.play.server import Address, serve

        serve(catalog, Address(a.host, a.port, a.token, origins), a.sessions)


def add_commands(commands: Commands) -> None:
    for add in (_add_export, _add_starts, _add_play):
        add(commands)


def _add_export(commands: Commands) -> None:
    p = commands.add_parser(
        "export", help="write a checkpoint as a pipeline with a model card, or as a web page"
    )
    p.add_argument("checkpoint", type=to_read, help=ANY_CHECKPOINT)
    p.add_argument("--out", type=from_user, help="folder; its name becomes the model's name")
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="type of the weights (default: %(default)s)",
    )
    p.add_argument(
        "--web",
        action="store_true",
        help="write static files instead: the world of `scd play` in the browser alone",
    )
    p.add_argument(
        "--starts",
        type=to_read,
        default=STARTS,
        help="with --web: folder of start clips (default: %(default)s)",
    )
    p.add_argument(
        "--weights",
        choices=["fp32", "fp16", "int8"],
        default="fp16",
        help="with --web: how weights are stored; arithmetic is in float32 (default: %(default)s)",
    )
    p.add_argument(
        "--runtime", type=from_user, metavar="FILE", help="with --web: what `npm pack` has fetched"
    )
    p.add_argument(
        "--measure",
        type=int,
        metavar="FRAMES",
        help="with --web: write nothing, print what each kind of weights costs in so many frames",
    )
    add_overrides(p)
    p.set_defaults(run=export)


def _add_starts(commands: Commands) -> None:
    p = commands.add_parser("starts", help="cut start clips for `scd play`")
    p.add_argument("--out", required=True, type=from_user, help="folder, for scd play --starts")
    p.add_argument(
        "--clips",
        default="8",
        help="how many validation clips, or their numbers as 3,17,40 (default: 8)",
    )
    p.add_argument("--names", help="their names, as lamps,red_gate (default: their numbers)")
    p.add_argument("--frames", type=int, default=24, help="frames per clip (default: 24)")
    p.add_argument(
        "--doom",
        action="store_true",
        help="replay these episodes of `scd record`, so that Doom can be shown beside the model",
    )
    add_options_file(p)
    p.set_defaults(run=starts)


def _add_play(commands: Commands) -> None:
    p = commands.add_parser("play", help="serve a world to walk in, for a browser")
    p.add_argument(
        "--model",
        type=to_read,
        default="assets/pretrained/scd_doom_distilled",
        help="folder of a pretrained model (default: %(default)s)",
    )
    p.add_argument("--baseline", type=to_read, metavar="DIR", help="another one, shown beside it")
    p.add_argument("--starts", type=to_read, default=STARTS, help="folder (default: %(default)s)")
    p.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument(
        "--token", help="token that visitors need; generated where others can reach the server"
    )
    p.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="where a proxy shows the page, such as https://play.example.org; may be repeated",
    )
    p.add_argument("--sessions", type=int, default=2, help="players at a time (default: 2)")
    p.add_argument(
        "--measure", type=int, metavar="FRAMES", help="play so many frames and print the speed"
    )
    add_overrides(p)
    p.set_defaults(run=play)
