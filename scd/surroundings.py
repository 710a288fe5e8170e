"""What a process finds around it, and can do without: a home, a user's name, a UTF-8 locale."""

import getpass
import io
import os
import stat
import sys
import tempfile
from pathlib import Path


def settle_surroundings() -> None:
    """Make a process work in any locale and without a home; call it before torch is imported."""
    for stream in (sys.stdout, sys.stderr):
        # What the locale's encoding lacks is written as \u2191, which loses nothing.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _name_user()
    _find_home()


def _name_user() -> None:
    """Libraries ask for the user's name, as torch.compile for its cache's."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the second since Python 3.13
        os.environ["USER"] = f"uid{os.getuid()}"


def _find_home() -> None:
    """Give caches a place: in containers HOME may be unset, the user unknown, the folder missing.

    A folder below the temporary one stands in, the same every time, so that fetched weights are
    found again.
    """
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one would mean the working directory
    home = os.path.expanduser("~")
    if os.path.isdir(home) and home != "~":
        return
    os.environ["HOME"] = str(_own_folder(Path(tempfile.gettempdir()) / f"scd-home-{os.getuid()}"))
    told = "HOME is not set, and passwd has no home" if home == "~" else f"{home} is no folder"
    print(
        f"note: {told}: caches go to {os.environ['HOME']}; set HOME to keep them elsewhere",
        file=sys.stderr,
    )


def _own_folder(path: Path) -> Path:
    """Make a folder that nobody else can write to; if somebody has taken its name, another one."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return path
    return Path(tempfile.mkdtemp(prefix=f"{path.name}-"))
