"""List files of published data sets, entered with paths that hold on this machine.

Published lists name their files from wherever their author kept them, such as
`datasets/minecraft/training/0.mp4`. Here each path's tail is looked up on disk.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath

from scd.data.lists import ClipEntry, path_problem, write_list
from scd.errors import ScdError
from scd.utils.files import read_json

KNOWN = [field.name for field in fields(ClipEntry)]


def adopt_lists(published: Mapping[Path, Path], home: Path, folders: list[Path]) -> Iterator[str]:
    """Write project lists (`scd.data.lists`) from published ones; yields one line on each.

    A project list that is there already stays: it may hold what `scd encode` or its owner entered.

    Args:
        published: published list -> project list to write, below `home`.
        home: the data root that the written paths are relative to.
        folders: where the named files may lie.
    """
    for source, target in published.items():
        if target.exists():
            continue
        try:
            found, missing = _entries(source, home, folders)
        except ScdError as error:
            yield f"note: {error}"
            continue
        if not found:
            yield f"note: {source}: no entry's files are here (the first names {missing[0]})"
            continue
        write_list(target, found)
        line = f"{target}: {len(found)} clips"
        if missing:
            line += f"; {len(missing)} left out, their files are not here (first: {missing[0]})"
        yield line


def _entries(source: Path, home: Path, folders: list[Path]) -> tuple[list[ClipEntry], list[str]]:
    """The entries whose files are all here, and one missing path of each of the others."""
    raw = read_json(source)
    if not isinstance(raw, list) or not raw:
        raise ScdError(f"{source}: not a list of clips (a non-empty JSON array)")
    locate = _Locator(home, folders)
    found, missing = [], []
    for number, entry in enumerate(raw):
        if not isinstance(entry, dict):
            raise ScdError(f"{source}: entry {number} is not an object")
        values = {key: entry[key] for key in KNOWN if entry.get(key) is not None}
        for key in [key for key in values if key.endswith("_path")]:
            local = locate(str(values[key]))
            if local is None:
                missing.append(str(values[key]))
                break
            values[key] = local
        else:
            if not values.keys() & {"video_path", "latent_path"}:
                raise ScdError(f"{source}: entry {number} has no video_path and no latent_path")
            found.append(ClipEntry(**values))
    return found, missing


class _Locator:
    """Finds the longest tail of a published path below one of the folders."""

    def __init__(self, home: Path, folders: list[Path]):
        self.home = home
        self.folders = folders
        self.last = (0, folders[0])  # dropped leading parts and folder: mostly the same each time

    def __call__(self, path: str) -> str | None:
        parts = PurePosixPath(path).parts
        if ".." in parts or path_problem(path) is not None:
            return None
        tries = [self.last] + [(n, folder) for n in range(len(parts)) for folder in self.folders]
        for dropped, folder in tries:
            local = folder.joinpath(*(part for part in parts[dropped:] if part != "/"))
            if dropped < len(parts) and local.is_file() and local.is_relative_to(self.home):
                self.last = dropped, folder
                return local.relative_to(self.home).as_posix()
        return None
