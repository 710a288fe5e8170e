"""Arguments that several commands take."""

import argparse
from pathlib import Path
from typing import Any

from scd.errors import ScdError
from scd.utils.paths import to_read, why_missing

Commands = Any
"""What `ArgumentParser.add_subparsers` returns; argparse does not name its type."""

ANY_CHECKPOINT = "ema.safetensors, an exported folder, or the reference's ema.pth"


def add_options_file(p: argparse.ArgumentParser) -> None:
    """Add `--opt FILE` and `key=value` overrides."""
    p.add_argument("--opt", required=True, help="options file (YAML)")
    add_overrides(p)


def add_checkpoint(p: argparse.ArgumentParser, help: str = ANY_CHECKPOINT) -> None:
    """Add a checkpoint, `--opt FILE` in place of the options that it carries, and overrides."""
    p.add_argument("checkpoint", type=to_read, help=help)
    p.add_argument("--opt", help="options file to use instead of the options in the checkpoint")
    add_overrides(p)


def check_there(*checkpoints: Path) -> None:
    """Refuse checkpoints that are not there, before anything is imported that takes seconds."""
    for path in checkpoints:
        if not path.exists():
            raise ScdError(f"{path}: {why_missing(path, 'weights file')}")


def add_overrides(p: argparse.ArgumentParser) -> None:
    """Add `key=value` overrides of single options."""
    p.add_argument("overrides", nargs="*", metavar="key=value")
