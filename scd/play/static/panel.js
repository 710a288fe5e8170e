// The choices: start clips, worlds side by side, and settings.

import { startPicture } from "./server.js";
import { titleOf } from "./worlds.js";

/** Calls `start({start, worlds})` and `settings({...})`. */
export class Panel {
  #start = null;
  #worlds = [];
  #offered = [];
  #limits = null;
  #about = {};

  constructor({ start, settings }) {
    this.startWith = start;
    const $ = (id) => document.getElementById(id);
    [this.starts, this.beside, this.seed] = ["starts", "beside", "seed"].map($);
    this.sliders = { steps: $("steps"), guidance_scale: $("guidance"), fps: $("fps") };
    for (const [name, slider] of Object.entries(this.sliders)) {
      slider.addEventListener("input", () => {
        this.#label(name);
        settings({ [name]: Number(slider.value) });
      });
    }
    this.seed.addEventListener("change", () => {
      const [low, high] = this.#limits.seed;
      const seed = Math.min(high, Math.max(low, Math.trunc(Number(this.seed.value) || 0)));
      this.seed.value = seed;
      settings({ seed });
    });
    $("dice").addEventListener("click", () => {
      this.seed.value = Math.floor(Math.random() * 10000);
      settings({ seed: Number(this.seed.value) });
    });
  }

  /** Show what the server offers. */
  offer({ starts, worlds, missing, limits, about }) {
    this.#limits = limits;
    this.#about = about;
    this.#offered = worlds;
    for (const [name, slider] of Object.entries(this.sliders)) [slider.min, slider.max] = limits[name];
    this.seed.max = limits.seed[1];
    this.starts.replaceChildren(...starts.map((name, i) => this.#startButton(name, i)));
    const chips = [...worlds, ...Object.keys(missing)].map((name) => this.#chip(name, missing[name]));
    this.beside.replaceChildren(...chips);
    for (const id of ["beside-title", "beside", "beside-hint"]) {
      document.getElementById(id).hidden = chips.length < 2;
    }
    const reasons = Object.entries(missing).map(
      ([name, why]) => `${titleOf(name)} is not available: ${why}.`,
    );
    document.getElementById("beside-hint").textContent = [
      "All follow the same keys. A change restarts the clip.", ...reasons,
    ].join(" ");
  }

  /** Show the current state. */
  follow(state) {
    this.#start = state.start;
    this.#worlds = state.worlds;
    for (const button of this.starts.children) {
      button.setAttribute("aria-pressed", button.dataset.start === state.start);
    }
    for (const chip of this.beside.children) {
      chip.setAttribute("aria-pressed", state.worlds.includes(chip.dataset.world));
    }
    const model = [...state.worlds, ...this.#offered].find((name) => this.#about[name]);
    for (const [name, slider] of Object.entries(this.sliders)) {
      // Neither steps nor guidance are set at first: each model takes its own.
      slider.value = state.settings[name] ?? state[name] ?? this.#about[model][name];
      this.#label(name);
    }
    if (document.activeElement !== this.seed) this.seed.value = state.settings.seed;
  }

  /** Begin at the start clip with this index. */
  startAt(index) {
    this.starts.children[index]?.click();
  }

  /** Switch between all worlds and only the first. */
  toggleBeside() {
    const worlds = this.#worlds.length > 1 ? this.#offered.slice(0, 1) : this.#offered;
    if (worlds.length !== this.#worlds.length) this.startWith({ start: this.#start, worlds });
  }

  #label(name) {
    const { value, nextElementSibling: output } = this.sliders[name];
    const guidance = Number(value) === 1 ? "off" : Number(value).toFixed(1);
    output.textContent = name === "guidance_scale" ? guidance : value;
  }

  #startButton(name, index) {
    const title = name.replaceAll("_", " ");
    const button = Object.assign(document.createElement("button"), { type: "button", title });
    const image = Object.assign(document.createElement("img"), {
      src: startPicture(name), alt: title, width: 64, height: 64, draggable: false,
    });
    button.dataset.start = name;
    if (index < 9) button.setAttribute("aria-keyshortcuts", index + 1);
    button.append(image);
    button.addEventListener("click", () => this.startWith({ start: name, worlds: this.#worlds }));
    return button;
  }

  #chip(name, missing) {
    const chip = document.createElement("button");
    Object.assign(chip, { type: "button", textContent: titleOf(name) });
    chip.dataset.world = name;
    chip.disabled = missing !== undefined;
    chip.addEventListener("click", () => {
      const without = this.#worlds.filter((world) => world !== name);
      const worlds = without.length < this.#worlds.length ? without : [...this.#worlds, name];
      if (worlds.length) this.startWith({ start: this.#start, worlds });
    });
    return chip;
  }
}
