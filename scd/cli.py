"""The command line: `scd COMMAND`; `scd --help` lists the commands."""

import argparse
import sys
from collections.abc import Callable

from scd.errors import ScdError, Stopped
from scd.utils.paths import from_user, to_read
from scd.utils.startup import prepare_environment, prepare_process


def record(arguments: argparse.Namespace) -> None:
    from scd.doom.record import record_dataset

    a = arguments
    record_dataset(a.root, a.train_episodes, a.val_episodes, a.frames, a.size, a.keys)


def train(arguments: argparse.Namespace) -> None:
    from scd.options import load_options

    options = load_options(arguments.opt, arguments.overrides)  # before torch, which takes seconds
    if arguments.dry_run:
        from scd.training.dry_run import dry_run

        dry_run(options)
    else:
        from scd.training.launch import run_experiment

        run_experiment(options)


def make_lists(arguments: argparse.Namespace) -> None:
    from scd.data.make_lists import ListRequest
    from scd.data.make_lists import make_lists as make

    a = arguments
    make(ListRequest(a.root, a.train_list, a.val_list, a.split, a.val_fraction, a.labels))


def validate(arguments: argparse.Namespace) -> None:
    from scd.options import load_options

    a = arguments
    if a.list is not None and a.overrides:
        raise ScdError(f"validate: {a.overrides[0]!r} changes an options file: give --opt")
    if a.list is None and a.root is not None:
        raise ScdError("validate: --root belongs to --list; with --opt, write data.root=...")
    if a.list is None:
        options = load_options(a.opt, a.overrides)
        from scd.data.validate import validate_experiment

        validate_experiment(options, a.json)
    else:
        from scd.data.validate import validate_list

        validate_list(a.list, a.root or a.list.parent, a.json)


def encode(arguments: argparse.Namespace) -> None:
    from scd.options import load_options

    options = load_options(arguments.opt, arguments.overrides)
    from scd.training.encode import encode_dataset

    encode_dataset(options)


def evaluate(arguments: argparse.Namespace) -> None:
    from scd.evaluation.evaluate import evaluate_checkpoint

    a = arguments
    evaluate_checkpoint(a.checkpoint, a.opt, a.overrides, a.sweep, a.track)


def compare(arguments: argparse.Namespace) -> None:
    from scd.evaluation.compare import compare_checkpoints

    a = arguments
    overrides = [text for text in a.checkpoints if "=" in text and not from_user(text).exists()]
    paths = [to_read(text) for text in a.checkpoints if text not in overrides]
    if not paths:
        raise ScdError(f"compare: {overrides[0]!r} changes options, but no checkpoint is given")
    compare_checkpoints(paths, a.out, overrides)


def benchmark(arguments: argparse.Namespace) -> None:
    from scd.benchmark.runner import benchmark as run

    run(arguments.out, arguments.only, arguments.plots)


def probe(arguments: argparse.Namespace) -> None:
    from scd.analysis.probe import probe_checkpoint

    a = arguments
    probe_checkpoint(a.checkpoint, a.opt, a.overrides, a.clips, a.steps, a.fine_tune)


def split(arguments: argparse.Namespace) -> None:
    from scd.analysis.split import Split, split_checkpoint

    a = arguments
    wanted = Split(a.encoder_layers, a.decoder_layers, a.decoder_from)
    split_checkpoint(a.checkpoint, wanted, a.out, a.opt, a.overrides)


def ema(arguments: argparse.Namespace) -> None:
    from scd.training.ema import write_average

    a = arguments
    write_average(a.run_folder, a.sigma_rel, a.step, a.out)


def export(arguments: argparse.Namespace) -> None:
    import torch

    from scd.export import export_checkpoint

    a = arguments
    export_checkpoint(a.checkpoint, a.out, getattr(torch, a.dtype), a.overrides)


def starts(arguments: argparse.Namespace) -> None:
    from scd.options import load_options

    a = arguments
    options = load_options(a.opt, a.overrides)
    from scd.play.starts import make_starts, named_clips

    make_starts(options, a.out, named_clips(a.clips, a.names), a.frames, a.doom)


def play(arguments: argparse.Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from scd.play.catalog import load_catalog

    a = arguments
    from scd.play.access import origin_of

    origins = frozenset(map(origin_of, a.allow_origin))
    # In a thread that ends: had this one a team of OpenMP threads too, beside that of the thread
    # that computes the pictures, libgomp would let neither spin, and a picture take twice as long.
    with ThreadPoolExecutor(1) as loading:
        catalog = loading.submit(load_catalog, a.model, a.baseline, a.starts, a.overrides).result()
    if a.measure is not None:
        from scd.play.latency import measure

        measure(catalog, a.measure)
    else:
        from scd.play.server import Address, serve

        serve(catalog, Address(a.host, a.port, a.token, origins), a.sessions)


def measure(arguments: argparse.Namespace) -> None:
    from scd.evaluation.evaluate import measure_folder

    measure_folder(arguments.folder)


def fetch_weights(arguments: argparse.Namespace) -> None:
    from scd.evaluation.metric_weights import fetch_metric_weights

    for path in fetch_metric_weights():
        print(path)


def fetch_data(arguments: argparse.Namespace) -> None:
    from scd.data.hub import fetch

    fetch(arguments.names, arguments.root)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("record", help="record Doom episodes: videos, actions, list files")
    p.add_argument(
        "--root",
        type=from_user,
        default="data/doom",
        help="folder to write to (default: %(default)s)",
    )
    p.add_argument("--train-episodes", type=int, default=400, help="(default: %(default)s)")
    p.add_argument("--val-episodes", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--frames", type=int, default=300, help="frames an episode (default: 300)")
    p.add_argument("--size", type=int, default=64, help="frame height and width (default: 64)")
    p.add_argument(
        "--keys",
        action="store_true",
        help="several keys at once, turning while walking: actions are vectors of held keys",
    )
    p.set_defaults(run=record)

    p = commands.add_parser("fetch-data", help="fetch published data sets and autoencoders")
    p.add_argument("names", nargs="+", metavar="NAME", help="such as minecraft, dcae_minecraft")
    p.add_argument(
        "--root", type=from_user, default="data", help="folder to write to (default: %(default)s)"
    )
    p.set_defaults(run=fetch_data)

    p = commands.add_parser("fetch-weights", help="fetch and check the weights of LPIPS and FVD")
    p.set_defaults(run=fetch_weights)

    p = commands.add_parser("train", help="train what an options file describes, or go on with it")
    p.add_argument("--opt", required=True, help="options file (YAML)")
    p.add_argument(
        "--dry-run", action="store_true", help="build and run it once, on noise; no data"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=train)

    p = commands.add_parser("make-lists", help="write list files for a folder of videos")
    p.add_argument(
        "root", type=from_user, help="videos are searched below it, lists written into it"
    )
    p.add_argument("--train-list", default="train.json", help="(default: %(default)s)")
    p.add_argument("--val-list", default="val.json", help="(default: %(default)s)")
    p.add_argument(
        "--split",
        choices=["fraction", "ucf101-mcvd", "ucf101-latte"],
        default="fraction",
        help="a share for validation, or a published split of UCF-101 (default: %(default)s)",
    )
    p.add_argument("--val-fraction", type=float, default=0.05, help="(default: %(default)s)")
    p.add_argument("--labels", action="store_true", help="label videos by the folder they lie in")
    p.set_defaults(run=make_lists)

    p = commands.add_parser("validate", help="read a whole data set: counts, broken files, hash")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--opt", help="options file (YAML): both its lists")
    what.add_argument("--list", type=from_user, help="one list file")
    p.add_argument("--root", type=from_user, help="of --list (default: the folder it lies in)")
    p.add_argument("--json", type=from_user, metavar="FILE", help="write what was found")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=validate)

    p = commands.add_parser("encode", help="encode an experiment's training videos into latents")
    p.add_argument("--opt", required=True, help="options file (YAML)")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=encode)

    p = commands.add_parser("evaluate", help="measure a checkpoint: FVD, PSNR, SSIM, LPIPS")
    p.add_argument(
        "checkpoint",
        type=to_read,
        help="ema.safetensors of this project, or the reference's ema.pth",
    )
    p.add_argument("--opt", help="options file instead of the options in the checkpoint")
    p.add_argument(
        "--sweep",
        action="append",
        metavar="key=value,value",
        help="evaluate with each of these values; several --sweep: every combination",
    )
    p.add_argument("--track", action="store_true", help="log the table to train.trackers as well")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=evaluate)

    p = commands.add_parser("compare", help="one table of evaluated checkpoints, with their speed")
    p.add_argument(
        "checkpoints",
        nargs="+",
        metavar="checkpoint",
        help="ema.safetensors of each, or exported folders; then any key=value they were evaluated "
        "with",
    )
    p.add_argument(
        "--out", type=from_user, default="experiments/compare", help="(default: %(default)s)"
    )
    p.set_defaults(run=compare)

    p = commands.add_parser("benchmark", help="seconds a frame beside the floor; clips a second")
    p.add_argument("--only", metavar="TEXT", help="the cases whose name contains it, as data")
    p.add_argument("--plots", action="store_true", help="also cost against context and steps")
    p.add_argument(
        "--out",
        type=from_user,
        default="experiments/benchmark",
        help="folder (default: %(default)s)",
    )
    p.set_defaults(run=benchmark)

    p = commands.add_parser("probe", help="see what a model's layers repeat, attend to and need")
    p.add_argument(
        "checkpoint",
        type=to_read,
        help="ema.safetensors, the reference's ema.pth, or an exported folder",
    )
    p.add_argument("--opt", help="options file instead of the options in the checkpoint")
    p.add_argument(
        "--clips", default="16", help="first validation clips, or numbers as 3,17,40 (default: 16)"
    )
    p.add_argument("--steps", type=int, default=16, help="denoising steps a frame (default: 16)")
    p.add_argument(
        "--fine-tune", type=int, default=30, help="training steps a variant (default: 30; 0: none)"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=probe)

    p = commands.add_parser("split", help="start an SCD from a dense model's layers")
    p.add_argument(
        "checkpoint", type=to_read, help="ema.safetensors or exported folder of a causal_dit"
    )
    p.add_argument("--opt", help="options file instead of the options in the checkpoint")
    p.add_argument("--encoder-layers", type=int, required=True, help="its first layers")
    p.add_argument("--decoder-layers", type=int, required=True)
    p.add_argument(
        "--decoder-from",
        choices=["last", "first-and-last"],
        default="last",
        help="its last layers, or half of them from either end (default: %(default)s)",
    )
    p.add_argument(
        "--out", type=from_user, required=True, help="folder for model.safetensors and options.yml"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=split)

    p = commands.add_parser("ema", help="average a run's weights as long as is chosen afterwards")
    p.add_argument(
        "run_folder",
        type=to_read,
        metavar="run",
        help="experiments/NAME, trained with train.snapshot_every",
    )
    p.add_argument(
        "--sigma-rel", type=float, required=True, help="length, as a share of the training so far"
    )
    p.add_argument("--step", type=int, help="of a snapshot (default: the newest)")
    p.add_argument(
        "--out", type=from_user, required=True, metavar="FILE", help="to write, .safetensors"
    )
    p.set_defaults(run=ema)

    p = commands.add_parser("export", help="write a checkpoint as a pipeline with a model card")
    p.add_argument(
        "checkpoint",
        type=to_read,
        help="ema.safetensors of this project, or the reference's ema.pth",
    )
    p.add_argument(
        "--out", type=from_user, required=True, help="folder; the last part names the model"
    )
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=export)

    p = commands.add_parser("starts", help="cut clips for `scd play` to begin with")
    p.add_argument("--opt", required=True, help="options file (YAML) of the model to be played")
    p.add_argument("--out", required=True, type=from_user, help="folder, for scd play --starts")
    p.add_argument(
        "--clips", default="8", help="first validation clips, or numbers as 3,17,40 (default: 8)"
    )
    p.add_argument("--names", help="of these clips, as lamps,red_gate (default: their numbers)")
    p.add_argument("--frames", type=int, default=24, help="of each clip (default: 24)")
    p.add_argument(
        "--doom",
        action="store_true",
        help="play these validation episodes of `scd record` anew, to show Doom beside the model",
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=starts)

    p = commands.add_parser("play", help="serve a world to walk in, for a browser")
    p.add_argument(
        "--model",
        type=to_read,
        default="assets/pretrained/scd_doom",
        help="folder of a pretrained model (default: %(default)s)",
    )
    p.add_argument("--baseline", type=to_read, metavar="DIR", help="another, shown beside it")
    p.add_argument(
        "--starts", type=to_read, default="assets/starts", help="folder (default: %(default)s)"
    )
    p.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    p.add_argument("--token", help="ask for it; made up where others can reach the server")
    p.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="where a proxy shows the page, such as https://play.example.org; may be repeated",
    )
    p.add_argument("--sessions", type=int, default=2, help="players at a time (default: 2)")
    p.add_argument(
        "--measure", type=int, metavar="FRAMES", help="play so many by itself and tell how fast"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=play)

    p = commands.add_parser("measure", help="recompute the metrics of saved samples, without model")
    p.add_argument(
        "folder",
        type=from_user,
        help="such as experiments/<name>/evaluation/step-00000400-1f2e3d4c",
    )
    p.set_defaults(run=measure)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
    except ScdError as error:  # of a path that cannot be
        parser.error(str(error))
    # argparse takes no more overrides once another argument has come between.
    if rest and (not hasattr(arguments, "overrides") or any(text[:1] == "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return run_command(lambda: arguments.run(arguments), arguments.run.__name__)


def run_command(run: Callable[[], object], name: str) -> int:
    """Run a command in a process of its own; what goes wrong is told in one line: the exit code."""
    prepare_environment()
    prepare_process()
    try:
        run()
    except ScdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped:  # which the run has told
        return Stopped.EXIT_CODE
    except OSError as error:  # of a disk or a system, where no module has told it better
        told = ScdError(f"{error.filename or name}: {error.strerror or error}")
        print(f"error: {told}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:  # a name that is not UTF-8, or UTF-8 where nothing else is
        print(
            f"error: {name}: {error.object[:200]!r} cannot be written in {error.encoding}: rename "
            f"it, or set PYTHONUTF8=1 if the locale is not UTF-8",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
