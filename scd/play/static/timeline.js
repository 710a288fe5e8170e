// The timeline as a strip of pictures: point at a frame to see it, click to go back to it.

import { paint } from "./picture.js";

const SHORTEST = 64; // frames that fit the strip at first; doubled whenever it is full
const REDRAW = 200; // ms

/** Calls `rewind(frame)`. The strip goes from the start clip's last frame to the newest. */
export class Timeline {
  #first = 0;
  #newest = 0;
  #chosen = null;
  #forks = [];
  #timer = 0;
  #scrap = document.createElement("canvas");

  constructor(box, memory, rewind) {
    this.box = box;
    this.memory = memory;
    this.rewind = rewind;
    this.strip = box.querySelector("#strip");
    this.cursor = box.querySelector("#cursor");
    this.preview = box.querySelector("#preview");
    new ResizeObserver(() => this.#draw()).observe(box);
    box.addEventListener("pointerdown", (event) => box.setPointerCapture(event.pointerId));
    box.addEventListener("pointermove", (event) => this.#choose(this.#frameAt(event)));
    box.addEventListener("pointerleave", () => this.#choose(null));
    box.addEventListener("pointercancel", () => this.#choose(null));
    box.addEventListener("pointerup", (event) => this.#go(this.#frameAt(event)));
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("blur", () => this.#choose(null));
  }

  /** Set the frames that one can go back to, and those where branches leave the timeline. */
  follow(first, newest, forks = this.#forks) {
    this.#first = first;
    this.#newest = newest;
    this.#forks = forks;
    this.box.setAttribute("aria-valuemin", first);
    this.box.setAttribute("aria-valuemax", newest);
    if (this.#chosen === null) this.#announce(newest);
    this.#timer ||= setTimeout(() => this.#draw(), REDRAW);
  }

  get #span() {
    let span = SHORTEST;
    while (span < this.#newest - this.#first + 1) span *= 2;
    return span;
  }

  #frameAt({ clientX }) {
    const { left, width } = this.box.getBoundingClientRect();
    const frame = this.#first + Math.floor(((clientX - left) / width) * this.#span);
    return Math.max(this.#first, Math.min(this.#newest, frame));
  }

  #key(event) {
    const from = this.#chosen ?? this.#newest;
    const to = {
      ArrowLeft: from - 1, ArrowDown: from - 1, ArrowRight: from + 1, ArrowUp: from + 1,
      PageUp: from - 10, PageDown: from + 10, Home: this.#first, End: this.#newest,
    }[event.key];
    if (to !== undefined) this.#choose(Math.max(this.#first, Math.min(this.#newest, to)));
    else if (event.key === "Enter" && this.#chosen !== null) this.#go(this.#chosen);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #go(frame) {
    this.#choose(null);
    if (frame < this.#newest) this.rewind(frame);
  }

  #choose(frame) {
    this.#chosen = frame;
    this.cursor.hidden = this.preview.hidden = frame === null;
    this.#announce(frame ?? this.#newest);
    if (frame === null) return;
    const share = (frame - this.#first + 0.5) / this.#span;
    this.cursor.style.left = `${100 * share}%`;
    this.preview.style.setProperty("--at", share);
    const image = this.memory.near(frame);
    const canvas = this.preview.querySelector("canvas");
    canvas.hidden = !image;
    if (image) paint(canvas, image);
    this.preview.querySelector("figcaption").textContent = `frame ${frame}`;
  }

  #announce(frame) {
    this.box.setAttribute("aria-valuenow", frame);
    this.box.setAttribute("aria-valuetext", `frame ${frame} of ${this.#newest}`);
  }

  #draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const scale = devicePixelRatio || 1;
    const { width, height } = this.box.getBoundingClientRect();
    if (!width) return;
    this.strip.width = Math.round(width * scale);
    this.strip.height = Math.round(height * scale);
    const pen = this.strip.getContext("2d");
    const count = Math.max(1, Math.round(width / height));
    const cell = this.strip.width / count;
    const perFrame = this.strip.width / this.#span;
    for (let i = 0; i < count; i++) {
      const frame = this.#first + Math.floor((i * this.#span) / count);
      const image = frame <= this.#newest && this.memory.near(frame);
      if (!image) continue;
      paint(this.#scrap, image);
      pen.drawImage(this.#scrap, i * cell, 0, cell, this.strip.height);
    }
    const end = (this.#newest - this.#first + 1) * perFrame;
    pen.clearRect(end, 0, this.strip.width - end, this.strip.height);
    const line = Math.max(2, Math.round(2 * scale));
    pen.fillStyle = getComputedStyle(this.box).getPropertyValue("--accent");
    pen.fillRect(Math.max(0, end - line), 0, line, this.strip.height);
    for (const frame of this.#forks) {
      const x = (frame - this.#first + 1) * perFrame;
      pen.beginPath();
      pen.moveTo(x - 3 * line, this.strip.height);
      pen.lineTo(x, this.strip.height - 4 * line);
      pen.lineTo(x + 3 * line, this.strip.height);
      pen.fill();
    }
  }
}
