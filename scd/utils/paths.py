"""Resolve paths as people write them, find the project's own files, explain missing ones."""

from importlib import metadata
from pathlib import Path

from scd.errors import ScdError

OWN = ("options", "assets")  # folders of the project
CHECKOUT = Path(__file__).resolve().parents[2]
SHARED = "share/scd"  # where an installed package keeps `options/`, below its prefix


def from_user(text: str | Path) -> Path:
    """Expand `~` and `~user` at the beginning of a path, and name a folder that has no name.

    `.` and `..` become whole paths: what is written goes beside its target first, under its name.

    Raises:
        ScdError: that user has no known home, or the text is empty.
    """
    if text == "":
        raise ScdError("an empty path, perhaps of an unset variable: write . for this folder")
    try:
        path = Path(text).expanduser()
        return path.resolve() if path.name in ("", "..") else path
    except RuntimeError as error:
        raise ScdError(f"{text}: no home folder is known here: write the whole path") from error


def expand(text: str) -> str:
    """Expand `~` at the beginning of an option's text, and change nothing else."""
    return str(from_user(text)) if text.startswith("~") else text


def to_read(text: str | Path) -> Path:
    """Find a file to read; `options/...` and `assets/...` that are not here are the project's own.

    Raises:
        ScdError: see `from_user`.
    """
    path = from_user(text)
    if path.is_absolute() or path.parts[:1] not in [(name,) for name in OWN] or path.exists():
        return path
    own = project_file(path)
    return own if own.exists() else path


def project_file(path: str | Path) -> Path:
    """Find a file of `options/` or `assets/`, in the checkout or beside the installed package."""
    wanted = Path(path)
    if not (CHECKOUT / "pyproject.toml").is_file():
        try:
            files = metadata.files("scd") or []
        except metadata.PackageNotFoundError:
            files = []
        for file in files:
            if file.match(f"{SHARED}/{wanted.as_posix()}"):
                return Path(str(file.locate())).resolve()
    return CHECKOUT / wanted


def why_missing(path: Path, what: str = "file") -> str:
    """Explain why a path cannot be read: a broken link, or the folder in which it is missing."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            part = "" if link == path else f"{link} is "
            return (
                f"{part}a link to {link.readlink()}, which is not there: copy the folder with the "
                f"files that its links point to (cp -rL)"
            )
    return f"no such {what}" + ("" if path.is_absolute() else f" in {Path.cwd()}")
