"""List files: a JSON array with one entry a clip, paths relative to a root folder."""

import reprlib
import sys
import unicodedata
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scd.errors import ScdError
from scd.utils.files import MAX_NAME_BYTES, read_json, write_json

MAX_PATH_BYTES = 2048  # no system opens longer ones
# Unicode's categories of what no name should hold: control characters (a terminal obeys them),
# line and paragraph separators, and halves of characters, which stand for bytes that are not UTF-8.
# Anything else occurs in names: spaces of any kind, joiners of emoji, marks of direction.
REFUSED = ("Cc", "Zl", "Zp", "Cs")


@dataclass(frozen=True)
class ClipEntry:
    """One clip. Every path is relative to the data root; what a data set does not have is None.

    `video_path` is a video file, or an `.npz` with `video` and perhaps `actions` (as DMLab's).
    """

    video_path: str | None = None
    action_path: str | None = None
    latent_path: str | None = None
    label: int | None = None

    @property
    def actions_in(self) -> str | None:
        """The file with the actions: `action_path`, or a clip in one `.npz` itself."""
        if self.action_path is None and str(self.video_path).endswith(".npz"):
            return self.video_path
        return self.action_path


def read_list(path: Path) -> list[ClipEntry]:
    """Read a list file.

    Raises:
        ScdError: it is missing, empty, not JSON, or an entry has a wrong field or type.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ScdError(f"{path}: expected a non-empty JSON array of clips")
    return [_entry(path, number, entry) for number, entry in enumerate(entries)]


def write_list(path: Path, entries: list[ClipEntry]) -> None:
    """Write a list file.

    Raises:
        ScdError: it could not be read again, or not be written.
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
        if isinstance(value, str) and (problem := _no_path_below_root(value)) is not None:
            raise ScdError(
                f"{where}: {key} must be a path below the data root, not {reprlib.repr(value)}"
                f"{problem}"
            )
    clip = ClipEntry(**entry)
    if clip.video_path is None and clip.latent_path is None:
        raise ScdError(f"{where} has neither video_path nor latent_path")
    return clip


def path_problem(text: str) -> str | None:
    """Tell why a list cannot name a file so; None where it can."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8" and not text.isascii():
        return f"cannot be opened in this locale, of {encoding} names: set PYTHONUTF8=1"
    found = {unicodedata.category(letter) for letter in text}
    if "Cs" in found:
        return "is not UTF-8: rename it"
    if found & set(REFUSED):
        return "has control characters or line breaks: rename it"
    longest = max((len(part.encode()) for part in Path(text).parts), default=0)
    if longest > MAX_NAME_BYTES or len(text.encode()) > MAX_PATH_BYTES:
        return f"is too long: at most {MAX_NAME_BYTES} bytes a name, {MAX_PATH_BYTES} in all"
    return None


def _no_path_below_root(path: str) -> str | None:
    """What to say of a path that leads elsewhere, or that no list can hold; None of a good one."""
    parts = Path(path).parts
    if not parts or ".." in parts or Path(path).is_absolute():
        return ""
    problem = path_problem(path)
    return None if problem is None else f", which {problem}"
