"""Fetching from a local stand-in of the hub: whole, once, and no more than is needed."""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import torch
from torch import Tensor

from scd.cli import main
from scd.data import hub
from scd.data.hub import unpack
from scd.data.lists import ClipEntry, read_list
from scd.data.published import (
    AUTOENCODERS,
    PARALLEL,
    AutoencoderSource,
    DataSetSource,
    fetch_data_set,
)
from scd.errors import ScdError
from scd.models import load_reference_checkpoint
from scd.models.autoencoder import build_autoencoder, load_codec
from scd.models.published_autoencoder import convert_published, fetch_autoencoder
from scd.options import AutoencoderOptions, load_options
from tests.test_locks import holder_of

ROOT = Path(__file__).parent.parent
COMMIT = "c0ffee" + "0" * 34
LISTS = {"tiny_train.json": "train.json", "tiny_val.json": "val.json"}
TINY = DataSetSource("someone/Tiny", "tiny", "tiny", LISTS)
TINY_LATENT = DataSetSource(
    "someone/Tiny_Latent", "tiny/latents/published", "tiny", {"tiny_train.json": "latents.json"}
)


class Hub(ThreadingHTTPServer):
    """The few paths of the hub that are needed; `requests` records them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> name -> content
        self.corrupt: set[str] = set()  # files whose content arrives with a flipped byte
        self.cut: dict[str, str] = {}  # file -> how its first transfer ends half-way
        self.refuse: tuple[int, str] | None = None  # status and X-Error-Code for everything
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server, unquote(self.path.partition("?")[0])
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.refuse is not None:
            self.head(hub.refuse[0], {"X-Error-Code": hub.refuse[1], "Content-Length": "0"})
        elif match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)", path):
            self.info(match[1])
        elif match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/" + COMMIT, path):
            self.tree(match[1])
        elif match := re.fullmatch(
            r"/(?:datasets/)?([^/]+/[^/]+)/resolve/" + COMMIT + "/(.+)", path
        ):
            self.file(hub.files[match[1]][match[2]], match[2])
        else:
            self.head(404, {"Content-Length": "0"})

    def info(self, repo: str):
        if repo not in self.server.files:
            return self.head(404, {"Content-Length": "0"})
        siblings = []
        for name, content in self.server.files[repo].items():
            entry = {"rfilename": name, "size": len(content), "blobId": "b" + digest(content)[:39]}
            if not name.endswith(".json"):  # small text files are not in LFS
                entry["lfs"] = {"sha256": digest(content), "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        self.json({"id": repo, "sha": COMMIT, "siblings": siblings})

    def tree(self, repo: str):
        files = []
        for name, content in self.server.files[repo].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
            if not name.endswith(".json"):
                entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 1}
            files.append(entry)
        self.json(files)

    def json(self, value: object):
        body = json.dumps(value).encode()
        self.head(200, {"Content-Length": str(len(body)), "Content-Type": "application/json"})
        self.wfile.write(body)

    def file(self, content: bytes, name: str):
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{digest(content)}"',
            "Accept-Ranges": "bytes",
        }
        if name in self.server.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(content) - start)
        self.head(206 if start else 200, headers)
        if self.command == "HEAD":
            return
        if how := self.server.cut.pop(name, None):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if how == "reset":
                self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            self.rfile.close()
            return
        self.wfile.write(content[start:])

    def head(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(hub, "RETRY_AFTER", (0, 0))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's own retries
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(server) -> Hub:
    """Two shards and two lists; their paths begin where the author kept them."""
    shards = [{f"./training/{n}.mp4": b"v%d" % n * 700, f"training/{n}.npz": b"a"} for n in (0, 1)]
    shards[1]["validation/2.mp4"] = b"v2"
    shards[1]["validation/2.npz"] = b"a2"
    shards[1]["tiny_val.json"] = clip_list("/home/a/tiny/validation", 2)
    server.files["someone/Tiny"] = {
        "README.md": b"not needed",
        "shard-000.tar": tar(shards[0]),
        "shard-001.tar": tar(shards[1]),
        "tiny_train.json": clip_list("datasets/tiny/training", 0, 1),
    }
    return server


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def clip_list(folder: str, *numbers: int) -> bytes:
    entries = [
        {"video_path": f"{folder}/{n}.mp4", "action_path": f"{folder}/{n}.npz", "notes": "x"}
        for n in numbers
    ]
    return json.dumps(entries).encode()


def tar(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in more:
            archive.addfile(member)
    return out.getvalue()


def tree(folder: Path) -> set[str]:
    """Files below a folder, without what belongs to the fetching itself."""
    files = [p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()]
    return {path.as_posix() for path in files if hub.STATE not in path.parts}


UNPACKED = {
    *(f"tiny/training/{n}.{kind}" for n in (0, 1) for kind in ("mp4", "npz")),
    "tiny/validation/2.mp4",
    "tiny/validation/2.npz",
    "tiny/tiny_train.json",
    "tiny/tiny_val.json",
    "tiny/train.json",
    "tiny/val.json",
}


def test_data_set_is_fetched_unpacked_and_listed_once(tiny, tmp_path, capsys):
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert tree(tmp_path) == UNPACKED
    assert (tmp_path / "tiny/training/1.mp4").read_bytes() == b"v1" * 700
    assert not list(tmp_path.rglob("*.tar"))
    assert not any("README" in path for _, path, _ in tiny.requests)
    out = capsys.readouterr().out
    assert "3 videos, 3 action files (npz), 0 latents, 2 list files" in out
    clips = [ClipEntry(f"training/{n}.mp4", f"training/{n}.npz") for n in (0, 1)]
    assert read_list(tmp_path / "tiny/train.json") == clips
    assert read_list(tmp_path / "tiny/val.json") == [
        ClipEntry("validation/2.mp4", "validation/2.npz")
    ]

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    tiny.requests.clear()
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert tiny.requests == []
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert "3 videos" in capsys.readouterr().out


def test_latents_live_in_the_videos_folder_and_wait_for_their_actions(tiny, tmp_path, capsys):
    entry = {"latent_path": "datasets/tiny_latent/training/0.pt"}
    entry["action_path"] = "datasets/tiny/training/0.npz"
    files = {"training/0.pt": b"z", "tiny_train.json": json.dumps([entry]).encode()}
    tiny.files["someone/Tiny_Latent"] = {"shard-0.tar": tar(files)}
    fetch_data_set(TINY_LATENT, tmp_path, tiny.url)
    out = capsys.readouterr().out
    assert "1 latents" in out and "no entry's files are here" in out
    assert not (tmp_path / "tiny/latents.json").exists()
    fetch_data_set(TINY, tmp_path, tiny.url)
    fetch_data_set(TINY_LATENT, tmp_path, tiny.url)
    clip = ClipEntry(action_path="training/0.npz", latent_path="latents/published/training/0.pt")
    assert read_list(tmp_path / "tiny/latents.json") == [clip]


def test_missing_lists_and_missing_files_are_reported(server, tmp_path, capsys):
    server.files["someone/Tiny"] = {"shard-0.tar": tar({"a/0.mp4": b"v"})}
    fetch_data_set(TINY, tmp_path / "none", server.url)
    assert "has no list file" in capsys.readouterr().out
    content = {"a/0.mp4": b"v", "a/0.npz": b"a", "tiny_train.json": clip_list("a", 0, 7)}
    server.files["someone/Tiny"] = {"shard-0.tar": tar(content)}
    fetch_data_set(TINY, tmp_path / "some", server.url)
    assert "1 clips; 1 left out" in (out := capsys.readouterr().out) and "a/7.mp4" in out


def test_own_list_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/train.json").write_text("mine")
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert (tmp_path / "tiny/train.json").read_text() == "mine"


@pytest.mark.parametrize("how", ["close", "reset"])
def test_cut_connection(tiny, tmp_path, monkeypatch, how):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**20)
    big = os.urandom(3_000_000)
    tiny.files["someone/Tiny"]["shard-000.tar"] = tar({"training/0.mp4": big})
    tiny.cut["shard-000.tar"] = how
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert not tiny.cut
    assert (tmp_path / "tiny/training/0.mp4").read_bytes() == big
    if how == "close":  # what had arrived is not fetched again
        assert any(range_ is not None for _, _, range_ in tiny.requests)


def test_killed_unpacking_leaves_no_half_file_and_resumes(tiny, tmp_path, monkeypatch):
    original = tarfile.TarFile.makefile

    def killed(self, member, target):
        if member.name == "validation/2.mp4":
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        original(self, member, target)

    monkeypatch.setattr(tarfile.TarFile, "makefile", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_data_set(TINY, tmp_path, tiny.url)
    assert tree(tmp_path) == {"tiny/training/0.mp4", "tiny/training/0.npz", "tiny/tiny_train.json"}
    # What a process leaves that had no time to clean up.
    state = tmp_path / "tiny" / hub.STATE
    (state / "staging").mkdir()
    (state / "staging/half.mp4").write_bytes(b"half")
    orphan = state / "downloads/.cache/huggingface/download/x.0123abcd.incomplete"
    orphan.write_bytes(b"half")
    monkeypatch.setattr(tarfile.TarFile, "makefile", original)
    tiny.requests.clear()
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert tree(tmp_path) == UNPACKED
    assert not orphan.exists() and not (state / "staging").exists()
    # The first shard was noted, the second lay there whole.
    assert [path for _, path, _ in tiny.requests] == ["/api/datasets/someone/Tiny"]


def test_few_shards_lie_on_the_disk_at_once(tiny, tmp_path, monkeypatch):
    content = {f"shard-{n}.tar": tar({f"{n}.mp4": b"v"}) for n in range(2 * PARALLEL + 1)}
    tiny.files["someone/Tiny"] = content
    seen = []

    def counting(archive, *more):
        seen.append(len(list(tmp_path.rglob("*.tar"))))
        return unpack(archive, *more)

    monkeypatch.setattr("scd.data.published.unpack", counting)
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert seen == [*range(PARALLEL, 0, -1), *range(PARALLEL, 0, -1), 1]
    assert len(list(tmp_path.rglob("*.mp4"))) == len(content)


def test_names_are_no_patterns(tiny, tmp_path):
    shards = tiny.files["someone/Tiny"]
    shards["shard-[01].tar"] = shards.pop("shard-000.tar")
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert tree(tmp_path) == UNPACKED


class Answer(Exception):
    def __init__(self, status: int):
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (Answer(404), 1),
        (Answer(500), 3),
        (Answer(503), 3),
        (OSError(28, "No space left on device"), 1),
        (ConnectionError("reset"), 3),
    ],
)
def test_only_what_may_pass_is_tried_again(tmp_path, monkeypatch, error, times):
    tried = []

    def failing(*_, **__):
        tried.append(error)
        raise error

    monkeypatch.setattr(hub, "RETRY_AFTER", (0, 0))
    monkeypatch.setattr(hub, "snapshot_download", failing)
    repository = hub.Repository("someone/Tiny", "dataset", tmp_path, "http://127.0.0.1")
    with pytest.raises(ScdError):
        repository.download([hub.HubFile("a.tar", 1, "0", None)], COMMIT)
    assert len(tried) == times


def test_files_that_do_not_arrive_are_reported(tiny, tmp_path, monkeypatch):
    """As when `snapshot_download` gets no list of files: it returns the folder as it is."""
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: None)
    with pytest.raises(ScdError, match=r"tiny_train\.json did not arrive; run it again"):
        fetch_data_set(TINY, tmp_path, tiny.url)


def special(name: str, kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (special("../escaped", tarfile.REGTYPE), "leads outside"),
        (special("a/../../escaped", tarfile.REGTYPE), "leads outside"),
        (special("/tmp/scd-escaped", tarfile.REGTYPE), "relative"),
        (special("..\\escaped", tarfile.REGTYPE), "relative"),
        (special("C:escaped", tarfile.REGTYPE), "relative"),
        (special("link", tarfile.SYMTYPE, "../.."), "a link"),
        (special("link", tarfile.LNKTYPE, "../secret"), "a link"),
        (special("null", tarfile.CHRTYPE), "device"),
        (special("disk", tarfile.BLKTYPE), "device"),
        (special("pipe", tarfile.FIFOTYPE), "device"),
        (special("a/.HUB/fetched.json", tarfile.REGTYPE), "reserved"),
        (special("bomb", tarfile.REGTYPE, size=2**33), "unexpected end of data"),
        (special("bomb", tarfile.GNUTYPE_SPARSE), "special file"),
        (special("loop", tarfile.REGTYPE, size=-1024), "negative size"),
    ],
)
def test_escaping_and_special_members_are_refused(tmp_path, member, told):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "x.tar").write_bytes(tar({"good": b"good"}, member))
    before = tree(tmp_path)
    with pytest.raises(ScdError, match=told) as caught:
        unpack(tmp_path / "x.tar", tmp_path / "in", tmp_path / "in" / hub.STATE / "staging")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before  # not even the good member
    assert not Path("/tmp/scd-escaped").exists()


def test_refused_shard_is_not_noted(tiny, tmp_path):
    bad = tar({"training/0.mp4": b"v"}, special("link", tarfile.SYMTYPE, "/"))
    tiny.files["someone/Tiny"]["shard-001.tar"] = bad
    for _ in range(2):
        with pytest.raises(ScdError, match="link"):
            fetch_data_set(TINY, tmp_path, tiny.url)
    assert not (tmp_path / "tiny/link").is_symlink()


def test_damaged_archives_are_refused(tmp_path):
    whole = tar({"a": b"a" * 600, "b": b"b" * 600})
    second = bytearray(whole)
    second[512 + 1024 + 148 : 512 + 1024 + 156] = b"7777777\0"  # the second header's checksum
    for content in (b"no tar at all" * 99, whole[:2000], bytes(second), b""):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(ScdError, match=r"tar|damaged"):
            unpack(tmp_path / "x.tar", tmp_path / "in", tmp_path / "in/s/t")
        assert tree(tmp_path) == {"x.tar"}


def test_damaged_download_is_refused_and_fetched_again(tiny, tmp_path):
    tiny.corrupt.add("shard-001.tar")
    with pytest.raises(ScdError, match="damaged"):
        fetch_data_set(TINY, tmp_path, tiny.url)
    tiny.corrupt.clear()
    fetch_data_set(TINY, tmp_path, tiny.url)
    assert tree(tmp_path) == UNPACKED


def test_full_disk_is_reported_before_anything_is_fetched(tiny, tmp_path, monkeypatch):
    free = SimpleNamespace(free=hub.RESERVE_BYTES + 20_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ScdError, match=r"needs 0\.\d MB .* only 1\.1 GB are free"):
        fetch_data_set(TINY, tmp_path, tiny.url)
    assert [path for _, path, _ in tiny.requests] == ["/api/datasets/someone/Tiny"]


def test_two_processes_do_not_fetch_into_one_folder(tiny, tmp_path):
    with holder_of(tmp_path / "tiny" / hub.STATE / "lock") as holder:
        told = f"tiny: another process is fetching into it .process {holder.pid} on "
        with pytest.raises(ScdError, match=told):
            fetch_data_set(TINY, tmp_path, tiny.url)
    fetch_data_set(TINY, tmp_path, tiny.url)


@pytest.mark.parametrize(
    ("status", "code", "token", "told"),
    [
        (401, "", None, "without token .401.: set HF_TOKEN"),
        (401, "", "hf_wrong", "refuses your token"),
        (403, "GatedRepo", None, "accept its terms at http.*/datasets/someone/Tiny"),
        (404, "RepoNotFound", None, "not found"),
        (404, "", None, "not found"),
        (500, "", None, "check the network, or set HF_ENDPOINT"),
    ],
)
def test_refusals_are_one_clear_line(tiny, tmp_path, monkeypatch, status, code, token, told):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    tiny.refuse = status, code
    with pytest.raises(ScdError, match=told) as caught:
        fetch_data_set(TINY, tmp_path, tiny.url)
    message = str(caught.value)
    assert message.startswith("dataset someone/Tiny: ")
    assert "\n" not in message and "hf_wrong" not in message


def test_repository_without_shards_or_weights(server, tmp_path):
    server.files["someone/Tiny"] = {"other.bin": b"x"}
    with pytest.raises(ScdError, match="holds no shard"):
        fetch_data_set(TINY, tmp_path, server.url)
    source = AutoencoderSource("someone/Tiny", "a-00000000.pth", str(tiny_options_file(tmp_path)))
    with pytest.raises(ScdError, match=r"holds no a-00000000\.pth"):
        fetch_autoencoder(source, tmp_path / "ae", server.url)


def test_unknown_name_lists_the_known(tmp_path, capsys):
    assert main(["fetch-data", "minecraft_latent", "mincraft", "--root", str(tmp_path / "x")]) == 1
    assert re.search(r"did you mean 'minecraft'\?.*dcae_ucf101", capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_script_without_a_server(tmp_path):
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        ["bash", "scripts/setup_data.sh", "bair", "--root", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    # Beside other programs, a note says how threads wait.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith(
        "error: dataset guyuchao/BAIR: cannot be fetched"
    )
    assert "http://127.0.0.1:9" in lines[0]


# Autoencoders.

TINY_AUTOENCODER = AutoencoderOptions(
    latent_channels=4,
    encoder_block_types=["ResBlock", "ResBlock", "EfficientViTBlock"],
    encoder_channels=[32, 32, 64],
    encoder_layers=[0, 1, 1],
    decoder_block_types=["ResBlock", "ResBlock", "EfficientViTBlock"],
    decoder_channels=[32, 32, 64],
    decoder_layers=[0, 1, 1],
    decoder_norm="batch_norm",
)


def tiny_options_file(folder: Path) -> Path:
    path = folder / "tiny.yml"
    sections = {
        "name": "tiny",
        "task": "autoencoder",
        "data": {"root": "unused", "frame_size": 64},
        "autoencoder": vars(TINY_AUTOENCODER),
        "train": {"steps": 1, "batch_size": 1},
        "eval": {"context_frames": 1, "new_frames": 1},
    }
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


@pytest.fixture
def published() -> dict[str, Tensor]:
    """A trained-looking state dict: running means and variances that matter."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(TINY_AUTOENCODER)
    for name, buffer in autoencoder.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return autoencoder.state_dict()


def saved(value: object, folder: Path) -> bytes:
    torch.save(value, folder / "saved.pth")
    return (folder / "saved.pth").read_bytes()


@torch.no_grad()
def test_published_autoencoder_is_converted_whole(server, tmp_path, published, capsys):
    content = saved(published, tmp_path)
    name = f"dcae/Tiny-{digest(content)[:8]}.pth"
    server.files["someone/Models"] = {name: content}
    source = AutoencoderSource("someone/Models", name, str(tiny_options_file(tmp_path)))
    folder = tmp_path / "pretrained/tiny"
    fetch_autoencoder(source, folder, server.url)

    codec = load_codec(str(folder))
    assert codec.autoencoder.config.scaling_factor == 0.2889
    original = build_autoencoder(TINY_AUTOENCODER).eval()
    original.load_state_dict(published)
    images = torch.rand(2, 3, 64, 64)
    latents = original.encode(images * 2 - 1).latent
    assert torch.allclose(codec.encode(images[None])[0], latents * 0.2889, atol=1e-6)
    torch.testing.assert_close(
        codec.decode(latents[None] * 0.2889)[0],
        ((original.decode(latents).sample + 1) / 2).clamp(0, 1),
    )
    server.requests.clear()
    fetch_autoencoder(source, folder, server.url)
    assert server.requests == [] and "there already" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.partial")) and not list(folder.parent.rglob("*.pth"))


def test_wrong_hash_digits_are_refused(server, tmp_path, published):
    server.files["someone/Models"] = {"Tiny-01234567.pth": saved(published, tmp_path)}
    options = str(tiny_options_file(tmp_path))
    source = AutoencoderSource("someone/Models", "Tiny-01234567.pth", options)
    with pytest.raises(ScdError, match="not the digits in its name"):
        fetch_autoencoder(source, tmp_path / "pretrained/tiny", server.url)
    assert not (tmp_path / "pretrained/tiny").exists()
    assert not list((tmp_path / "pretrained").rglob("*.pth"))


def test_state_dicts_that_do_not_fit_are_refused_with_the_differences(tmp_path, published):
    name = "encoder.conv_out.weight"
    shape = re.escape(str(tuple(published[name].shape)))
    rest = {key: tensor for key, tensor in published.items() if key != name}
    for changed, told in [
        (rest, rf"1 tensors: {name} is absent, the model's {shape}"),
        ({**published, "surplus": torch.zeros(3)}, r"surplus is \(3,\), the model's absent"),
        ({**published, name: torch.zeros(1, 2)}, rf"{name} is \(1, 2\), the model's {shape}"),
        ({**published, name: published[name] / 0}, "not finite"),
        ({"params": published}, "flat state dict"),
        ([torch.zeros(1)], "flat state dict"),
    ]:
        saved(changed, tmp_path)
        with pytest.raises(ScdError, match=told):
            convert_published(tmp_path / "saved.pth", TINY_AUTOENCODER, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_conversion_that_fails_leaves_no_folder(tmp_path, published, monkeypatch):
    """Half a folder would count as there already."""

    def full(self, folder):
        self.save_config(folder)
        raise OSError(28, "No space left on device")

    saved(published, tmp_path)
    monkeypatch.setattr("diffusers.AutoencoderDC.save_pretrained", full)
    with pytest.raises(ScdError, match=r"out: cannot be written \(No space left"):
        convert_published(tmp_path / "saved.pth", TINY_AUTOENCODER, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["saved.pth"]


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_malicious_pickles_are_not_executed(tmp_path, protocol):
    path, trap = tmp_path / "ema.pth", tmp_path / "executed"
    value = {"encoder.x_embedder.weight": Malicious(trap)}
    if protocol == "torch":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    with pytest.raises(ScdError, match="refused"):
        convert_published(path, TINY_AUTOENCODER, tmp_path / "out")
    with pytest.raises(ScdError, match="refused"):
        load_reference_checkpoint(path)
    assert not trap.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "tensors", "pixels"), [("dcae_minecraft", 306, 128), ("dcae_ucf101", 250, 64)]
)
def test_published_architectures(name, tensors, pixels):
    options = load_options(ROOT / f"options/{name}.yml")
    with torch.device("meta"):
        autoencoder = build_autoencoder(options.autoencoder).eval()
        latents = autoencoder.encode(torch.empty(1, 3, pixels, pixels)).latent
    assert len(autoencoder.state_dict()) == tensors  # the published files hold as many
    assert latents.shape == (1, 32, 8, 8)
    assert AUTOENCODERS[name].options == f"options/{name}.yml"


@pytest.mark.parametrize("path", sorted((ROOT / "options").glob("*.yml")), ids=lambda p: p.stem)
def test_options_load(path):
    assert load_options(path).name == path.stem
