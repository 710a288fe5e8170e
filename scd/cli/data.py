"""Commands that make data ready: record, fetch, list, validate, encode."""

import argparse

from scd.cli.arguments import Commands, add_options_file, add_overrides
from scd.errors import ScdError, did_you_mean
from scd.utils.paths import from_user


def record(a: argparse.Namespace) -> None:
    from scd.doom.record import record_dataset

    record_dataset(a.root, a.train_episodes, a.val_episodes, a.frames, a.size, a.keys)


def fetch_data(a: argparse.Namespace) -> None:
    from scd.data.published import AUTOENCODERS, DATA_SETS, fetch_data_set

    known = [*DATA_SETS, *AUTOENCODERS]
    for name in a.names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ScdError(f"nothing is called {name!r}{hint}; there are {', '.join(known)}")
    for name in a.names:
        if name in DATA_SETS:
            fetch_data_set(DATA_SETS[name], a.root)
        else:
            from scd.models.published_autoencoder import fetch_autoencoder  # takes seconds

            fetch_autoencoder(AUTOENCODERS[name], a.root / "pretrained" / name)


def fetch_weights(a: argparse.Namespace) -> None:
    from scd.evaluation.metric_weights import fetch_metric_weights

    for path in fetch_metric_weights():
        print(path)


def make_lists(a: argparse.Namespace) -> None:
    from scd.data.make_lists import ListRequest
    from scd.data.make_lists import make_lists as make

    make(ListRequest(a.root, a.train_list, a.val_list, a.split, a.val_fraction, a.labels))


def validate(a: argparse.Namespace) -> None:
    if a.list is not None and a.overrides:
        raise ScdError(f"validate: {a.overrides[0]!r} changes an options file: give --opt")
    if a.list is None and a.root is not None:
        raise ScdError("validate: --root belongs to --list; with --opt, write data.root=...")
    if a.list is None:
        from scd.options import load_options

        options = load_options(a.opt, a.overrides)
        from scd.data.validate import validate_experiment
        from scd.training.encode import latent_spec

        validate_experiment(options, latent_spec(options), a.json)
    else:
        from scd.data.validate import validate_list

        validate_list(a.list, a.root or a.list.parent, a.json)


def encode(a: argparse.Namespace) -> None:
    from scd.options import load_options

    options = load_options(a.opt, a.overrides)
    from scd.training.encode import encode_dataset

    encode_dataset(options)


def add_commands(commands: Commands) -> None:
    p = commands.add_parser("record", help="record Doom episodes: videos, actions, list files")
    p.add_argument(
        "--root",
        type=from_user,
        default="data/doom",
        help="folder to write to (default: %(default)s)",
    )
    p.add_argument("--train-episodes", type=int, default=400, help="(default: %(default)s)")
    p.add_argument("--val-episodes", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--frames", type=int, default=300, help="frames per episode (default: 300)")
    p.add_argument("--size", type=int, default=64, help="frame height and width (default: 64)")
    p.add_argument(
        "--keys",
        action="store_true",
        help="hold several keys at once (turn while walking): actions are vectors of held keys",
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

    p = commands.add_parser("make-lists", help="write list files for a folder of videos")
    p.add_argument(
        "root", type=from_user, help="folder that is searched for videos; the lists go into it"
    )
    p.add_argument("--train-list", default="train.json", help="(default: %(default)s)")
    p.add_argument("--val-list", default="val.json", help="(default: %(default)s)")
    p.add_argument(
        "--split",
        choices=["fraction", "ucf101-mcvd", "ucf101-latte"],
        default="fraction",
        help="hold out a fraction, or use a published split of UCF-101 (default: %(default)s)",
    )
    p.add_argument("--val-fraction", type=float, default=0.05, help="(default: %(default)s)")
    p.add_argument("--labels", action="store_true", help="label videos by the folder they are in")
    p.set_defaults(run=make_lists)

    p = commands.add_parser("validate", help="read a whole data set: counts, broken files, hash")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--opt", help="options file (YAML): both of its lists")
    what.add_argument("--list", type=from_user, help="one list file")
    p.add_argument("--root", type=from_user, help="root of --list (default: the list's folder)")
    p.add_argument("--json", type=from_user, metavar="FILE", help="also write the findings here")
    add_overrides(p)
    p.set_defaults(run=validate)

    p = commands.add_parser("encode", help="encode an experiment's training videos into latents")
    add_options_file(p)
    p.set_defaults(run=encode)
