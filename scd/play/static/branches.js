// Branches to return to, each a button with the picture at its end.

import { paint } from "./picture.js";

/** Calls `go(branch)`. */
export class Branches {
  #shown = "";

  constructor(box, memory, go) {
    this.box = box;
    this.memory = memory;
    this.go = go;
  }

  /** Show the branches of a state message. */
  follow(branches) {
    const wanted = JSON.stringify(branches.map(({ branch, frame }) => [branch, frame]));
    if (wanted === this.#shown) return; // so that a button keeps its keyboard focus
    this.#shown = wanted;
    this.box.replaceChildren(...branches.map((branch) => this.#button(branch)));
  }

  #button({ branch, frame, kept }) {
    const button = Object.assign(document.createElement("button"), {
      type: "button",
      title: `${kept ? "Kept" : "Left"} at frame ${frame}: return to it`,
    });
    const canvas = document.createElement("canvas");
    const image = this.memory.near(frame, this.memory.branches.get(branch));
    if (image) paint(canvas, image);
    const label = Object.assign(document.createElement("span"), { textContent: frame });
    button.setAttribute("aria-label", button.title);
    button.classList.toggle("kept", kept);
    button.append(canvas, label);
    button.addEventListener("click", () => this.go(branch));
    return button;
  }
}
