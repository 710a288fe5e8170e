// The world of a model: a rollout with a sliding window, as scd.play.worlds.ModelWorld and
// scd.web.onnx_rollout are in Python.

import { frameGenerator } from "./noise.js";
import { guide, integrate } from "./sampler.js";

// Going back starts from the newest of some earlier caches: without one, all frames are encoded
// again that shaped the window.
const KEPT_EVERY = 16; // frames
const MOST_KEPT = 8; // caches

/** A frame is a function of the past, its action, the settings and (seed, frame number) alone. */
export class World {
  #graphs;
  #about;
  #keys;
  #values;
  #frames = 0; // in the cache, and those that have left it
  #newest = null; // view, not in the cache yet
  #kept = []; // {keys, values, frames, newest}, the oldest first
  #settings;

  /** `graphs` as graphs.js makes them; `about`: the site's manifest. */
  constructor(graphs, about) {
    this.#graphs = graphs;
    this.#about = about;
  }

  /** Take other settings, from the next frame on. */
  set settings(settings) {
    this.#settings = settings;
  }

  /** Where the cache is: "gpu-buffer" or "cpu". */
  get cacheLocation() {
    return this.#keys.location;
  }

  /**
   * Go to the last of some frames {action, view: {latents}}, whose first is the timeline's oldest;
   * `breathe()` is awaited after every frame that is encoded.
   */
  async restore(past, breathe) {
    const newest = past.at(-1).view;
    if (newest === this.#newest) return;
    const { layers, rollout } = this.#about;
    // Frames that have left the window shaped those in it: every layer reaches one window further.
    const reach = layers * (rollout.window - 1) + 1;
    const known = past.slice(-reach);
    const from = known.findLastIndex(({ view }) => this.#keptBefore(view));
    const { keys, values, frames } = this.#keptBefore(known[from]?.view) ?? this.#empty();
    this.#replace(keys, values, frames);
    for (let i = Math.max(from, 0); i + 1 < known.length; i++) {
      this.#newest = known[i].view;
      const contexts = await this.#encode(known[i + 1].action, null);
      contexts.dispose();
      await breathe();
    }
    this.#newest = newest;
  }

  /** Generate frame `number` under an action: {latents, rgb, times}. */
  async step(action, number) {
    const { rollout, levels, steps, shapes } = this.#about;
    const s = this.#settings;
    const generator = await frameGenerator(s.seed, number);
    const begun = performance.now();
    const schedule = steps[s.steps];
    const size = product(shapes.latents);
    const draw = (count) => generator.normal(count).map((value) => rollout.temperature * value);
    const noise = draw(size);
    let fresh = [];
    if (rollout.solver === "consistency" && s.steps > 1) {
      const drawn = draw(size * (s.steps - 1));
      fresh = schedule.slice(2).map((_, i) => drawn.subarray(i * size, (i + 1) * size));
    }
    const guided = s.guidance_scale !== 1;
    const perturbation = guided
      ? generator.normal(product(shapes.context)).map((value) => rollout.guidance_noise * value)
      : null;
    const contexts = await this.#encode(action, perturbation);
    const encoded = performance.now();

    const [lowest, highest] = rollout.guidance_interval;
    const velocity = async (x, step) => {
      const level = levels.indexOf(schedule[step]);
      const at = (context) => this.#graphs.decode(x, context, action, level);
      const positive = await at(contexts.context);
      if (!guided || schedule[step] < lowest || schedule[step] > highest) return positive;
      return guide(positive, await at(contexts.perturbed), s.guidance_scale);
    };
    const latents = await integrate(velocity, noise, schedule, rollout.solver, fresh);
    contexts.dispose();
    const denoised = performance.now();
    const rgb = await this.#graphs.picture(latents);
    const times = [encoded - begun, denoised - encoded, performance.now() - denoised];
    this.#newest = { latents, rgb, times };
    return this.#newest;
  }

  #empty() {
    return { keys: this.#graphs.emptyCache(), values: this.#graphs.emptyCache(), frames: 0 };
  }

  /** The kept cache of all frames before a view. */
  #keptBefore(view) {
    return this.#kept.find(({ newest }) => newest === view);
  }

  #keep() {
    if (this.#frames === 0 || this.#frames % KEPT_EVERY || this.#keptBefore(this.#newest)) return;
    const [keys, values] = [this.#keys, this.#values];
    this.#kept.push({ keys, values, frames: this.#frames, newest: this.#newest });
    if (this.#kept.length <= MOST_KEPT) return;
    const oldest = this.#kept.shift();
    this.#graphs.free(oldest.keys, oldest.values);
  }

  /** Go on from another cache. */
  #replace(keys, values, frames) {
    if (!this.#kept.some((kept) => kept.keys === this.#keys)) {
      this.#graphs.free(this.#keys, this.#values);
    }
    [this.#keys, this.#values, this.#frames] = [keys, values, frames];
  }

  /** Encode the newest frame into the cache, and the contexts of the next, under its action. */
  async #encode(action, perturbation) {
    this.#keep();
    const position = this.#frames;
    const { window } = this.#about.rollout;
    const done = await this.#graphs.encode({
      latents: this.#newest.latents, action, perturbation, ...this.#angles(position),
      slot: this.#slot(position),
      held: Math.min(position + 1, window),
      keys: this.#keys,
      values: this.#values,
    });
    this.#replace(done.keys, done.values, position + 1);
    return done;
  }

  /** The slot of a frame: scd.rollout.cache.Window.slot. */
  #slot(frame) {
    const { window, sink_frames: sink } = this.#about.rollout;
    return frame < window ? frame : sink + ((frame - sink) % (window - sink));
  }

  /** Cosines and sines of a frame's angles; the numbers of JavaScript are of double precision. */
  #angles(position) {
    const { theta, dims } = this.#about.rotary;
    const angles = Array.from({ length: dims / 2 }, (_, i) => position * theta ** (-2 * i / dims));
    return {
      cosines: Float32Array.from(angles, Math.cos), sines: Float32Array.from(angles, Math.sin),
    };
  }
}

export const product = (shape) => shape.reduce((all, size) => all * size, 1);
