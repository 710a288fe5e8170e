// The pictures that this page has seen: of the current line, and of the lines that branches end.

/** Frames of a line. The server keeps about so many too. */
export const LONGEST = 2900;

export class Memory {
  line = new Map(); // frame -> image
  branches = new Map(); // moment -> such a map

  clear() {
    this.line = new Map();
    this.branches = new Map();
  }

  add(frame, { width, height, rgb }) {
    this.line.set(frame, { width, height, rgb: rgb.slice() }); // alone, without its message
    if (this.line.size > LONGEST) this.line.delete(this.line.keys().next().value);
  }

  /** Be where the server is after a command. */
  follow(state, command) {
    if (command.type === "start") this.clear();
    for (const { moment, frame } of state.moments) {
      if (!this.branches.has(moment)) {
        this.branches.set(moment, new Map([...this.line].filter(([number]) => number <= frame)));
      }
    }
    if (command.type === "return") this.line = new Map(this.branches.get(command.moment));
    const there = new Set(state.moments.map(({ moment }) => moment));
    for (const moment of this.branches.keys()) if (!there.has(moment)) this.branches.delete(moment);
    for (const frame of this.line.keys()) if (frame > state.frame) this.line.delete(frame);
    for (const line of [this.line, ...this.branches.values()]) {
      for (const frame of line.keys()) if (frame < state.oldest) line.delete(frame);
    }
  }

  /** The image of a frame, or of the nearest one before it. */
  near(frame, line = this.line) {
    for (let number = frame; number > frame - 60; number--) {
      if (line.has(number)) return line.get(number);
    }
    return null;
  }
}
