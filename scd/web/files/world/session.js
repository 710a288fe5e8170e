// The player's session: messages in, pictures out, at the chosen frames per second, as
// scd/play/session.py. The messages are those of scd/play/README.md.

import { HeldAction } from "./held_action.js";
import { History, Refusal } from "./history.js";

const [GIVEN, AGAIN] = [1, 2]; // flags of a picture
const HEADER = 24;
const WORLD_HEADER = 16;
// A longer gap between two frames is a pause: in seconds, and in gaps of this timeline.
const [PAUSE, PAUSE_GAPS] = [1, 3];
const WAITING_STEPS = 16; // at most

const seconds = () => performance.now() / 1000;

/** Let messages arrive, and heartbeats leave: a world that computes has no pause of its own. */
function breathe() {
  return new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), done());
    port2.postMessage(null);
  });
}

export class Session {
  id = crypto.randomUUID();
  paused = true;
  #world;
  #about;
  #loadStart;
  #send;
  #history;
  #start = null;
  #settings;
  #fps;
  #held;
  #commands = [];
  #steps = 0; // single ones that wait to be made
  #serial = 0;
  #seen = 0;
  #nextFrameAt = 0;
  #wakeUp = () => {};
  #connection = 0;

  /**
   * `about`: the manifest. `loadStart(name)` resolves to {latents: one array a frame, rgb}; `send`
   * takes strings and array buffers.
   */
  constructor({ world, about, loadStart, send }) {
    this.#world = world;
    this.#about = about;
    this.#loadStart = loadStart;
    this.#send = send;
    this.#settings = { ...about.settings };
    this.#fps = about.fps;
  }

  /** Begin at the first start clip, and play; `failed(error)` is called if that ends. */
  async open(failed) {
    await this.#begin(this.#about.hello.starts[0], this.#settings.seed);
    this.#play().catch(failed);
  }

  /** Greet a page that connects. */
  connect(wanted) {
    this.#connection += 1;
    this.#held = new HeldAction(this.#about.hello.idle);
    this.#commands = [];
    this.#steps = 0;
    this.#serial = this.#seen = 0;
    const resumed = wanted === this.id;
    this.#say({ type: "hello", session: this.id, resumed, ...this.#about.hello });
    this.#sendState();
    this.#sendPicture(AGAIN);
    this.#wake();
  }

  /** Handle a message at once if it needs no work, else queue it as a command. */
  handle(message) {
    if (message.type === "seen") this.#seen = message.serial;
    else if (message.type === "input") this.#held.update(message, seconds());
    else if (message.type === "step") this.#steps = Math.min(this.#steps + 1, WAITING_STEPS);
    else this.#commands.push(message);
    this.#wake();
  }

  /** What a video of frames first..last needs: {pictures, fps, name, first}. */
  recording(first, last) {
    const frames = this.#history.timeline.filter(({ number: n }) => first <= n && n <= last);
    const pictures = frames.filter(({ view }) => view.rgb);
    if (!pictures.length) throw new Error("no such frames");
    const [from, to] = [pictures[0].number, pictures.at(-1).number];
    return {
      pictures: pictures.map(({ view }) => view.rgb),
      fps: Math.min(playedFps(pictures) ?? this.#fps, this.#about.hello.limits.fps[1]),
      name: `${this.#start.name}-${from}-${to}`,
      first: from,
    };
  }

  #wake() {
    this.#wakeUp();
  }

  /** Execute commands, and generate frames when they are due; never ends. */
  async #play() {
    for (;;) {
      await breathe();
      if (!this.#connection) {
        await this.#message(this.#about.hello.limits.alive_seconds);
        continue;
      }
      if (this.#commands.length) {
        await this.#execute(this.#commands.shift());
        continue;
      }
      const now = seconds();
      let wait = this.#about.hello.limits.alive_seconds;
      const action = this.#held.action(now, this.#fps);
      if (action === null) this.#steps = 0; // the world waits for a key
      const wanted = action !== null && (this.#steps > 0 || !this.paused);
      if (wanted && this.#serial - this.#seen < this.#about.hello.limits.unseen) {
        if (this.#steps > 0 || this.#nextFrameAt <= now) {
          await this.#step(now, action);
          continue;
        }
        wait = Math.min(wait, this.#nextFrameAt - now);
      }
      await this.#message(wait);
    }
  }

  /** Wait for a message, at most so many seconds. */
  async #message(seconds) {
    await new Promise((done) => {
      const timer = setTimeout(done, 1000 * seconds);
      this.#wakeUp = () => (clearTimeout(timer), done());
    });
    this.#wakeUp = () => {};
  }

  async #step(now, action) {
    // A frame that is a little late keeps the rhythm. After a later one, or a single step, it
    // begins anew, so that the following frames do not come in a burst.
    const late = now - this.#nextFrameAt;
    const anew = this.#steps > 0 || late > 0.5 / this.#fps;
    this.#nextFrameAt = (anew ? now : this.#nextFrameAt) + 1 / this.#fps;
    this.#steps = Math.max(this.#steps - 1, 0);
    const [seq, connection] = [this.#held.seq, this.#connection];
    this.#held.clearTaps();
    const number = this.#history.newest.number + 1;
    const view = await this.#world.step(action, number);
    this.#history.append({ number, action, view, made: seconds() });
    if (connection === this.#connection) this.#sendPicture(0, seq, 1000 * (seconds() - now));
    else this.#sendPicture(AGAIN); // to a page that connected meanwhile, and may be paused
  }

  async #execute(message) {
    const shown = this.#history.newest;
    try {
      await this.#obey(message);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      this.#say({ type: "refused", what: message.type, why: error.message });
    }
    this.#sendState();
    if (this.#history.newest !== shown) this.#sendPicture(AGAIN);
  }

  async #obey(message) {
    if (message.type === "pause") this.paused = message.paused;
    else if (message.type === "start") {
      await this.#begin(message.start, message.seed ?? this.#settings.seed);
    } else if (message.type === "settings") this.#change(message);
    else if (message.type === "keep") this.#history.keep();
    else {
      if (message.type === "rewind") this.#history.rewind(message.frame);
      else this.#history.returnTo(message.branch);
      await this.#restore();
    }
  }

  async #begin(name, seed) {
    const actions = this.#about.starts[name];
    if (!actions) throw new Refusal(`no start ${name}`);
    const { latents, rgb } = await this.#loadStart(name).catch((error) => {
      throw new Refusal(`the start ${name} could not be loaded: ${error.message}`);
    });
    this.#change({ seed });
    this.#start = { name, given: actions.length };
    const views = latents.map((one) => ({ latents: one, rgb: null, times: [0, 0, 0] }));
    views.at(-1).rgb = rgb; // play never goes back behind it
    this.#history = new History(
      views.map((view, number) => ({ number, action: actions[number], view, made: null })),
    );
    await this.#restore();
  }

  #restore() {
    return this.#world.restore(this.#history.timeline, breathe);
  }

  #change(changes) {
    const { limits } = this.#about.hello;
    const next = { ...this.#settings, fps: this.#fps };
    for (const name of Object.keys(next)) {
      if (changes[name] === undefined) continue;
      const [low, high] = limits[name];
      if (!(low <= changes[name] && changes[name] <= high)) {
        throw new Refusal(`${name} is ${changes[name]}, but must be between ${low} and ${high}`);
      }
      next[name] = changes[name];
    }
    ({ fps: this.#fps, ...this.#settings } = next);
    this.#world.settings = this.#settings;
  }

  #sendState() {
    const history = this.#history;
    const branches = history.branches.map((branch) => ({
      branch: branch.number,
      frame: branch.frames.at(-1).number,
      shared: history.lastShared(branch),
      kept: branch.kept,
    }));
    this.#say({
      type: "state", paused: this.paused, fps: this.#fps, start: this.#start.name,
      given: this.#start.given, worlds: this.#about.hello.worlds, settings: this.#settings,
      frame: history.newest.number, oldest: history.oldest, branches,
    });
  }

  #say(message) {
    this.#send(JSON.stringify(message));
  }

  #sendPicture(flags, seq = 0, made = 0) {
    const { number, action, view, made: madeAt } = this.#history.newest;
    const { size, protocol } = this.#about.hello;
    const given = madeAt === null ? GIVEN : 0;
    const buffer = new ArrayBuffer(HEADER + WORLD_HEADER + view.rgb.length);
    const data = new DataView(buffer);
    this.#serial += 1;
    [protocol, 1, action, flags | given].forEach((value, at) => data.setUint8(at, value));
    data.setUint16(4, size, true);
    data.setUint16(6, size, true);
    [number, this.#serial, seq].forEach((value, i) => data.setUint32(8 + 4 * i, value, true));
    data.setFloat32(20, made, true);
    view.times.forEach((ms, i) => data.setFloat32(HEADER + 4 + 4 * i, ms, true));
    new Uint8Array(buffer, HEADER + WORLD_HEADER).set(view.rgb);
    this.#send(buffer);
  }
}

/** The median frames per second of play without pauses; null: fewer than two frames were played. */
function playedFps(frames) {
  const made = frames.map((frame) => frame.made).filter((at) => at !== null);
  const gaps = made.slice(1).map((at, i) => at - made[i]).filter((gap) => gap > 0);
  if (!gaps.length) return null;
  const median = (sorted) => sorted[Math.floor(sorted.length / 2)];
  gaps.sort((a, b) => a - b);
  const longest = Math.max(PAUSE, PAUSE_GAPS * median(gaps));
  return 1 / median(gaps.filter((gap) => gap <= longest));
}
