// Statistics of the last seconds: frames per second, latency from key to picture, times of the parts.

import { WHO } from "./server.js";
import { titleOf } from "./worlds.js";

const SECONDS = 4; // that the statistics cover
const REDRAW = 250; // ms
const SLOW = 0.85; // of the target rate, over these seconds
const PARTS = ["encoder", "denoising", "decoding"];

export class Stats {
  rate = null; // frames per second, as last measured at this target
  #frames = []; // {at, worlds: name -> times}
  #pressed = new Map(); // seq -> time
  #latencies = []; // {at, ms}
  #target = 10;
  #running = false;
  #since = 0; // when measuring at this target began
  #timer = 0;

  constructor(box) {
    this.box = box;
    const ids = ["rate", "latency", "latency95", "spark", "times", "slow"];
    this.part = Object.fromEntries(ids.map((id) => [id, box.querySelector(`#${id}`)]));
  }

  /** Start measuring anew, after a change of the target, a pause or a resumption. */
  begin(target, running) {
    if (target !== this.#target) this.rate = null;
    this.#target = target;
    this.#running = running;
    this.#since = performance.now();
    this.#frames = [];
    this.#pressed.clear();
    this.#later();
  }

  pressed(seq) {
    this.#pressed.set(seq, performance.now());
  }

  /** Count a new frame that has been drawn. */
  shown(picture, names) {
    const at = performance.now();
    const worlds = picture.worlds.map(({ world, times }) => [names[world], times]);
    this.#frames.push({ at, worlds });
    for (const [seq, when] of this.#pressed) {
      if (seq > picture.seq) break;
      this.#latencies.push({ at, ms: at - when });
      this.#pressed.delete(seq);
    }
    this.#later();
  }

  #later() {
    this.#timer ||= setTimeout(() => this.#draw(), REDRAW);
  }

  #draw() {
    this.#timer = 0;
    const now = performance.now();
    const recent = ({ at }) => at > now - 1000 * SECONDS;
    this.#frames = this.#frames.filter(recent);
    // Looking back further, since keys are pressed less often than frames arrive.
    this.#latencies = this.#latencies.filter(({ at }) => at > now - 5000 * SECONDS).slice(-50);
    const { rate, latency, latency95, slow } = this.part;

    const first = this.#frames[0];
    const last = this.#frames.at(-1);
    const fps = this.#frames.length > 1 ? (1000 * (this.#frames.length - 1)) / (last.at - first.at) : null;
    this.rate = fps ?? this.rate;
    rate.textContent = fps === null ? "–" : fps.toFixed(1);
    const sorted = this.#latencies.map(({ ms }) => ms).sort((a, b) => a - b);
    const quantile = (q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
    latency.textContent = sorted.length ? `${Math.round(quantile(0.5))} ms` : "–";
    latency95.textContent = sorted.length ? `p95 ${Math.round(quantile(0.95))}` : "";

    const settled = now - this.#since > 1000 * SECONDS;
    slow.hidden = !(this.#running && settled && (fps ?? 0) < SLOW * this.#target);
    if (!slow.hidden) {
      const managed = fps === null ? "hardly any" : fps.toFixed(1);
      slow.textContent = `${WHO} manages ${managed} of ${this.#target} frames per second.`;
    }
    this.#spark();
    this.#times();
    if (this.#frames.length || this.#running) this.#later();
  }

  #spark() {
    const { spark } = this.part;
    const pen = spark.getContext("2d");
    const gaps = this.#frames.slice(1).map(({ at }, i) => at - this.#frames[i].at).slice(-60);
    const ceiling = Math.max(2000 / this.#target, ...gaps);
    const style = getComputedStyle(this.box);
    pen.clearRect(0, 0, spark.width, spark.height);
    pen.strokeStyle = style.getPropertyValue("--line");
    const y = (ms) => spark.height - 1 - (ms / ceiling) * (spark.height - 2);
    const goal = Math.round(y(1000 / this.#target)) + 0.5;
    pen.beginPath();
    pen.moveTo(0, goal);
    pen.lineTo(spark.width, goal);
    pen.stroke();
    pen.strokeStyle = style.getPropertyValue("--accent");
    pen.lineWidth = 1.5;
    pen.beginPath();
    gaps.forEach((ms, i) => pen.lineTo((i / 59) * spark.width, y(ms)));
    pen.stroke();
    pen.lineWidth = 1;
  }

  #times() {
    const last = this.#frames.at(-1);
    if (!last) return;
    const means = last.worlds.flatMap(([name], index) => {
      const all = this.#frames.map(({ worlds }) => worlds[index]).filter((w) => w?.[0] === name);
      const mean = PARTS.map((_, i) => all.reduce((sum, [, times]) => sum + times[i], 0) / all.length);
      return mean.some((ms) => ms > 0) ? [[name, mean]] : [];
    });
    const rows = means.map(([name]) => this.#row(name));
    if (rows.some((row) => !row.isConnected) || rows.length !== this.part.times.children.length) {
      this.part.times.replaceChildren(...rows);
    }
    const sum = (mean) => mean.reduce((a, b) => a + b, 0);
    const full = Math.max(1000 / this.#target, ...means.map(([, mean]) => sum(mean)));
    means.forEach(([, mean], i) => {
      const label = PARTS.map((part, p) => `${part} ${mean[p].toFixed(1)} ms`).join(", ");
      rows[i].querySelector(".stack").setAttribute("aria-label", label);
      rows[i].querySelector(".stack").title = label;
      PARTS.forEach((part, p) => {
        rows[i].querySelector(`.stack .${part}`).style.width = `${(100 * mean[p]) / full}%`;
        rows[i].querySelector(`.ms .${part}`).textContent = mean[p].toFixed(mean[p] < 10 ? 1 : 0);
      });
    });
  }

  #row(name) {
    const existing = this.part.times.querySelector(`[data-world="${name}"]`);
    if (existing) return existing;
    const row = document.createElement("div");
    row.dataset.world = name;
    const label = document.createElement("span");
    label.textContent = titleOf(name);
    const stack = document.createElement("div");
    stack.className = "stack";
    stack.setAttribute("role", "img");
    const ms = document.createElement("span");
    ms.className = "ms";
    for (const [box, tag] of [[stack, "i"], [ms, "b"]]) {
      for (const part of PARTS) {
        box.append(Object.assign(document.createElement(tag), { className: part }));
      }
    }
    row.append(label, ms, stack);
    return row;
  }
}
