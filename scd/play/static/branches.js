// Moments to return to: the ends of other lines, each with its picture.

import { paint } from "./picture.js";

/** Calls `go(moment)`. */
export class Branches {
  #shown = "";

  constructor(box, memory, go) {
    this.box = box;
    this.memory = memory;
    this.go = go;
  }

  follow(moments) {
    const wanted = JSON.stringify(moments.map(({ moment, frame }) => [moment, frame]));
    if (wanted === this.#shown) return; // whoever is at a button by keyboard stays there
    this.#shown = wanted;
    this.box.replaceChildren(...moments.map((moment) => this.#button(moment)));
  }

  #button({ moment, frame, kept }) {
    const button = Object.assign(document.createElement("button"), {
      type: "button",
      title: `${kept ? "Kept" : "Left"} at frame ${frame}: return there`,
    });
    const canvas = document.createElement("canvas");
    const image = this.memory.near(frame, this.memory.branches.get(moment));
    if (image) paint(canvas, image);
    const label = Object.assign(document.createElement("span"), { textContent: frame });
    button.setAttribute("aria-label", button.title);
    button.classList.toggle("kept", kept);
    button.append(canvas, label);
    button.addEventListener("click", () => this.go(moment));
    return button;
  }
}
