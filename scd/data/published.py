"""What is published, and its data sets: fetched from the hub, unpacked, and listed for training.

Shards are downloaded a few at a time, checked against the hub's SHA-256, unpacked and deleted, so
the disk holds the data set and a few shards at most. Each finished shard is noted: the next run
continues with the others, and the hub is not asked again about a complete data set.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from scd.data.hub import (
    HubFile,
    Repository,
    check_name,
    check_space,
    exclusive_use,
    size_text,
    unpack,
)
from scd.data.lists import ClipEntry, path_problem, write_list
from scd.errors import ScdError
from scd.utils.files import read_json, write_json

PARALLEL = 4  # shards downloaded at once
KINDS = {
    "videos": (".mp4", ".avi", ".webm"),
    "action files (npz)": (".npz",),
    "latents": (".pt", ".safetensors"),
    "list files (json)": (".json",),
}


@dataclass(frozen=True)
class DataSetSource:
    """A data set on the hub: `shard-*.tar`, and often list files beside or inside them.

    Attributes:
        folder: where it is unpacked, relative to the data root.
        home: the `data.root` of its experiments, relative to the data root.
        lists: published list file -> list file to write into `home`.
    """

    repo: str
    folder: str
    home: str
    lists: Mapping[str, str]


@dataclass(frozen=True)
class AutoencoderSource:
    """A DC-AE state dict on the hub, and the options file with its architecture."""

    repo: str
    file: str
    options: str


DATA_SETS: dict[str, DataSetSource] = {}
for _name, _repo in [("minecraft", "Minecraft"), ("dmlab", "DMLab")]:
    _train, _val = f"{_name}_train.json", f"{_name}_val.json"
    DATA_SETS[_name] = DataSetSource(
        f"guyuchao/{_repo}", _name, _name, {_train: "train.json", _val: "val.json"}
    )
    # Inside the folder of the videos: an experiment has one data root.
    DATA_SETS[f"{_name}_latent"] = DataSetSource(
        f"guyuchao/{_repo}_Latent",
        f"{_name}/latents/published",
        _name,
        {_train: "train_latents.json", _val: "val_latents.json"},
    )
DATA_SETS["ucf101"] = DataSetSource(
    "guyuchao/UCF101", "ucf101", "ucf101", {"train03.json": "train.json", "test03.json": "val.json"}
)
DATA_SETS["bair"] = DataSetSource(
    "guyuchao/BAIR", "bair", "bair", {"bair_train.json": "train.json", "bair_val.json": "val.json"}
)

# `scd.models.published_autoencoder` fetches them.
AUTOENCODERS = {
    "dcae_minecraft": AutoencoderSource(
        "guyuchao/FAR_Models",
        "dcae/DCAE_Minecraft_Res128-a5677f66.pth",
        "options/dcae_minecraft.yml",
    ),
    "dcae_ucf101": AutoencoderSource(
        "guyuchao/FAR_Models", "dcae/DCAE_UCF101_Res64-9da18dcf.pth", "options/dcae_ucf101.yml"
    ),
}


def fetch_data_set(source: DataSetSource, root: Path, endpoint: str | None = None) -> None:
    """Download and unpack what is missing of a data set, then write its list files.

    Args:
        root: the data root.
        endpoint: address of the hub; None: $HF_ENDPOINT or huggingface.co.

    Raises:
        ScdError: no network or access, too little disk space, or a file that is damaged or refused.
    """
    folder, home = root / source.folder, root / source.home
    with exclusive_use(folder) as state:
        notes = Notes(state / "fetched.json")
        fetched_before = notes.complete
        if not fetched_before:
            repo = Repository(source.repo, "dataset", state / "downloads", endpoint)
            _fetch_files(repo, notes, folder, state)
        counts = [f"{notes.count(suffixes)} {kind}" for kind, suffixes in KINDS.items()]
        print(f"{folder}: {', '.join(counts)}" + (" (fetched before)" if fetched_before else ""))
        by_name = {PurePosixPath(name).name: folder / name for name in notes.lists()}
        published = {by_name[n]: home / t for n, t in source.lists.items() if n in by_name}
        if not by_name:
            print(f"note: {source.repo} has no list file (*.json): write {home}/train.json by hand")
        elif not published:
            print(f"note: no known list file among {', '.join(sorted(by_name))}")
        # In every run: another data set may have brought missing files in the meantime.
        for line in adopt_lists(published, home, [folder, home, root]):
            print(line)


def _fetch_files(repo: Repository, notes: "Notes", folder: Path, state: Path) -> None:
    commit, files = repo.files()
    shards = [f for f in files if PurePosixPath(f.name).match("shard-*.tar")]
    lists = [f for f in files if f.name.endswith(".json") and "/" not in f.name]
    if not shards:
        raise ScdError(f"{repo}: holds no shard-*.tar, but {len(files)} other files")
    missing = [f for f in [*lists, *shards] if not notes.has(f)]
    # A shard is not compressed: it is as large as its content, which lies beside it for a while.
    sizes = sorted(f.size for f in missing)
    check_space(folder, sum(sizes) + sum(sizes[-PARALLEL:]), repo)
    for start in range(0, len(missing), PARALLEL):
        batch = missing[start : start + PARALLEL]
        size = size_text(sum(file.size for file in batch))
        print(f"{repo}: files {start + 1} to {start + len(batch)} of {len(missing)} ({size})")
        for file, path in zip(batch, repo.download(batch, commit), strict=True):
            if file in shards:
                names = unpack(path, folder, state / "staging")
                path.unlink()
            else:
                if problem := check_name(file.name):
                    raise ScdError(f"{repo}: {file.name!r} {problem}")
                os.replace(path, folder / file.name)
                names = [file.name]
            notes.add(file, names)
    notes.finish(commit)
    shutil.rmtree(repo.downloads, ignore_errors=True)


class Notes:
    """Notes on what a folder got from the hub: for each file its identity, contents and lists.

    Raises:
        ScdError: the file at `path` is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"complete": None, "files": {}}
        if path.is_file():
            self.data = read_json(path)
            if not _are_notes(self.data):
                raise ScdError(f"{path}: damaged: delete it, and everything is fetched again")

    @property
    def complete(self) -> bool:
        return self.data["complete"] is not None

    def has(self, file: HubFile) -> bool:
        return self.data["files"].get(file.name, {}).get("identity") == file.identity

    def add(self, file: HubFile, names: list[str]) -> None:
        counts = Counter(PurePosixPath(name).suffix.lower() for name in names)
        lists = [name for name in names if name.endswith(".json")]
        note = {"identity": file.identity, "counts": counts, "lists": lists}
        self.data["files"][file.name] = note
        write_json(self.path, self.data)

    def finish(self, commit: str) -> None:
        self.data["complete"] = commit
        write_json(self.path, self.data)

    def count(self, suffixes: tuple[str, ...]) -> int:
        notes = self.data["files"].values()
        return sum(note["counts"].get(suffix, 0) for note in notes for suffix in suffixes)

    def lists(self) -> list[str]:
        return [name for note in self.data["files"].values() for name in note["lists"]]


def _are_notes(data: Any) -> bool:
    try:
        return (data["complete"] is None or isinstance(data["complete"], str)) and all(
            isinstance(note["identity"], str)
            and all(type(count) is int for count in note["counts"].values())
            and all(isinstance(name, str) and check_name(name) is None for name in note["lists"])
            for note in data["files"].values()
        )
    except (KeyError, TypeError, AttributeError):
        return False


def adopt_lists(published: Mapping[Path, Path], home: Path, folders: list[Path]) -> Iterator[str]:
    """Write list files (`scd.data.lists`) from published ones, and yield one line on each.

    Published lists name their files from wherever their author kept them, such as
    `datasets/minecraft/training/0.mp4`; here the end of each path is searched on disk. A list file
    that exists is kept: it may hold what `scd encode` or its owner entered.

    Args:
        published: published list -> list file to write, below `home`.
        home: the data root that the written paths are relative to.
        folders: where the named files may lie.
    """
    for source, target in published.items():
        if target.exists():
            continue
        try:
            entries, missing = _adopt_entries(source, home, folders)
        except ScdError as error:
            yield f"note: {error}"
            continue
        if not entries:
            yield f"note: {source}: no entry's files are here (the first names {missing[0]})"
            continue
        write_list(target, entries)
        line = f"{target}: {len(entries)} clips"
        if missing:
            line += f"; {len(missing)} left out, their files are not here (first: {missing[0]})"
        yield line


def _adopt_entries(
    source: Path, home: Path, folders: list[Path]
) -> tuple[list[ClipEntry], list[str]]:
    """Return the entries whose files are all here, and one missing path of each other entry."""
    raw = read_json(source)
    if not isinstance(raw, list) or not raw:
        raise ScdError(f"{source}: not a list of clips (a non-empty JSON array)")
    known = [field.name for field in fields(ClipEntry)]
    locate = _Locator(home, folders)
    entries, missing = [], []
    for number, entry in enumerate(raw):
        if not isinstance(entry, dict):
            raise ScdError(f"{source}: entry {number} is not an object")
        values = {key: entry[key] for key in known if entry.get(key) is not None}
        for key in [key for key in values if key.endswith("_path")]:
            local = locate(str(values[key]))
            if local is None:
                missing.append(str(values[key]))
                break
            values[key] = local
        else:
            if not values.keys() & {"video_path", "latent_path"}:
                raise ScdError(f"{source}: entry {number} has no video_path and no latent_path")
            entries.append(ClipEntry(**values))
    return entries, missing


class _Locator:
    """Search for the longest end of a published path below one of several folders."""

    def __init__(self, home: Path, folders: list[Path]):
        self.home = home
        self.folders = folders
        self.last = (0, folders[0])  # parts to drop and folder: mostly the same for all paths

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
