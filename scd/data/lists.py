"""List files: a JSON array with one entry per clip, paths relative to the data root."""

import reprlib
import sys
import unicodedata
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scd.errors import ScdError
from scd.utils.files import MAX_NAME_BYTES, read_json, write_json
from scd.utils.paths import why_missing

MAX_PATH_BYTES = 2048  # no system opens longer paths
# Unicode categories that no name may hold: control characters (a terminal obeys them), line and
# paragraph separators, and surrogates, which stand for bytes that are not UTF-8. Names do hold
# anything else: spaces of any kind, joiners of emoji, marks of direction.
REFUSED = ("Cc", "Zl", "Zp", "Cs")


@dataclass(frozen=True)
class ClipEntry:
    """One clip of a list. Paths are relative to the data root; None for what a clip does not have.

    `video_path` is a video file, or an `.npz` with `video` and perhaps `actions` (as in DMLab).
    `caption` says what the video shows, for models that are conditioned on a text.
    """

    video_path: str | None = None
    action_path: str | None = None
    latent_path: str | None = None
    label: int | None = None
    caption: str | None = None

    @property
    def actions_in(self) -> str | None:
        """Path of the file with the actions: `action_path`, or the `.npz` that holds the clip."""
        if self.action_path is None and str(self.video_path).lower().endswith(".npz"):
            return self.video_path
        return self.action_path


def read_list(path: Path) -> list[ClipEntry]:
    """Read a list file.

    Raises:
        ScdError: it is missing, empty, not JSON, or an entry has a wrong field or type.
    """
    if not path.exists():
        raise ScdError(
            f"{path}: {why_missing(path)}: get videos with `scd record` or `scd fetch-data`, list "
            f"your own with `scd make-lists`, or set data.root"
        )
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ScdError(f"{path}: expected a non-empty JSON array of clips")
    return [_entry(path, number, entry) for number, entry in enumerate(entries)]


def write_list(path: Path, entries: list[ClipEntry]) -> None:
    """Write a list file.

    Raises:
        ScdError: an entry is one that `read_list` refuses, or the file cannot be written.
    """
    values = [{k: v for k, v in asdict(entry).items() if v is not None} for entry in entries]
    for number, value in enumerate(values):
        _entry(path, number, value)
    write_json(path, values)


def _entry(path: Path, number: int, entry: object) -> ClipEntry:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict):
        raise ScdError(f"{where} is not an object")
    known = {field.name for field in fields(ClipEntry)}
    for key, value in entry.items():
        if key not in known:
            raise ScdError(
                f"{where} has an unknown field {reprlib.repr(key)}; "
                f"known: {', '.join(sorted(known))}"
            )
        wanted = int if key == "label" else str
        if value is not None and type(value) is not wanted:
            raise ScdError(f"{where}: {key} must be {wanted.__name__}, not {reprlib.repr(value)}")
        if not isinstance(value, str):
            continue
        if key == "caption":
            if not value.strip():
                raise ScdError(f"{where}: its caption is empty: leave it out")
        elif (problem := _no_path_below_root(value)) is not None:
            raise ScdError(
                f"{where}: {key} must be a path below the data root, not {reprlib.repr(value)}"
                f"{problem}"
            )
    clip = ClipEntry(**entry)
    if clip.video_path is None and clip.latent_path is None:
        raise ScdError(f"{where} has neither video_path nor latent_path")
    return clip


def path_problem(text: str) -> str | None:
    """Return why a list cannot hold a path; None if it can."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not text.isascii():
        return f"cannot be opened in this locale, whose names are {encoding}: set PYTHONUTF8=1"
    categories = {unicodedata.category(letter) for letter in text}
    if "Cs" in categories:
        return "is not UTF-8: rename it"
    if categories & set(REFUSED):
        return "has control characters or line breaks: rename it"
    longest = max((len(part.encode()) for part in Path(text).parts), default=0)
    if longest > MAX_NAME_BYTES or len(text.encode()) > MAX_PATH_BYTES:
        return f"is too long: at most {MAX_NAME_BYTES} bytes per name, {MAX_PATH_BYTES} in all"
    return None


def _no_path_below_root(path: str) -> str | None:
    """Return the end of a message if a path leads out of the root or is refused; else None."""
    parts = Path(path).parts
    if not parts or ".." in parts or Path(path).is_absolute():
        return ""
    problem = path_problem(path)
    return None if problem is None else f", which {problem}"
