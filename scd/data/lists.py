"""List files: a JSON array with one entry a clip, paths relative to a root folder."""

import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scd.errors import ScdError
from scd.files import read_json, write_json

MAX_PATH_BYTES, MAX_NAME_BYTES = 2048, 255  # no system opens longer ones


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
    write_json(
        path, [{k: v for k, v in asdict(entry).items() if v is not None} for entry in entries]
    )


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
        if isinstance(value, str) and not _below_root(value):
            raise ScdError(
                f"{where}: {key} must be a path below the data root, not {reprlib.repr(value)}"
            )
    clip = ClipEntry(**entry)
    if clip.video_path is None and clip.latent_path is None:
        raise ScdError(f"{where} has neither video_path nor latent_path")
    return clip


def can_be_path(text: str) -> bool:
    """Whether the operating system could open a file of this name."""
    return (
        text.isprintable()
        and len(text.encode()) <= MAX_PATH_BYTES
        and all(len(part.encode()) <= MAX_NAME_BYTES for part in Path(text).parts)
    )


def _below_root(path: str) -> bool:
    parts = Path(path).parts
    inside = bool(parts) and ".." not in parts and not Path(path).is_absolute()
    return inside and can_be_path(path)
