// In the place of the server: a worker of this page. The file of the same name in scd/play/static
// says what the page needs.

import { ofThisTab } from "./tab.js";

/** Who computes the frames, as messages name it. */
export const WHO = "This browser";

const SERVED = "scd isolated"; // noted in this tab: the page has been loaded by its service worker
const UNABLE = 4510;
const LONGEST = 5000; // ms that an update is waited for

let worker = null;
let current = null; // socket
let videos = 0;
const waiting = new Map(); // id of a video -> its promise's functions

function post(message) {
  worker?.postMessage(message);
}

function receive({ data: { data, close, recorded, id } }) {
  if (recorded) {
    const [resolve, reject] = waiting.get(id);
    waiting.delete(id);
    if (recorded.error) reject(new Error(recorded.error));
    else resolve(recorded);
  } else if (close) current?.end(close);
  else current?.onmessage?.({ data });
}

// What the page uses of a WebSocket.
class WorkerSocket {
  readyState = WebSocket.OPEN;
  onmessage = null;
  onclose = null;

  send(message) {
    post({ message });
  }

  close() {
    this.readyState = WebSocket.CLOSED;
    if (current === this) current = null;
  }

  end({ code, reason }) {
    const { onclose } = this;
    this.close();
    onclose?.({ code, reason });
  }
}

// The service worker keeps the files that it serves, and adds the headers without which browsers
// share no memory between threads. The first time, the page is loaded once more, through it.
async function served() {
  const container = navigator.serviceWorker;
  if (!container) return;
  const registration = await container.register("sw.js", { updateViaCache: "none" });
  if (registration.waiting && container.controller && (await begins(registration.waiting))) {
    location.reload();
    await new Promise(() => {}); // the reload ends this page
  }
  await container.ready;
  if ((crossOriginIsolated && container.controller) || ofThisTab.get(SERVED)) return;
  // Where nothing can be noted, it would be loaded for ever.
  if (!ofThisTab.set(SERVED, "once")) return;
  location.reload();
  await new Promise(() => {}); // the reload ends this page
}

// Ask an update, fetched in an earlier visit, to take over; resolves to whether it has.
function begins(update) {
  return new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => done(false);
    navigator.serviceWorker.oncontrollerchange = () => done(true);
    setTimeout(done, LONGEST, false);
    update.postMessage("begin", [port2]);
  });
}

async function begin(socket, session) {
  try {
    if (window.scdMissing) throw new Error(window.scdMissing);
    if (!worker) {
      await served().catch((error) => console.warn("not kept for use offline:", error));
      worker = new Worker(new URL(`../world/worker.js${location.search}`, import.meta.url), {
        type: "module",
      });
      worker.onmessage = receive;
      worker.onerror = (event) => {
        const reason = event.message || "its worker did not start";
        current?.end({ code: UNABLE, reason });
        for (const [, reject] of waiting.values()) reject(new Error(reason));
        waiting.clear();
      };
    }
    if (current === socket) post({ open: session });
  } catch (error) {
    socket.end({ code: UNABLE, reason: error.message });
  }
}

/** Open a socket; with the id of an earlier session (or null), to go on with it. */
export function openSocket(session) {
  const socket = new WorkerSocket();
  current = socket;
  begin(socket, session);
  return socket;
}

/** The address of a start clip's picture. */
export function startPicture(name) {
  return new URL(`../starts/${name}.png`, import.meta.url);
}

/** Make a video of frames first..last: {blob, name, first}; `first` may be a later frame. */
export function recordVideo(session, range) {
  videos += 1;
  post({ record: range, id: videos });
  return new Promise((resolve, reject) => waiting.set(videos, [resolve, reject]));
}
