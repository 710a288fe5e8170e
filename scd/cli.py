"""The command line: `scd record | fetch-data | fetch-weights | train | encode | evaluate | …`."""

import argparse
import sys
from pathlib import Path

from scd.errors import ScdError


def record(arguments: argparse.Namespace) -> None:
    from scd.doom.record import record_dataset

    a = arguments
    record_dataset(Path(a.root), a.train_episodes, a.val_episodes, a.frames, a.size)


def train(arguments: argparse.Namespace) -> None:
    from scd.options import load_options

    options = load_options(arguments.opt, arguments.overrides)  # before torch, which takes seconds
    from scd.training.run import run_experiment

    run_experiment(options)


def encode(arguments: argparse.Namespace) -> None:
    from scd.options import load_options

    options = load_options(arguments.opt, arguments.overrides)
    from scd.data.encode import encode_dataset

    encode_dataset(options)


def evaluate(arguments: argparse.Namespace) -> None:
    from scd.evaluation.run import evaluate_checkpoint

    a = arguments
    evaluate_checkpoint(Path(a.checkpoint), a.opt, a.overrides, a.sweep, a.track)


def measure(arguments: argparse.Namespace) -> None:
    from scd.evaluation.run import measure_folder

    measure_folder(Path(arguments.folder))


def fetch_weights(arguments: argparse.Namespace) -> None:
    from scd.evaluation.weights import fetch_metric_weights

    for path in fetch_metric_weights():
        print(path)


def fetch_data(arguments: argparse.Namespace) -> None:
    from scd.data.hub import fetch

    fetch(arguments.names, Path(arguments.root))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("record", help="record Doom episodes: videos, actions, list files")
    p.add_argument("--root", default="data/doom", help="folder to write to (default: %(default)s)")
    p.add_argument("--train-episodes", type=int, default=400, help="(default: %(default)s)")
    p.add_argument("--val-episodes", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--frames", type=int, default=300, help="frames an episode (default: 300)")
    p.add_argument("--size", type=int, default=64, help="frame height and width (default: 64)")
    p.set_defaults(run=record)

    p = commands.add_parser("fetch-data", help="fetch published data sets and autoencoders")
    p.add_argument("names", nargs="+", metavar="NAME", help="such as minecraft, dcae_minecraft")
    p.add_argument("--root", default="data", help="folder to write to (default: %(default)s)")
    p.set_defaults(run=fetch_data)

    p = commands.add_parser("fetch-weights", help="fetch and check the weights of LPIPS and FVD")
    p.set_defaults(run=fetch_weights)

    p = commands.add_parser("train", help="train what an options file describes, or go on with it")
    p.add_argument("--opt", required=True, help="options file (YAML)")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=train)

    p = commands.add_parser("encode", help="encode an experiment's training videos into latents")
    p.add_argument("--opt", required=True, help="options file (YAML)")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.set_defaults(run=encode)

    p = commands.add_parser("evaluate", help="measure a checkpoint: FVD, PSNR, SSIM, LPIPS")
    p.add_argument("checkpoint", help="ema.safetensors of this project, or the reference's ema.pth")
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

    p = commands.add_parser("measure", help="recompute the metrics of saved samples, without model")
    p.add_argument("folder", help="such as experiments/<name>/evaluation/step-00000400-1f2e3d4c")
    p.set_defaults(run=measure)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no more overrides once another argument has come between.
    if rest and (not hasattr(arguments, "overrides") or any(text[:1] == "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        arguments.run(arguments)
    except ScdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
