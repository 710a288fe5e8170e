"""Commands that train: train, split, ema."""

import argparse

from scd.cli.arguments import Commands, add_checkpoint, add_options_file, check_there
from scd.utils.paths import from_user, to_read


def train(a: argparse.Namespace) -> None:
    from scd.options import load_training_options

    options = load_training_options(a.opt, a.overrides)  # before torch, which takes seconds to load
    if a.dry_run:
        from scd.training.dry_run import dry_run

        dry_run(options)
    else:
        from scd.training.launch import run_experiment

        run_experiment(options)


def split(a: argparse.Namespace) -> None:
    check_there(a.checkpoint)
    from scd.analysis.split import Split, split_checkpoint

    wanted = Split(a.encoder_layers, a.decoder_layers, a.decoder_from, a.encoder_frame)
    split_checkpoint(a.checkpoint, wanted, a.out, a.opt, a.overrides)


def ema(a: argparse.Namespace) -> None:
    from scd.training.ema import write_average

    write_average(a.run_folder, a.sigma_rel, a.step, a.out)


def add_commands(commands: Commands) -> None:
    p = commands.add_parser("train", help="train what an options file describes, or resume it")
    p.add_argument(
        "--dry-run", action="store_true", help="build everything and run it once on noise; no data"
    )
    add_options_file(p)
    p.set_defaults(run=train)

    p = commands.add_parser("split", help="initialize an SCD from the layers of a dense model")
    add_checkpoint(p, "ema.safetensors or exported folder of a causal_dit or bidirectional_dit")
    p.add_argument("--encoder-layers", type=int, required=True, help="taken from its first layers")
    p.add_argument("--decoder-layers", type=int, required=True)
    p.add_argument(
        "--decoder-from",
        choices=["last", "first-and-last"],
        default="last",
        help="its last layers, or half of them from either end (default: %(default)s)",
    )
    p.add_argument(
        "--encoder-frame",
        choices=["shift", "noise", "joint"],
        default="shift",
        help="how the encoder meets the frame to come, model.encoder_frame (default: %(default)s)",
    )
    p.add_argument(
        "--out", type=from_user, required=True, help="folder for model.safetensors and options.yml"
    )
    p.set_defaults(run=split)

    p = commands.add_parser("ema", help="average a run's weights over a length chosen after it")
    p.add_argument(
        "run_folder",
        type=to_read,
        metavar="run",
        help="experiments/NAME, trained with train.snapshot_every",
    )
    p.add_argument(
        "--sigma-rel",
        type=float,
        required=True,
        help="length of the average, as a fraction of the training so far",
    )
    p.add_argument("--step", type=int, help="step of a snapshot (default: the newest)")
    p.add_argument(
        "--out", type=from_user, required=True, metavar="FILE", help=".safetensors file to write"
    )
    p.set_defaults(run=ema)
