// Recording: from the frame where it began to the newest, saved as the server's mp4.

import { address } from "./connection.js";

/** Calls `say(text, forSeconds)`. */
export class Recorder {
  #first = null;
  #newest = 0;

  constructor(button, say) {
    this.button = button;
    this.say = say;
  }

  /** Where the line ends now; a recording holds what the line holds in the end. */
  follow(newest) {
    if (this.#first !== null && newest < this.#newest) {
      this.say("Recording goes on from here; what you went back over is not in it.");
    }
    this.#newest = newest;
    if (this.#first !== null) this.#first = Math.min(this.#first, newest);
    this.#show();
  }

  /** What was recorded is no longer there; says so, if anything was. */
  drop(why) {
    if (this.#first === null) return;
    this.#first = null;
    this.#show();
    this.say(`The recording ended without a file: ${why}.`);
  }

  async toggle(session) {
    if (this.#first !== null) return this.finish(session);
    this.#first = this.#newest;
    this.#show();
    this.say("Recording.");
  }

  /** Save what is being recorded, if anything is. */
  async finish(session) {
    if (this.#first === null) return;
    const range = { first: this.#first, last: this.#newest };
    this.#first = null;
    this.#show();
    this.say("Making the mp4 …", 600);
    try {
      const answer = await fetch(address("/recording.mp4", { session, ...range }));
      if (!answer.ok) throw new Error(await answer.text());
      const told = answer.headers.get("Content-Disposition") ?? "";
      const name = /filename="?([^";]+)/.exec(told)?.[1] ?? "scd.mp4";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await answer.blob());
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      const missing = Number(answer.headers.get("First-Frame")) - range.first;
      const but = missing > 0 ? `, but for its first ${missing} frames, which are no longer kept` : "";
      this.say(`Saved ${name}${but}.`);
    } catch (error) {
      this.say(`Not saved: ${error.message}`);
    }
  }

  #show() {
    const on = this.#first !== null;
    this.button.setAttribute("aria-pressed", on);
    this.button.setAttribute("aria-label", on ? "Stop recording and save" : "Record");
    this.button.querySelector("#recorded").textContent = on ? this.#newest - this.#first + 1 : "";
  }
}
