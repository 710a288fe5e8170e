"""Published data sets and autoencoders from the Hugging Face hub, made ready for training.

A data set is fetched shard by shard: download, check against the hub's SHA-256, unpack, note what
was done, delete the shard. Run again, it goes on with the first shard that is not noted; for a
complete data set the hub is not asked again.
"""

import difflib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scd.data.archives import check_name, unpack
from scd.data.hub_repository import HubFile, Repository
from scd.data.published import adopt_lists
from scd.errors import ScdError
from scd.models.autoencoder import convert_published
from scd.options import load_options
from scd.utils.files import read_json, sha256, write_json
from scd.utils.locks import hold_lock
from scd.utils.paths import project_file

STATE = ".hub"  # inside a target folder: notes, the lock, and what is not finished
RESERVE_BYTES = 2**30  # left free on the disk
KINDS = {
    "videos": (".mp4", ".avi", ".webm"),
    "action files (npz)": (".npz",),
    "latents": (".pt", ".safetensors"),
    "list files (json)": (".json",),
}


@dataclass(frozen=True)
class DataSetSource:
    """A data set on the hub: `shard-*.tar`, and perhaps list files beside them.

    Attributes:
        folder: where it is unpacked, relative to the data root.
        home: the `data.root` of its experiments, relative to the data root.
        lists: published list file -> the project's list file, written into `home`.
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


def fetch(names: list[str], root: Path, endpoint: str | None = None) -> None:
    """Fetch data sets and autoencoders by name, in this order, and tell what was found.

    Args:
        root: the data root; autoencoders go to `pretrained/` below it.
        endpoint: address of the hub; by default $HF_ENDPOINT or huggingface.co.

    Raises:
        ScdError: an unknown name, no network or access, too little disk space, or a file that is
            damaged, refused or not what it should be.
    """
    known = [*DATA_SETS, *AUTOENCODERS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ScdError(f"nothing is called {name!r}{hint}; there are {', '.join(known)}")
    for name in names:
        if name in DATA_SETS:
            fetch_data_set(DATA_SETS[name], root, endpoint)
        else:
            fetch_autoencoder(AUTOENCODERS[name], root / "pretrained" / name, endpoint)


def fetch_data_set(source: DataSetSource, root: Path, endpoint: str | None = None) -> None:
    """Download and unpack what is missing of a data set, then write its list files.

    Raises:
        ScdError: see `fetch`.
    """
    folder, home = root / source.folder, root / source.home
    with _sole_use(folder) as state:
        notes = _Notes(state / "fetched.json")
        fresh = not notes.complete
        if fresh:
            repo = Repository(source.repo, "dataset", state / "downloads", endpoint)
            _fetch_files(repo, notes, folder, state)
        counts = [f"{notes.count(suffixes)} {kind}" for kind, suffixes in KINDS.items()]
        print(f"{folder}: {', '.join(counts)}" + ("" if fresh else " (fetched before)"))
        by_name = {PurePosixPath(name).name: folder / name for name in notes.lists()}
        published = {by_name[n]: home / t for n, t in source.lists.items() if n in by_name}
        if not by_name:
            print(f"note: {source.repo} has no list file (*.json): write {home}/train.json by hand")
        elif not published:
            print(f"note: no known list file among {', '.join(sorted(by_name))}")
        # At every run: perhaps their files came with another data set meanwhile.
        for line in adopt_lists(published, home, [folder, home, root]):
            print(line)


def _fetch_files(repo: Repository, notes: "_Notes", folder: Path, state: Path) -> None:
    commit, files = repo.files()
    shards = [f for f in files if PurePosixPath(f.name).match("shard-*.tar")]
    lists = [f for f in files if f.name.endswith(".json") and "/" not in f.name]
    if not shards:
        raise ScdError(f"{repo.told}: holds no shard-*.tar, but {len(files)} other files")
    missing = [f for f in [*lists, *shards] if not notes.has(f)]
    # Shards are not compressed: at most one lies beside its own content.
    sizes = [f.size for f in missing]
    _check_space(folder, sum(sizes) + max(sizes, default=0), repo.told)
    for number, file in enumerate(missing, 1):
        print(f"{repo.told}: {file.name} ({number} of {len(missing)}, {_size(file.size)})")
        path = repo.download(file, commit)
        if file in shards:
            names = unpack(path, folder, state / "staging")
            path.unlink()
        else:
            if problem := check_name(file.name, STATE):
                raise ScdError(f"{repo.told}: {file.name!r} {problem}")
            os.replace(path, folder / file.name)
            names = [file.name]
        notes.add(file, names)
    notes.finish(commit)
    shutil.rmtree(repo.downloads, ignore_errors=True)


def fetch_autoencoder(source: AutoencoderSource, folder: Path, endpoint: str | None = None) -> None:
    """Download a published DC-AE and save it as a diffusers folder.

    Raises:
        ScdError: see `fetch`.
    """
    if (folder / "config.json").is_file():
        print(f"{folder}: there already")
        return
    options = load_options(project_file(source.options)).autoencoder
    with _sole_use(folder.parent) as state:
        repo = Repository(source.repo, "model", state / "downloads", endpoint)
        commit, files = repo.files()
        file = next((f for f in files if f.name == source.file), None)
        if file is None:
            raise ScdError(f"{repo.told}: holds no {source.file}")
        _check_space(folder.parent, 2 * file.size, repo.told)
        print(f"{repo.told}: {file.name} ({_size(file.size)})")
        path = repo.download(file, commit)
        digits = re.search(r"-([0-9a-f]{8})\.pth$", source.file)
        found = sha256(path)
        if digits is None or not found.startswith(digits[1]):
            path.unlink()
            raise ScdError(
                f"{repo.told}: {file.name} has SHA-256 {found[:8]}..., not the digits in its name: "
                f"damaged or replaced, and deleted here"
            )
        convert_published(path, options, folder)
        shutil.rmtree(repo.downloads, ignore_errors=True)
    print(f"{folder}: autoencoder, from {source.repo} {source.file}")


class _Notes:
    """What was fetched into a folder: hub file -> its identity, counts by suffix, list files."""

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
        counts: dict[str, int] = {}
        for name in names:
            suffix = PurePosixPath(name).suffix.lower()
            counts[suffix] = counts.get(suffix, 0) + 1
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
            and all(
                isinstance(name, str) and check_name(name, STATE) is None for name in note["lists"]
            )
            for note in data["files"].values()
        )
    except (KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _sole_use(folder: Path) -> Iterator[Path]:
    """The state folder inside `folder`, while no other process may use it."""
    state = folder / STATE
    try:
        busy = f"{folder}: another process is fetching into it"
        with hold_lock(state / "lock", busy, "wait for it"):
            yield state
    except OSError as error:
        raise ScdError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE_BYTES:
        raise ScdError(
            f"{what}: needs {_size(needed)} and {_size(RESERVE_BYTES)} to spare on the disk of "
            f"{folder}, but only {_size(free)} are free"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
