// The worker in the place of a server: loads the world, and speaks with the page as scd play does.
//
// From the page: {open: session or null}, {message: text}, {record: {first, last}, id}.
// To the page: {data: text or buffer}, {close: {code, reason}}, {recorded: {...}, id}.

import { Files, loadManifest, url } from "./files.js";
import { chooseBackend, Graphs, runtimeFiles } from "./graphs.js";
import { Session } from "./session.js";
import { encodeVideo } from "./video.js";
import { product, World } from "./world.js";

const FAULT = 4500;
const UNABLE = 4510;
const PROGRESS = 250; // ms between two messages while loading

const send = (data) => postMessage({ data }, data instanceof ArrayBuffer ? [data] : []);
const say = (message) => send(JSON.stringify(message));
const parameters = new URL(location.href).searchParams;

let about;
let graphs;
let session = null;
let failed = null; // {code, reason}

function fail(code, error) {
  console.error(error);
  failed = { code, reason: error.message };
  postMessage({ close: failed });
}

async function load() {
  about = await loadManifest();
  setInterval(() => say({ type: "alive" }), 1000 * about.hello.limits.alive_seconds);
  const backend = await chooseBackend(parameters.get("backend"));
  const [start] = about.hello.starts;
  const wanted = [runtimeFiles(backend).wasm, `starts/${start}.latents`, `starts/${start}.rgb`];
  for (const name of ["encoder", "decoder", "picture"]) wanted.push(`graphs/${name}.onnx`);
  const total = wanted.reduce((sum, name) => sum + about.files[name].bytes, 0);
  let told = 0;
  const progress = (done) => {
    const now = performance.now();
    if (session || now - told < PROGRESS) return;
    told = now;
    say({ type: "loading", done, total });
  };
  const files = new Files(about.files, progress);
  graphs = await Graphs.load({
    backend, url, shapes: about.shapes, file: (name) => files.bytes(name),
  });
  const size = product(about.shapes.latents);
  const world = new World(graphs, about);
  const opened = new Session({
    world,
    about,
    send,
    loadStart: async (name) => {
      const raw = new Float32Array((await files.bytes(`starts/${name}.latents`)).buffer);
      const count = about.starts[name].length;
      const latents = Array.from({ length: count }, (_, i) => raw.slice(i * size, (i + 1) * size));
      return { latents, rgb: await files.bytes(`starts/${name}.rgb`) };
    },
  });
  await opened.open((error) => fail(FAULT, error));
  session = opened;
  console.info(
    `scd: ${graphs.backend}, ${graphs.threads} threads, weights in ${about.weights}, ` +
    `cache in ${world.cacheLocation}`,
  );
}

const loading = load().catch((error) => fail(UNABLE, error));

onmessage = async ({ data }) => {
  if (data.message !== undefined) session?.handle(JSON.parse(data.message));
  else if (data.record) {
    try {
      const { pictures, fps, name, first } = session.recording(data.record.first, data.record.last);
      const blob = await encodeVideo(pictures, about.hello.size, fps);
      postMessage({ recorded: { blob, name: `${name}.webm`, first }, id: data.id });
    } catch (error) {
      postMessage({ recorded: { error: error.message }, id: data.id });
    }
  } else {
    await loading;
    if (failed) postMessage({ close: failed });
    else session.connect(data.open);
  }
};
