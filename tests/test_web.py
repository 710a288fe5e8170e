"""The exported graphs: onnxruntime in Python makes the frames that the rollout engine makes."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="the extra scd[web] is not installed")
pytest.importorskip("onnxruntime", reason="the extra scd[web] is not installed")

from scd.cli import main
from scd.errors import ScdError
from scd.models import SCD, CausalDiT
from scd.models.autoencoder import PixelCodec
from scd.options import RolloutOptions
from scd.play.worlds import Pretrained, frame_seed, load_pretrained
from scd.rollout import Rollout
from scd.web import site
from scd.web.graphs import check_model, make_graphs
from scd.web.onnx_export import to_int8, to_onnx, write_onnx
from scd.web.onnx_rollout import OnnxRollout, all_levels
from scd.web.runtime import copy_runtime
from scd.web.site import FILES
from tests.play import pretrained_folder

SHIPPED = Path(__file__).parent.parent / "assets/pretrained/scd_doom"
FRAMES = 100
WITHIN = 1e-3  # of latents after 100 frames


def write_graphs(pretrained: Pretrained, folder: Path, levels: list[float], window: int) -> Path:
    """Export the graphs of a model in float32."""
    size = pretrained.options.data.frame_size
    graphs = make_graphs(pretrained.model, pretrained.codec, size, window, levels)
    for name, graph in graphs.items():
        write_onnx(to_onnx(graph), folder / f"{name}.onnx", "fp32")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_autoencoder_path) -> tuple[Pretrained, Path, list[float]]:
    root = tmp_path_factory.mktemp("web")
    pretrained = load_pretrained(pretrained_folder(root / "tiny", tiny_autoencoder_path))
    levels = all_levels(pretrained.options.rollout, range(1, 5))
    return pretrained, write_graphs(pretrained, root, levels, 4), levels


def largest_difference(
    pretrained: Pretrained,
    folder: Path,
    settings: RolloutOptions,
    levels: list[float],
    frames: int,
    same_history: bool = False,
) -> float:
    """Continue three frames of noise by both, with the same generator; compare latents.

    Args:
        same_history: give every frame of the engine to both as their past, so that rounding errors
            cannot grow from frame to frame, which a trained world makes them do.
    """
    rng = torch.Generator().manual_seed(3)
    codec = pretrained.codec
    side = pretrained.options.data.frame_size // codec.downsampling
    context = torch.randn(1, 3, codec.channels, side, side, generator=rng)
    actions = torch.randint(0, 4, (frames + 3,), generator=rng).tolist()
    engine = Rollout(pretrained.model, settings)
    engine.reset(context, torch.tensor([actions[:3]]), generator=torch.Generator().manual_seed(7))
    ours = OnnxRollout(folder, settings, levels)
    ours.reset(context[0].numpy(), actions[:3], torch.Generator().manual_seed(7))
    largest = 0.0
    for action in actions[3:]:
        expected = engine.step(torch.tensor([action]))[0].numpy()
        largest = max(largest, float(np.abs(ours.step(action) - expected).max()))
        if same_history:
            ours._newest = expected[None]
    return largest


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "multistep", "sink_frames": 1},
        {"solver": "euler", "steps": 3},
        {"solver": "consistency", "steps": 3, "temperature": 0.5},
        {"guidance": "context", "guidance_scale": 1.5, "steps": 1},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_latents_are_those_of_the_engine(tiny, changes: dict[str, Any]) -> None:
    pretrained, folder, levels = tiny
    settings = replace(pretrained.options.rollout, **changes)
    frames = FRAMES if settings.sink_frames else 12
    assert largest_difference(pretrained, folder, settings, levels, frames) < WITHIN


@pytest.mark.slow
def test_each_of_100_frames_of_the_shipped_model(tmp_path) -> None:
    pretrained = load_pretrained(SHIPPED)
    settings = replace(pretrained.options.rollout, steps=2)
    levels = all_levels(settings, [2])
    folder = write_graphs(pretrained, tmp_path, levels, settings.window)
    found = largest_difference(pretrained, folder, settings, levels, FRAMES, same_history=True)
    print(f"the largest difference of latents in {FRAMES} frames is {found:.1e}")
    assert found < WITHIN


def test_levels_of_all_numbers_of_steps() -> None:
    levels = all_levels(RolloutOptions(spacing="even"), range(1, 5))
    assert levels == pytest.approx([1, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4])


def test_int8_is_within_half_a_step_of_each_output() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    values[:, 3] = 0
    rounded, scale = to_int8(values, axis=1)
    assert rounded.dtype == np.int8 and scale.shape == (1, 7)
    assert (np.abs(rounded * scale - values) <= scale / 2 + 1e-6).all()
    assert np.abs(values).max(axis=0)[0] == pytest.approx(127 * scale[0, 0])


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("causal_dit", {}, "only an SCD runs in the browser"),
        ("scd", {"encoder_frame": "noise"}, "encoder_frame is noise"),
        ("scd", {"first_frame": True}, "first_frame=true"),
        ("scd", {"condition": "label"}, "condition is label"),
    ],
)
def test_other_models_are_refused_by_name(kind: str, changes: dict[str, Any], problem: str) -> None:
    sizes = {"channels": 8, "patch_size": 4, "heads": 1, "condition": "action", "num_conditions": 4}
    layers: dict[str, int] = {"layers": 1}
    if kind == "scd":
        layers = {"encoder_layers": 1, "decoder_layers": 1}
    model = (SCD if kind == "scd" else CausalDiT)(**(sizes | layers | changes))
    with pytest.raises(ScdError, match=problem):
        check_model(model, PixelCodec(), 64, 4)


def test_another_runtime_is_refused(tmp_path) -> None:
    archive = tmp_path / "onnxruntime-web.tgz"
    archive.write_bytes(b"another")
    with pytest.raises(ScdError, match="its hash is not the pinned one"):
        copy_runtime(tmp_path / "ort", archive)
    assert not (tmp_path / "ort").exists()


def test_without_npm_it_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ScdError, match=r"npm is not installed.*--runtime"):
        copy_runtime(tmp_path / "ort", None)


def test_a_folder_of_something_else_stays(tmp_path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", str(SHIPPED), "--web", "--out", str(tmp_path)]) == 1
    assert "holds no site" in capsys.readouterr().err
    assert main(["export", str(SHIPPED), "--web"]) == 1
    assert "--out" in capsys.readouterr().err
    # Of others: an app for browsers, and a checkpoint of a training.
    for manifest in ({"name": "App", "icons": []}, {"step": 1000, "files": {}}):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ScdError, match="holds no site"):
            site._check_replaceable(tmp_path)
    # A site with what its owner has put beside it, such as its history.
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"static/play.js": {}}}))
    (tmp_path / "sw.js").touch()
    with pytest.raises(ScdError, match=r"holds more than a site \(notes\.txt\)"):
        site._check_replaceable(tmp_path)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "static").mkdir()
    (tmp_path / "static/play.js").touch()
    site._check_replaceable(tmp_path)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("fps", [1, 10, 60])
def test_times_of_recordings(fps) -> None:
    """WebM has them in 16 bits from the beginning of their cluster, which a key frame begins."""
    script = f"""
    import {{ encodeVideo }} from "{(FILES / "world" / "video.js").as_uri()}";
    globalThis.self = globalThis;
    globalThis.VideoFrame = class {{ close() {{}} }};
    globalThis.VideoEncoder = class {{
      static async isConfigSupported() {{ return {{ supported: true }}; }}
      constructor({{ output }}) {{ this.output = output; }}
      configure() {{}}
      close() {{}}
      async flush() {{}}
      encode(frame, {{ keyFrame }}) {{
        const type = keyFrame ? "key" : "delta";
        this.output({{ byteLength: 4, type, copyTo: (to) => to.set([77, 77, 77, 77]) }});
      }}
    }};
    const video = await encodeVideo(Array(130).fill(new Uint8Array(3 * 64)), 8, {fps});
    console.log(JSON.stringify(Array.from(new Uint8Array(await video.arrayBuffer()))));
    """
    data = bytes(run_node(script))
    # A cluster begins with its time (e7); a block is its track, time, flags and data.
    found = re.finditer(rb"\xe7\x01\0{6}(?P<n>.)|\x81(?P<time>..)(?P<key>[\x80\0])MMMM", data, re.S)
    began, times, starts = 0, [], True
    for match in found:
        if match["time"] is None:
            size, at = match["n"][0], match.end()
            began, starts = int.from_bytes(data[at : at + size], "big"), True
        else:
            times.append(began + int.from_bytes(match["time"], "big", signed=True))
            assert (match["key"] == b"\x80") == starts
            starts = False
    assert times == [round(1000 * i / fps) for i in range(130)]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_noise_is_that_of_torch() -> None:
    """Several draws in a row, one of them of a number that 16 does not divide."""
    script = f"""
    import {{ frameGenerator }} from "{(FILES / "world" / "noise.js").as_uri()}";
    const generator = await frameGenerator(5, 24);
    console.log(JSON.stringify([512, 100, 4096].map((n) => Array.from(generator.normal(n)))));
    """
    drawn = run_node(script)
    generator = torch.Generator().manual_seed(frame_seed(5, 24))
    for ours in drawn:
        expected = torch.randn(len(ours), generator=generator)
        assert (torch.tensor(ours) - expected).abs().max() < 2e-6


def run_node(script: str) -> Any:
    """Run a script as a module; give the JSON that it prints."""
    command = ["node", "--input-type=module", "--no-warnings", "-e", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Graphs whose cache is the text of all that was encoded, and of which a frame is the length: what
# is encoded from another past is another frame. None is used after it was freed.
FAKE_WORLD = """
const sum = (text) => [...text].reduce((all, c) => (31 * all + c.charCodeAt(0)) % 65521, 7);
let encoded = 0;
const alive = new Set();
function tensor(text) { const one = { text }; alive.add(one); return one; }
function used(...tensors) {
  for (const one of tensors) if (!alive.has(one)) throw new Error("used after it was freed");
}
const graphs = {
  emptyCache: () => tensor(""),
  free: (...tensors) => tensors.forEach((one) => alive.delete(one)),
  async encode({ latents, action, slot, held, keys, values }) {
    used(keys, values);
    encoded += 1;
    const text = `${keys.text} ${latents},${action},${slot},${held}`;
    const context = tensor(text);
    const dispose = () => graphs.free(context);
    return { context, perturbed: null, keys: tensor(text), values: tensor(text), dispose };
  },
  async decode(x, context, action) {
    used(context);
    return x.map((value) => value - sum(`${context.text} ${action}`));
  },
  async picture(latents) { return latents[0]; },
};
const about = {
  layers: 1000, levels: [1], steps: { 1: [1, 0] }, rotary: { theta: 10000, dims: 16 },
  shapes: { latents: [16], context: [1] },
  rollout: {
    solver: "euler", temperature: 1, guidance_noise: 0, guidance_interval: [0, 1], window: 5,
    sink_frames: 0,
  },
};
"""


# A session of a world that shows one picture. `frame(n)` resolves when it is asked for the frame n,
# to the time in seconds; the frame `late` takes half a second.
FAKE_SESSION = """
globalThis.crypto ??= { randomUUID: () => "id" };
const rgb = new Uint8Array(3);
let late = 0;
const asked = {}, waiting = {};
const frame = (n) => asked[n] ?? new Promise((done) => (waiting[n] = done));
const world = {
  async restore() {},
  async step(action, number) {
    asked[number] = performance.now() / 1000;
    if (number === late) await new Promise((done) => setTimeout(done, 500));
    waiting[number]?.(asked[number]);
    return { latents: [0], rgb, times: [0, 0, 0] };
  },
};
const about = {
  starts: { here: [0] }, settings: { seed: 0, steps: 1, guidance_scale: 1 }, fps: 5,
  hello: {
    starts: ["here"], idle: 0, worlds: ["model"], size: 1, protocol: 2,
    limits: { alive_seconds: 2, unseen: 1000, fps: [1, 60], seed: [0, 9] },
  },
};
const session = new Session(
  { world, about, loadStart: async () => ({ latents: [[0]], rgb }), send() {} },
);
await session.open((error) => { throw error; });
session.connect(null);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_clock_of_frames() -> None:
    """Single steps leave it alone, and no burst follows a late frame; as test_play_server.py."""
    script = f"""
    import {{ Session }} from "{(FILES / "world" / "session.js").as_uri()}";
    {FAKE_SESSION}
    for (let n = 1; n <= 20; n++) {{
      session.handle({{ type: "step" }});
      await frame(n);
    }}
    const begun = performance.now() / 1000;
    late = 23;
    session.handle({{ type: "pause", paused: false }});
    const times = [];
    for (let n = 21; n <= 28; n++) times.push(await frame(n) - begun);
    console.log(JSON.stringify(times));
    process.exit();
    """
    times = run_node(script)
    assert times[0] < 2  # a fifth of a second, on an idle machine
    after = np.diff(times[2:])  # frame 23 takes two and a half frames' time
    assert after[0] >= 0.49 and after[1:].min() > 0.05


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_going_back_continues_from_a_kept_cache() -> None:
    """The frames are the same as before, few are encoded again, and no memory is lost."""
    script = f"""
    import {{ World }} from "{(FILES / "world" / "world.js").as_uri()}";
    {FAKE_WORLD}
    const world = new World(graphs, about);
    world.settings = {{ seed: 1, guidance_scale: 1, steps: 1 }};
    const line = Array.from({{ length: 24 }}, (_, i) => (
      {{ number: i, action: i % 4, view: {{ latents: Float32Array.of(i) }} }}
    ));
    async function play(frames, action) {{
      for (let i = 0; i < frames; i++) {{
        const number = line.length;
        line.push({{ number, action, view: await world.step(action, number) }});
      }}
      return line.slice(-frames).map(({{ view }}) => view.rgb);
    }}
    const counts = [];
    async function back(frame) {{
      line.length = frame + 1;
      encoded = 0;
      await world.restore(line, async () => {{}});
      counts.push(encoded);
    }}
    await back(23);
    const first = await play(80, 3);
    await back(60);
    const other = await play(20, 2);
    await back(60);
    const again = await play(43, 3);
    await play(300, 3); // the first caches are given up
    await back(60);
    const anew = await play(43, 3);
    await back(60);
    console.log(JSON.stringify({{ first, other, again, anew, counts, alive: alive.size }}));
    """
    found = run_node(script)
    first = found["first"][-43:]
    assert found["again"] == first and found["anew"] == first
    assert not set(found["other"]) & set(first)
    assert found["counts"] == [23, 60 % 16, 60 % 16, 60, 60 % 16]
    assert found["alive"] <= 2 * (8 + 1)
