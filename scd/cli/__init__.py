"""The command line: `scd COMMAND`; `scd --help` lists the commands.

Each module of this package adds a few commands to the parser. What a command needs is imported when
it runs: `scd --help` and mistakes in an options file must not wait for torch.
"""

import argparse
import sys
from collections.abc import Callable

from scd.cli import data, evaluation, models, training, wan
from scd.errors import ScdError, Stopped, reason
from scd.utils.startup import prepare_environment, prepare_process

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # on a GPU, on the CPU


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="scd", description="Separable Causal Diffusion: train, evaluate and play world models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (data, training, evaluation, models, wan):
        module.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code."""
    parser = build_parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
    except ScdError as error:  # a path that no system can have
        parser.error(str(error))
    # argparse takes no more overrides once another argument has come between.
    # `compare` has checkpoints and overrides in one list.
    taken = getattr(arguments, "overrides", getattr(arguments, "checkpoints", None))
    if rest and (taken is None or any(text[:1] == "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and taken is not None:
        taken += rest
    return run_command(lambda: arguments.run(arguments), arguments.run.__name__)


def run_command(run: Callable[[], object], name: str) -> int:
    """Run a command in a prepared process, and return its exit code.

    Errors that a user can fix end in one line on stderr; a fault of the code keeps its traceback.
    """
    prepare_environment()
    prepare_process()
    try:
        run()
    except ScdError as error:
        return _fail(str(error))
    except Stopped:  # the run has printed why
        return Stopped.EXIT_CODE
    except OSError as error:  # of a disk or a system, where no module has explained it better
        return _fail(str(ScdError(f"{error.filename or name}: {error.strerror or error}")))
    except UnicodeEncodeError as error:  # a name that is not UTF-8, or UTF-8 where nothing else is
        around = error.object[max(error.start - 40, 0) : error.end + 40]
        return _fail(
            f"{name}: {around!r} cannot be written in {error.encoding}: rename it, or set "
            f"PYTHONUTF8=1 if the locale is not UTF-8"
        )
    except (MemoryError, RuntimeError) as error:  # of torch, which is not imported here
        text = reason(error)
        if not isinstance(error, MemoryError) and not any(sign in text for sign in OUT_OF_MEMORY):
            raise
        return _fail(f"{name}: needs more memory than there is ({text})")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1
