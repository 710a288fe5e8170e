// The large pictures of the shown worlds.

import { paint } from "./picture.js";

const titles = { real: "Real Doom" };
export const titleOf = (name) => titles[name] ?? name;

/** Set the worlds' titles: a model's is the name of its experiment. */
export function nameWorlds(about) {
  for (const [name, { name: title }] of Object.entries(about)) titles[name] = title;
}

export class Worlds {
  #figures = new Map();
  #about = {};

  constructor(box) {
    this.box = box;
  }

  /** Set the models' descriptions: name -> {kind, parameters, steps}. */
  set about(about) {
    this.#about = about;
    for (const [name, figure] of this.#figures) this.#explain(name, figure);
  }

  /** Set the worlds to show, by name. */
  set names(names) {
    if (names.join() === [...this.#figures.keys()].join()) return;
    this.#figures = new Map(names.map((name) => [name, this.#figure(name)]));
    this.box.replaceChildren(...this.#figures.values());
    this.box.dataset.count = names.length;
  }

  set smooth(on) {
    this.box.classList.toggle("smooth", on);
  }

  /** Paint the worlds of a picture message; `names` lists all worlds of the server. */
  show(picture, names) {
    for (const { world, over, image } of picture.worlds) {
      const figure = this.#figures.get(names[world]);
      if (!figure) continue;
      paint(figure.querySelector("canvas"), image);
      figure.classList.toggle("over", over);
    }
    this.box.dataset.frame = picture.frame;
    this.box.dataset.action = picture.action;
  }

  #figure(name) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 64;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Picture of ${titleOf(name)}`);
    const caption = document.createElement("figcaption");
    caption.textContent = titleOf(name);
    figure.dataset.world = name;
    figure.append(canvas, caption);
    this.#explain(name, figure);
    return figure;
  }

  #explain(name, figure) {
    const about = this.#about[name];
    const steps = about?.steps === 1 ? "one step" : `${about?.steps} steps`;
    const size = (about?.parameters / 1e6).toFixed(1);
    const text = about && `${about.kind}, ${size} million parameters, ${steps} a frame unless set`;
    figure.querySelector("figcaption").title = text ?? "";
  }
}
