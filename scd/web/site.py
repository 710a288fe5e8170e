"""`scd export --web`: a folder of static files with the world of `scd play` in it."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scd.errors import ScdError
from scd.flow.sampler import noise_levels
from scd.models.load import load_checkpoint_for_use, options_for_use
from scd.models.rotary import ROTARY_DIMS, ROTARY_THETA
from scd.play.access import Limits
from scd.play.catalog import Catalog
from scd.play.recording import start_thumbnail
from scd.play.server import STATIC as PAGE
from scd.play.session import offers
from scd.play.starts import Start, load_starts
from scd.play.worlds import MAX_STEPS, Pretrained, check_playable
from scd.utils.files import read_json, sha256, write_folder_atomically
from scd.web.graphs import check_model, make_graphs
from scd.web.onnx_export import Format, to_onnx, write_onnx
from scd.web.onnx_rollout import all_levels
from scd.web.runtime import copy_runtime

FILES = Path(__file__).parent / "files"
MANIFEST = "manifest.json"
UNLISTED = ("sw.js", ".nojekyll")  # files that the manifest does not list, beside itself
MAX_DOWNLOAD = 20_000_000  # bytes of a world, without the runtime
STEPS = range(1, MAX_STEPS + 1)
FEWEST_NUMBERS = 16  # of a frame's noise: torch draws fewer in another way
SCRIPT = '<script type="module" src="static/play.js"></script>'
# What the page must not do without a server's headers: fetch or run anything from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; style-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self' blob:; "
    "worker-src 'self' blob:; base-uri 'none'; form-action 'none'"
)


def load_for_web(path: Path, overrides: list[str]) -> Pretrained:
    """Load a checkpoint or an exported folder, in float32, on the CPU.

    Raises:
        ScdError: it is missing or damaged, or the browser cannot run it.
    """
    overrides = [*overrides, "rollout.precision=fp32"]
    check_playable(options_for_use(path, None, overrides), path)
    loaded = load_checkpoint_for_use(path, None, overrides)
    options, model = loaded.options, loaded.model.to("cpu").requires_grad_(False)
    pretrained = Pretrained(path, model.float(), loaded.codec.to("cpu"), options)
    sizes = check_model(model, loaded.codec, options.data.frame_size, options.rollout.window)
    if pretrained.guidance == "condition":
        raise ScdError("web: the browser only guides by context: set rollout.guidance=context")
    if np.prod(sizes.latents) < FEWEST_NUMBERS:
        raise ScdError(f"web: a frame has fewer than {FEWEST_NUMBERS} latents")
    return pretrained


def export_site(
    path: Path,
    folder: Path,
    starts: Path,
    weights: Format,
    runtime: Path | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Write the site, in place of an older one, and print its size.

    Args:
        starts: folder of start clips, as `scd starts` writes it.
        weights: how the graphs' weights are stored.
        runtime: the archive of onnxruntime-web; None: npm fetches it.

    Raises:
        ScdError: the model, the clips or the runtime are missing or do not fit, the world is larger
            than `MAX_DOWNLOAD`, or the folder holds something else.
    """
    _check_replaceable(folder)
    pretrained = load_for_web(path, overrides or [])
    data = pretrained.options.data
    clips = load_starts(starts, data.frame_size, len(data.action_names))

    def write(aside: Path) -> None:
        copy_runtime(aside / "ort", runtime)
        write_graphs(onnx_graphs(pretrained), aside / "graphs", weights)
        _write_starts(pretrained, clips, aside / "starts")
        _check_size(folder, _bytes(aside / "graphs") + _bytes(aside / "starts"))
        _write_page(aside)
        _write_manifest(aside, Catalog({"model": pretrained}, clips), weights)

    write_folder_atomically(folder, write)
    parts = {part: _bytes(folder / part) for part in ("graphs", "starts", "ort")}
    shown = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in parts.items())
    print(f"{folder}: {_bytes(folder) / 1e6:.1f} MB ({shown}), weights in {weights}")
    print(f"try it: python -m http.server -d {folder}")


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that holds anything else than a site."""
    if not folder.exists():
        return
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not (folder / "sw.js").is_file():
        raise ScdError(f"{folder} exists and holds no site: choose another folder")
    own = {*listed, MANIFEST, *UNLISTED}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in own:
            raise ScdError(
                f"{folder}: holds more than a site ({name}): choose another folder, and copy the "
                f"site from there"
            )


def onnx_graphs(pretrained: Pretrained) -> dict[str, Any]:
    """Translate the three graphs of a model to ONNX, by name."""
    options = pretrained.options
    rollout = options.rollout
    graphs = make_graphs(
        pretrained.model,
        pretrained.codec,
        options.data.frame_size,
        rollout.window,
        all_levels(rollout, STEPS),
    )
    return {name: to_onnx(graph) for name, graph in graphs.items()}


def write_graphs(graphs: dict[str, Any], folder: Path, weights: Format) -> None:
    """Write graphs, as `OnnxRollout` and the worker read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in graphs.items():
        write_onnx(model, folder / f"{name}.onnx", weights)


def start_latents(pretrained: Pretrained, start: Start) -> np.ndarray:
    """Encode a start clip to latents (K, C, H, W), as `scd.play.worlds.ModelWorld` does."""
    video = torch.from_numpy(start.frames).movedim(-1, 1)[None].float() / 255
    return pretrained.codec.encode(video)[0].numpy()


def _write_starts(pretrained: Pretrained, clips: list[Start], folder: Path) -> None:
    folder.mkdir()
    for start in clips:
        latents = start_latents(pretrained, start).astype("<f4")
        (folder / f"{start.name}.latents").write_bytes(latents.tobytes())
        (folder / f"{start.name}.rgb").write_bytes(start.frames[-1].tobytes())
        (folder / f"{start.name}.png").write_bytes(start_thumbnail(start))


def _check_size(folder: Path, size: int) -> None:
    if size > MAX_DOWNLOAD:
        raise ScdError(
            f"{folder}: the world takes {size / 1e6:.1f} MB, more than "
            f"{MAX_DOWNLOAD / 1e6:.0f}: give --weights int8"
        )


def _write_page(folder: Path) -> None:
    """Copy the page of `scd play`; only its `server.js` is another."""
    shutil.copytree(PAGE, folder / "static")
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    page = (folder / "static" / "index.html").read_text(encoding="utf-8")
    assert page.count(SCRIPT) == 1, "the page has changed"
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'  <script src="static/needs.js"></script>\n  {SCRIPT}'
    )
    (folder / "index.html").write_text(page.replace(SCRIPT, head), encoding="utf-8")
    (folder / "static" / "index.html").unlink()
    (folder / ".nojekyll").touch()  # or GitHub Pages leaves out files


def _write_manifest(folder: Path, catalog: Catalog, weights: Format) -> None:
    """Write what the worker needs to know, and the service worker that keeps all files."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNLISTED
    }
    version = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    pretrained = catalog.first
    rollout, options = pretrained.options.rollout, pretrained.options
    sizes = check_model(pretrained.model, pretrained.codec, options.data.frame_size, rollout.window)
    manifest: dict[str, Any] = {
        "version": version,
        "weights": weights,
        "hello": offers(catalog, Limits()),
        "settings": asdict(catalog.settings),
        "fps": Limits().fps,
        "rollout": {
            "solver": rollout.solver,
            "temperature": rollout.temperature,
            "guidance_noise": rollout.guidance_noise,
            "guidance_interval": rollout.guidance_interval,
            "window": rollout.window,
            "sink_frames": rollout.sink_frames,
        },
        "rotary": {"theta": ROTARY_THETA, "dims": ROTARY_DIMS[0]},
        "levels": all_levels(rollout, STEPS),
        "steps": {n: noise_levels(n, rollout.spacing, rollout.shift) for n in STEPS},
        "shapes": {"latents": sizes.latents, "context": sizes.context, "cache": sizes.cache},
        "layers": pretrained.model.config.encoder_layers,
        "starts": {start.name: start.actions for start in catalog.starts},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    worker = (folder / "sw.js").read_text(encoding="utf-8")
    small = ("static", "world", "starts")
    names = json.dumps([name for name in files if name.partition("/")[0] in small])
    worker = worker.replace("__VERSION__", version).replace('"__FILES__"', names)
    (folder / "sw.js").write_text(worker, encoding="utf-8")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
