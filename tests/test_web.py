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
from scd.evaluation.metric_weights import MetricUnavailable
from scd.flow.sampler import integrate
from scd.models import SCD, CausalDiT
from scd.models.autoencoder import PixelCodec
from scd.options import RolloutOptions
from scd.play.catalog import Catalog
from scd.play.worlds import MAX_STEPS, Pretrained, frame_seed, load_pretrained
from scd.rollout import Rollout
from scd.web import losses, site
from scd.web.graphs import check_model, make_graphs
from scd.web.onnx_export import OPSET, to_int8, to_onnx, write_onnx
from scd.web.onnx_rollout import OnnxRollout, all_levels
from scd.web.runtime import copy_runtime
from scd.web.site import FILES
from tests.play import pretrained_folder, some_start

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
def folder(tmp_path_factory, tiny_autoencoder_path) -> Path:
    return pretrained_folder(tmp_path_factory.mktemp("pretrained") / "tiny", tiny_autoencoder_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, folder) -> tuple[Pretrained, Path, list[float]]:
    pretrained = load_pretrained(folder)
    levels = all_levels(pretrained.options.rollout, range(1, 5))
    graphs = write_graphs(pretrained, tmp_path_factory.mktemp("web"), levels, 4)
    return pretrained, graphs, levels


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
        found = ours.step(action)
        assert np.isfinite(found).all()
        largest = max(largest, float(np.abs(found - expected).max()))
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


def test_int8_keeps_small_outputs_beside_large_ones(tmp_path) -> None:
    import onnx
    from onnxruntime import InferenceSession

    weight = np.random.default_rng(0).normal(size=(16, 24)) * np.logspace(-3, 3, 24)
    given, made = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [16, size])
        for name, size in (("x", 16), ("y", 24))
    )
    stored = onnx.numpy_helper.from_array(weight.astype(np.float32), "weight")
    product = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph([product], "graph", [given], [made], [stored])
    opset = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=opset)
    write_onnx(model, tmp_path / "graph.onnx", "int8")
    (y,) = InferenceSession(tmp_path / "graph.onnx").run(None, {"x": np.eye(16, dtype=np.float32)})
    assert (np.abs(y - weight) < 0.005 * np.abs(weight).max(axis=0)).all()


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


def test_guidance_by_condition_is_refused(folder) -> None:
    with pytest.raises(ScdError, match=r"set rollout\.guidance=context"):
        site.load_for_web(folder, ["rollout.guidance=condition", "rollout.guidance_scale=2.0"])


def test_weights_are_measured_against_the_engine(tiny, folder, tmp_path, monkeypatch) -> None:
    """From the same noise, so that only the weights make a difference."""
    _, graphs, _ = tiny

    def unavailable(*_: Any) -> None:
        raise MetricUnavailable("no weights")

    monkeypatch.setattr(losses, "FORMATS", ["fp32"])
    monkeypatch.setattr(losses, "STEPS", range(1, 5))  # the levels of `tiny`
    monkeypatch.setattr(losses, "onnx_graphs", lambda _: None)
    monkeypatch.setattr(
        losses, "write_graphs", lambda _, to, __: shutil.copytree(graphs, to, dirs_exist_ok=True)
    )
    monkeypatch.setattr(losses, "load_starts", lambda *_: [some_start()])
    monkeypatch.setattr(losses, "lpips_distance", unavailable)
    guided = ["rollout.guidance=context", "rollout.guidance_scale=2"]  # which a site cannot be
    table = losses.measure_formats(folder, tmp_path, 8, guided)
    quality = {row[0]: float(row[2]) for row in table.lines}
    assert quality["fp32"] > 70 > 40 > quality["another seed"]  # dB


def test_losses_are_measured_in_steps_that_the_page_has(folder) -> None:
    pretrained = site.load_for_web(folder, ["rollout.steps=20"])
    assert losses._settings(pretrained).steps == MAX_STEPS


def test_a_world_too_large_to_fetch_is_refused(folder, tmp_path, monkeypatch) -> None:
    """Its start clips count too."""
    monkeypatch.setattr(site, "MAX_DOWNLOAD", 64 * 64 * 3)  # the picture of one is as large
    monkeypatch.setattr(site, "copy_runtime", lambda *_: None)
    monkeypatch.setattr(site, "onnx_graphs", lambda _: {})
    monkeypatch.setattr(site, "load_starts", lambda *_: [some_start()])
    with pytest.raises(ScdError, match="give --weights int8"):
        site.export_site(folder, tmp_path / "site", tmp_path, "fp32")
    assert not (tmp_path / "site").exists()


def test_a_site_with_another_file_is_another_version(folder, tmp_path) -> None:
    catalog, versions = Catalog({"model": load_pretrained(folder)}, [some_start()]), []
    for number, text in enumerate(("old", "new", "old")):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "play.js").write_text(text)
        shutil.copy(FILES / "sw.js", root)
        site._write_manifest(root, catalog, "fp32")
        versions.append(json.loads((root / "manifest.json").read_text())["version"])
        assert f'VERSION = "{versions[-1]}"' in (root / "sw.js").read_text()
    assert versions[0] == versions[2] != versions[1]


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
@pytest.mark.parametrize("seed", [5, 1])  # without and with the seed's highest bit
def test_noise_is_that_of_torch(seed) -> None:
    """Several draws in a row, one of them of a number that 16 does not divide."""
    script = f"""
    import {{ frameGenerator }} from "{(FILES / "world" / "noise.js").as_uri()}";
    const generator = await frameGenerator({seed}, 24);
    console.log(JSON.stringify([512, 100, 4096].map((n) => Array.from(generator.normal(n)))));
    """
    drawn = run_node(script)
    generator = torch.Generator().manual_seed(frame_seed(seed, 24))
    for ours in drawn:
        expected = torch.randn(len(ours), generator=generator)
        assert (torch.tensor(ours) - expected).abs().max() < 2e-6


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("solver", ["euler", "multistep", "consistency"])
def test_solvers_are_those_of_python(solver) -> None:
    levels = [1.0, 0.8, 0.3, 0.0]
    drawn = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    script = f"""
    import {{ integrate }} from "{(FILES / "world" / "sampler.js").as_uri()}";
    const [noise, ...fresh] = {drawn.tolist()}.map((row) => Float32Array.from(row));
    const velocity = async (x, step) => x.map((value) => value * value / 4 - step);
    const found = await integrate(velocity, noise, {levels}, "{solver}", fresh);
    console.log(JSON.stringify(Array.from(found)));
    """
    noise, *fresh = drawn
    expected = integrate(lambda x, step: x.square() / 4 - step, noise, levels, solver, fresh)
    assert (torch.tensor(run_node(script)) - expected).abs().max() < 1e-5


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_tap_is_remembered_for_a_second_or_a_frame() -> None:
    script = f"""
    import {{ HeldAction }} from "{(FILES / "world" / "held_action.js").as_uri()}";
    const held = new HeldAction(0);
    held.update({{ action: 1, seq: 1 }}, 0);
    held.update({{ seq: 2 }}, 0.1);
    const found = [held.action(0.9, 10), held.action(1.1, 10)];
    found.push(held.action(1.9, 0.5), held.action(2.1, 0.5));
    held.clearTaps();
    found.push(held.action(0.2, 10));
    console.log(JSON.stringify(found));
    """
    assert run_node(script) == [1, 0, 1, 0, 0]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_kept_branch_stays_as_it_is() -> None:
    """Even where one plays on from its end."""
    script = f"""
    import {{ History }} from "{(FILES / "world" / "history.js").as_uri()}";
    const history = new History([{{ number: 0 }}, {{ number: 1 }}]);
    history.keep();
    history.append({{ number: 2 }});
    history.returnTo(1);
    history.append({{ number: 2 }});
    const lines = [history.timeline, ...history.branches.map(({{ frames }}) => frames)];
    console.log(JSON.stringify(lines.map((frames) => frames.map(({{ number }}) => number))));
    """
    assert run_node(script) == [[0, 1, 2], [0, 1], [0, 1, 2]]


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
    if (held > about.rollout.window) throw new Error("more held than there are slots");
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


# A session of a world that shows one picture; what it sends is in `sent`. `frame(n)` resolves when
# it is asked for the frame n, to the time in seconds; the frame `late` takes half a second.
FAKE_SESSION = """
globalThis.crypto ??= { randomUUID: () => "id" };
const rgb = new Uint8Array(3);
const sent = [];
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
  { world, about, loadStart: async () => ({ latents: [[0]], rgb }), send: (m) => sent.push(m) },
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
def test_a_page_that_connects_again_counts_from_the_beginning() -> None:
    script = f"""
    import {{ Session }} from "{(FILES / "world" / "session.js").as_uri()}";
    {FAKE_SESSION}
    session.connect(session.id);
    const pictures = sent.filter((message) => message instanceof ArrayBuffer);
    console.log(JSON.stringify(pictures.map((one) => new DataView(one).getUint32(12, true))));
    process.exit();
    """
    assert run_node(script) == [1, 1]  # the picture's serial number


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_page_that_connects_during_a_step_gets_its_frame() -> None:
    """It may be paused, and then no other would come."""
    script = f"""
    import {{ Session }} from "{(FILES / "world" / "session.js").as_uri()}";
    {FAKE_SESSION}
    const wait = (ms) => new Promise((done) => setTimeout(done, ms));
    const frames = () => sent.filter((message) => message instanceof ArrayBuffer)
      .map((one) => new DataView(one).getUint32(8, true));
    late = 1;
    session.handle({{ type: "step" }});
    await wait(100);
    session.connect(session.id);
    for (let n = 0; n < 300 && frames().length < 3; n++) await wait(10);
    console.log(JSON.stringify(frames()));
    process.exit();
    """
    assert run_node(script) == [0, 0, 1]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_new_version_gives_up_the_files_of_its_own_site_alone() -> None:
    """Other sites lie in folders beside and below it."""
    worker = (FILES / "sw.js").read_text().replace("__VERSION__", "new")
    script = f"""
    const handlers = {{}}, deleted = [];
    globalThis.location = {{ href: "https://example.org/sw.js", origin: "https://example.org" }};
    globalThis.addEventListener = (name, handler) => {{ handlers[name] = handler; }};
    globalThis.clients = {{ claim() {{}} }};
    globalThis.caches = {{
      keys: async () => ["scd / old", "scd / new", "scd /other/ old", "another"],
      delete: async (name) => deleted.push(name),
    }};
    {worker}
    await new Promise((done) => handlers.activate({{ waitUntil: (work) => work.then(done) }}));
    console.log(JSON.stringify(deleted));
    """
    assert run_node(script) == ["scd / old"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_settings_stay_until_others_are_given() -> None:
    """A start without a seed keeps it, and so do settings that are refused."""
    script = f"""
    import {{ Session }} from "{(FILES / "world" / "session.js").as_uri()}";
    {FAKE_SESSION}
    const messages = () => sent.filter((one) => typeof one === "string").map(JSON.parse);
    session.handle({{ type: "settings", seed: 5 }});
    session.handle({{ type: "start", start: "here" }});
    session.handle({{ type: "settings", seed: 10 }});
    session.handle({{ type: "settings", seed: -1 }});
    const states = () => messages().filter(({{ type }}) => type === "state");
    while (states().length < 5) await new Promise((done) => setTimeout(done, 1));
    const refused = messages().filter(({{ type }}) => type === "refused").map(({{ why }}) => why);
    console.log(JSON.stringify([states().map(({{ settings }}) => settings.seed), refused]));
    process.exit();
    """
    seeds, refused = run_node(script)
    assert seeds == [0, 5, 5, 5, 5]
    assert refused == [f"seed is {seed}, but must be between 0 and 9" for seed in (10, -1)]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_frame_of_some_temperature_is_guided_between_two_levels() -> None:
    """With a velocity of 1, and of 0 where the context is perturbed."""
    script = f"""
    import {{ World }} from "{(FILES / "world" / "world.js").as_uri()}";
    {FAKE_WORLD}
    Object.assign(about, {{ levels: [1, 0.8, 0.4], steps: {{ 3: [1, 0.8, 0.4, 0] }} }});
    about.shapes.context = [16];
    Object.assign(about.rollout, {{ temperature: 0.5, guidance_interval: [0.5, 0.9] }});
    graphs.encode = async () => (
      {{ context: 1, perturbed: 0, keys: tensor(""), values: tensor(""), dispose() {{}} }}
    );
    graphs.decode = async (x, context) => x.map(() => context);
    const world = new World(graphs, about);
    world.settings = {{ seed: 1, guidance_scale: 3, steps: 3 }};
    await world.restore([{{ number: 23, action: 0, view: {{}} }}], async () => {{}});
    console.log(JSON.stringify(Array.from((await world.step(0, 24)).latents)));
    """
    noise = torch.randn(16, generator=torch.Generator().manual_seed(frame_seed(1, 24)))
    expected = 0.5 * noise - (0.2 + 3 * 0.4 + 0.4)
    assert (torch.tensor(run_node(script)) - expected).abs().max() < 1e-5


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_only_frames_that_shape_the_window_are_encoded_again() -> None:
    """Every layer sees the four frames before one."""
    script = f"""
    import {{ World }} from "{(FILES / "world" / "world.js").as_uri()}";
    {FAKE_WORLD}
    about.layers = 2;
    const line = Array.from({{ length: 24 }}, (_, number) => (
      {{ number, action: 0, view: {{ latents: [number] }} }}
    ));
    await new World(graphs, about).restore(line, async () => {{}});
    console.log(encoded);
    """
    assert run_node(script) == 2 * 4


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
