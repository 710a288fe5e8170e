// Recording: from the frame where it began to the newest, saved as a video that the server makes.

import { recordVideo } from "./server.js";

/** Calls `say(text, forSeconds)`. */
export class Recorder {
  #first = null;
  #newest = 0;

  constructor(button, say) {
    this.button = button;
    this.say = say;
  }

  /** Follow the timeline's newest frame; a recording has what the timeline has at its end. */
  follow(newest) {
    if (this.#first !== null && newest < this.#newest) {
      this.say("Recording goes on from here; what you went back over is not in it.");
    }
    this.#newest = newest;
    if (this.#first !== null) this.#first = Math.min(this.#first, newest);
    this.#show();
  }

  /** Give up the recording, and say why, if there is one. */
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

  /** Save the recording, if there is one. */
  async finish(session) {
    if (this.#first === null) return;
    const range = { first: this.#first, last: this.#newest };
    this.#first = null;
    this.#show();
    this.say("Making the video …", 600);
    try {
      const { blob, name, first } = await recordVideo(session, range);
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      const missing = first - range.first;
      const but = missing > 0 ? `, without its first ${missing} frames, which were no longer stored` : "";
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
