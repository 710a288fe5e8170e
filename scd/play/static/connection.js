// The socket to the server: reconnects by itself, and sends commands one at a time.

import { openSocket } from "./server.js";
import { ofThisTab } from "./tab.js";

const WAITS = [0.5, 1, 2, 4]; // seconds before each attempt
const WAIT_WHEN_FULL = 10;
const TAKEN_OVER = 4409;
const FULL = 4503;
const ENDED = new Set([1009, 4400, 4401, 4408, TAKEN_OVER, 4429, 4500, 4508, 4510]);
const ALIVE = 2000; // ms between two heartbeats, until the server has sent its own value
const SILENT = 2.5; // missed heartbeats, until the page says so
const GONE = 7; // missed heartbeats, until the page reconnects
const KEPT_AS = "scd session"; // per tab: a reloaded page goes on with its session

/**
 * Listeners: `status({phase, ...})` with the phases connecting, busy (before, places),
 * loading (done, total), full (wait), open, silent, lost (wait), ended (code, reason); `hello(message)`; `state(message, command,
 * refused)`: the state after a command, and the reason if it was refused; `picture(buffer)`.
 */
export class Connection {
  session = ofThisTab.get(KEPT_AS);
  #listeners;
  #socket = null;
  #failures = 0;
  #timer = 0;
  #waiting = []; // commands
  #sent = null; // the command whose state has not arrived yet
  #refused = null;
  #alive = ALIVE;
  #heard = 0; // when the last message arrived
  #silent = false;
  #phase = null; // the status before the silence

  constructor(listeners) {
    this.#listeners = listeners;
    setInterval(() => this.#checkHeartbeat(), 500);
  }

  /** Connect now, and cancel any planned attempt. */
  open() {
    clearTimeout(this.#timer);
    this.#drop();
    this.#heard = performance.now();
    this.#report({ phase: "connecting" });
    const socket = openSocket(this.session);
    socket.onmessage = ({ data }) => {
      this.#heard = performance.now();
      this.#checkHeartbeat();
      if (typeof data === "string") this.#receive(JSON.parse(data));
      else this.#listeners.picture(data);
    };
    socket.onclose = ({ code, reason }) => this.#closed(code, reason);
    this.#socket = socket;
  }

  /** Send a message without an answer: input, seen, step. */
  send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  /** Send a command once those before it are done. */
  command(message) {
    if (!this.session || this.#socket?.readyState !== WebSocket.OPEN) return;
    const last = this.#waiting.at(-1);
    if (last?.type === "settings" && message.type === "settings") Object.assign(last, message);
    else this.#waiting.push({ ...message });
    this.#next();
  }

  /** Whether commands are waiting to be sent. */
  get waiting() {
    return this.#waiting.length > 0;
  }

  // Notice when nothing arrives any more: a socket stays open even when the network is gone.
  #checkHeartbeat() {
    if (!this.#socket) return;
    const missed = (performance.now() - this.#heard) / this.#alive;
    if (missed > GONE) {
      this.open();
    } else if (missed > SILENT !== this.#silent) {
      this.#silent = !this.#silent;
      this.#listeners.status(this.#silent ? { phase: "silent" } : this.#phase);
    }
  }

  #report(status) {
    this.#phase = status;
    this.#listeners.status(status);
  }

  #next() {
    if (this.#sent || !this.#waiting.length) return;
    this.#sent = this.#waiting.shift();
    this.send(this.#sent);
  }

  #receive(message) {
    if (message.type === "busy" || message.type === "loading") {
      this.#report({ phase: message.type, ...message });
    } else if (message.type === "hello") {
      this.session = message.session;
      ofThisTab.set(KEPT_AS, message.session);
      this.#failures = 0;
      this.#alive = 1000 * message.limits.alive_seconds;
      this.#waiting = []; // they were meant for the old state
      this.#sent = { type: "hello" }; // it is followed by a state as well
      this.#report({ phase: "open" });
      this.#listeners.hello(message);
    } else if (message.type === "refused") {
      this.#refused = message.why;
    } else if (message.type === "state") {
      const [command, refused] = [this.#sent, this.#refused];
      this.#sent = this.#refused = null;
      this.#listeners.state(message, command, refused);
      this.#next();
    }
  }

  #closed(code, reason) {
    this.#drop();
    if (ENDED.has(code)) {
      if (code !== TAKEN_OVER) this.#forget();
      this.#report({ phase: "ended", code, reason });
      return;
    }
    const wait = code === FULL ? WAIT_WHEN_FULL : WAITS[Math.min(this.#failures, WAITS.length - 1)];
    this.#failures += 1;
    this.#report({ phase: code === FULL ? "full" : "lost", wait });
    this.#timer = setTimeout(() => this.open(), 1000 * wait);
  }

  #forget() {
    this.session = null;
    ofThisTab.set(KEPT_AS, null);
  }

  #drop() {
    if (this.#socket) {
      this.#socket.onclose = this.#socket.onmessage = null;
      this.#socket.close();
    }
    this.#socket = this.#sent = this.#refused = null;
    this.#alive = ALIVE;
    this.#silent = false;
    this.#waiting = [];
  }
}
