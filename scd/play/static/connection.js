// The websocket: it opens again by itself after a break, and sends commands one at a time.

const WAITS = [0.5, 1, 2, 4]; // seconds before each new try
const WAIT_WHEN_FULL = 10;
const TAKEN_OVER = 4409;
const FULL = 4503;
const ENDED = new Set([1009, 4400, 4401, 4408, TAKEN_OVER, 4429, 4500, 4508]);
const ALIVE = 2000; // ms between two signs of life, until the server has told its own
const SILENT = 2.5; // signs of life that fail to come, until that is said
const GONE = 7; // until another connection is tried
const KEPT_AS = "scd session"; // for this tab: a page loaded anew goes on with its session

/** An address of the server, with the token that this page's own address holds. */
export function address(path, parameters = {}) {
  const url = new URL(path, location.origin);
  const token = new URLSearchParams(location.search).get("token");
  const all = token === null ? parameters : { ...parameters, token };
  for (const [name, value] of Object.entries(all)) url.searchParams.set(name, value);
  return url;
}

/**
 * Listeners: `status({phase, ...})` with the phases connecting, busy (before, places), full (wait),
 * open, silent, lost (wait), ended (code, reason); `hello(message)`; `state(message, command, refused)`: what
 * the command led to, and why it could not be done, if so; `picture(buffer)`.
 */
export class Connection {
  session = sessionStorage.getItem(KEPT_AS);
  #listeners;
  #socket = null;
  #failures = 0;
  #timer = 0;
  #waiting = []; // commands
  #asked = null; // the command whose state has not come yet
  #refused = null;
  #alive = ALIVE;
  #heard = 0; // when something came last
  #silent = false;
  #phase = null; // what the status was before the silence

  constructor(listeners) {
    this.#listeners = listeners;
    setInterval(() => this.#listen(), 500);
  }

  /** Connect now, whatever was planned. */
  open() {
    clearTimeout(this.#timer);
    this.#drop();
    this.#heard = performance.now();
    this.#tell({ phase: "connecting" });
    const url = address("/ws", this.session ? { session: this.session } : {});
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => {
      this.#heard = performance.now();
      this.#listen();
      if (typeof data === "string") this.#take(JSON.parse(data));
      else this.#listeners.picture(data);
    };
    socket.onclose = ({ code, reason }) => this.#closed(code, reason);
    this.#socket = socket;
  }

  /** Send what has no answer: input, seen, step. */
  send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  /** Send a command when those before it are done. */
  command(message) {
    if (!this.session || this.#socket?.readyState !== WebSocket.OPEN) return;
    const last = this.#waiting.at(-1);
    if (last?.type === "settings" && message.type === "settings") Object.assign(last, message);
    else this.#waiting.push({ ...message });
    this.#next();
  }

  /** Whether commands are to be sent yet. */
  get waiting() {
    return this.#waiting.length > 0;
  }

  // Say so when nothing comes any more; the network may be gone though the socket looks open.
  #listen() {
    if (!this.#socket) return;
    const missed = (performance.now() - this.#heard) / this.#alive;
    if (missed > GONE) {
      this.open();
    } else if (missed > SILENT !== this.#silent) {
      this.#silent = !this.#silent;
      this.#listeners.status(this.#silent ? { phase: "silent" } : this.#phase);
    }
  }

  #tell(status) {
    this.#phase = status;
    this.#listeners.status(status);
  }

  #next() {
    if (this.#asked || !this.#waiting.length) return;
    this.#asked = this.#waiting.shift();
    this.send(this.#asked);
  }

  #take(message) {
    if (message.type === "busy") {
      this.#tell({ phase: "busy", ...message });
    } else if (message.type === "hello") {
      this.session = message.session;
      sessionStorage.setItem(KEPT_AS, message.session);
      this.#failures = 0;
      this.#alive = 1000 * message.limits.alive_seconds;
      this.#waiting = []; // they were meant for what was there before
      this.#asked = { type: "hello" }; // a state follows it too
      this.#tell({ phase: "open" });
      this.#listeners.hello(message);
    } else if (message.type === "refused") {
      this.#refused = message.why;
    } else if (message.type === "state") {
      const [command, refused] = [this.#asked, this.#refused];
      this.#asked = this.#refused = null;
      this.#listeners.state(message, command, refused);
      this.#next();
    }
  }

  #closed(code, reason) {
    this.#drop();
    if (ENDED.has(code)) {
      if (code !== TAKEN_OVER) this.#forget();
      this.#tell({ phase: "ended", code, reason });
      return;
    }
    const wait = code === FULL ? WAIT_WHEN_FULL : WAITS[Math.min(this.#failures, WAITS.length - 1)];
    this.#failures += 1;
    this.#tell({ phase: code === FULL ? "full" : "lost", wait });
    this.#timer = setTimeout(() => this.open(), 1000 * wait);
  }

  #forget() {
    this.session = null;
    sessionStorage.removeItem(KEPT_AS);
  }

  #drop() {
    if (this.#socket) {
      this.#socket.onclose = this.#socket.onmessage = null;
      this.#socket.close();
    }
    this.#socket = this.#asked = this.#refused = null;
    this.#alive = ALIVE;
    this.#silent = false;
    this.#waiting = [];
  }
}
