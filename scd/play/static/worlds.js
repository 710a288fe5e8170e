// The pictures of the shown worlds, large.

import { paint } from "./picture.js";

export const TITLES = { model: "SCD", baseline: "Dense baseline", real: "Real Doom" };
export const titleOf = (name) => TITLES[name] ?? name;

export class Worlds {
  #figures = new Map();
  #about = {};

  constructor(box) {
    this.box = box;
  }

  /** What the server tells about them: name -> {kind, parameters}. */
  set about(about) {
    this.#about = about;
    for (const [name, figure] of this.#figures) this.#explain(name, figure);
  }

  /** Show these worlds, by name. */
  set names(names) {
    if (names.join() === [...this.#figures.keys()].join()) return;
    this.#figures = new Map(names.map((name) => [name, this.#figure(name)]));
    this.box.replaceChildren(...this.#figures.values());
    this.box.dataset.count = names.length;
  }

  set smooth(on) {
    this.box.classList.toggle("smooth", on);
  }

  /** Paint the worlds of a picture message; `names` is the server's whole list. */
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
    canvas.setAttribute("aria-label", `what ${titleOf(name)} shows`);
    const caption = document.createElement("figcaption");
    caption.textContent = titleOf(name);
    figure.dataset.world = name;
    figure.append(canvas, caption);
    this.#explain(name, figure);
    return figure;
  }

  #explain(name, figure) {
    const about = this.#about[name];
    const said = about && `${about.kind}, ${(about.parameters / 1e6).toFixed(1)} million parameters`;
    figure.querySelector("figcaption").title = said ?? "";
  }
}
