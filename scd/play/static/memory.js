// The pictures that this page has seen, of the timeline and of every branch.

/** Frames of a timeline that are kept; the server keeps about as many. */
export const LONGEST = 2900;

export class Memory {
  timeline = new Map(); // frame -> image
  branches = new Map(); // branch number -> such a map

  clear() {
    this.timeline = new Map();
    this.branches = new Map();
  }

  add(frame, { width, height, rgb }) {
    this.timeline.set(frame, { width, height, rgb: rgb.slice() }); // copied, so that the rest of the message can be freed
    if (this.timeline.size > LONGEST) this.timeline.delete(this.timeline.keys().next().value);
  }

  /** Follow the server's state after a command. */
  follow(state, command) {
    if (command.type === "start") this.clear();
    for (const { branch, frame } of state.branches) {
      if (!this.branches.has(branch)) {
        this.branches.set(branch, new Map([...this.timeline].filter(([number]) => number <= frame)));
      }
    }
    if (command.type === "return") this.timeline = new Map(this.branches.get(command.branch));
    const current = new Set(state.branches.map(({ branch }) => branch));
    for (const branch of this.branches.keys()) {
      if (!current.has(branch)) this.branches.delete(branch);
    }
    for (const frame of this.timeline.keys()) if (frame > state.frame) this.timeline.delete(frame);
    for (const frames of [this.timeline, ...this.branches.values()]) {
      for (const frame of frames.keys()) if (frame < state.oldest) frames.delete(frame);
    }
  }

  /** The image of a frame, or of the nearest one before it; null if there is none. */
  near(frame, frames = this.timeline) {
    for (let number = frame; number > frame - 60; number--) {
      if (frames.has(number)) return frames.get(number);
    }
    return null;
  }
}
