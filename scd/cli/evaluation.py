"""Commands that measure: evaluate, measure, compare, benchmark, probe."""

import argparse

from scd.cli.arguments import Commands, add_checkpoint, check_there
from scd.errors import ScdError
from scd.utils.paths import from_user, to_read


def evaluate(a: argparse.Namespace) -> None:
    check_there(a.checkpoint)
    from scd.evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(a.checkpoint, a.opt, a.overrides, a.sweep, a.track)


def measure(a: argparse.Namespace) -> None:
    from scd.evaluation.evaluate import measure_folder

    measure_folder(a.folder)


def compare(a: argparse.Namespace) -> None:
    overrides = [text for text in a.checkpoints if "=" in text and not from_user(text).exists()]
    paths = [to_read(text) for text in a.checkpoints if text not in overrides]
    if not paths:
        raise ScdError(f"compare: {overrides[0]!r} changes options, but no checkpoint is given")
    check_there(*paths)
    from scd.evaluation.compare import compare_checkpoints

    compare_checkpoints(paths, a.out, overrides)


def benchmark(a: argparse.Namespace) -> None:
    from scd.benchmark.runner import benchmark as run

    run(a.out, a.only, a.plots)


def probe(a: argparse.Namespace) -> None:
    check_there(a.checkpoint)
    from scd.analysis.probe import probe_checkpoint

    probe_checkpoint(a.checkpoint, a.opt, a.overrides, a.clips, a.steps, a.fine_tune)


def add_commands(commands: Commands) -> None:
    p = commands.add_parser("evaluate", help="measure a checkpoint: FVD, PSNR, LPIPS and more")
    p.add_argument(
        "--sweep",
        action="append",
        metavar="key=value,value",
        help="evaluate with each of these values; several --sweep: every combination",
    )
    p.add_argument("--track", action="store_true", help="also log the table to train.trackers")
    add_checkpoint(p)
    p.set_defaults(run=evaluate)

    p = commands.add_parser("measure", help="recompute the metrics of saved samples, without model")
    p.add_argument(
        "folder",
        type=from_user,
        help="such as experiments/<name>/evaluation/step-00000400-1f2e3d4c",
    )
    p.set_defaults(run=measure)

    p = commands.add_parser("compare", help="one table of evaluated checkpoints, with their speed")
    p.add_argument(
        "checkpoints",
        nargs="+",
        metavar="checkpoint|key=value",
        help="ema.safetensors files or exported folders; then what all were evaluated with",
    )
    p.add_argument(
        "--out", type=from_user, default="experiments/compare", help="(default: %(default)s)"
    )
    p.set_defaults(run=compare)

    p = commands.add_parser("benchmark", help="seconds per frame against the floor; clips/s")
    p.add_argument("--only", metavar="TEXT", help="only the cases whose name contains TEXT")
    p.add_argument("--plots", action="store_true", help="also plot cost against context and steps")
    p.add_argument(
        "--out",
        type=from_user,
        default="experiments/benchmark",
        help="folder (default: %(default)s)",
    )
    p.set_defaults(run=benchmark)

    p = commands.add_parser("probe", help="show what a model's layers repeat, attend to and need")
    add_checkpoint(p)
    p.add_argument(
        "--clips",
        default="16",
        help="how many validation clips, or their numbers as 3,17,40 (default: 16)",
    )
    p.add_argument("--steps", type=int, default=16, help="denoising steps per frame (default: 16)")
    p.add_argument(
        "--fine-tune",
        type=int,
        default=30,
        help="training steps per variant (default: 30; 0: none)",
    )
    p.set_defaults(run=probe)
