// A game's past: the timeline up to now, and the branches to return to, as scd/play/history.py.

const MAX_FRAMES = 3000; // of the timeline and all branches together
const MAX_BRANCHES = 8;
const DROPPED_AT_ONCE = 100;

/** Frames are {number, action, view, made}; branches {number, frames, kept}. */
export class History {
  branches = [];
  #branchesSoFar = 0;
  #frames;

  constructor(start) {
    this.timeline = start;
    this.#frames = start.length;
  }

  get newest() {
    return this.timeline.at(-1);
  }

  /** The number of the first frame that is still stored. */
  get oldest() {
    return this.timeline[0].number;
  }

  append(frame) {
    this.timeline.push(frame);
    this.#frames += 1;
    if (this.#frames > MAX_FRAMES) this.#makeRoom();
  }

  /** Go back to a frame of the timeline; what came after it becomes a branch. */
  rewind(number) {
    const newest = this.newest.number;
    if (number < this.oldest || number > newest) {
      throw new Refusal(
        `frame ${number} is not available: the timeline has frames ${this.oldest} to ${newest}`,
      );
    }
    if (number === newest) return;
    this.#leave();
    this.timeline = this.timeline.slice(0, number - this.oldest + 1);
  }

  /** Keep a branch that ends at the newest frame; it stays when the player returns to it. */
  keep() {
    if (!this.branches.some((b) => b.kept && b.frames.at(-1) === this.newest)) this.#add(true);
  }

  /** Go to the end of a branch; the timeline that is left becomes a branch. */
  returnTo(number) {
    const branch = this.branches.find((one) => one.number === number);
    if (!branch) throw new Refusal(`branch ${number} does not exist (any more)`);
    if (!branch.kept) this.branches.splice(this.branches.indexOf(branch), 1);
    this.#leave();
    this.timeline = [...branch.frames];
  }

  /** The newest frame number that a branch shares with the timeline; -1: none. */
  lastShared({ frames }) {
    const first = Math.max(this.oldest, frames[0].number);
    let low = first - 1;
    let high = Math.min(this.newest.number, frames.at(-1).number);
    while (low < high) {
      const middle = Math.floor((low + high + 1) / 2);
      const same = this.timeline[middle - this.oldest] === frames[middle - frames[0].number];
      [low, high] = same ? [middle, high] : [low, middle - 1];
    }
    return low >= first ? low : -1;
  }

  #makeRoom() {
    for (;;) {
      const stored = [this.timeline, ...this.branches.map(({ frames }) => frames)];
      this.#frames = new Set(stored.flat()).size;
      if (this.#frames <= MAX_FRAMES) return;
      if (this.#frames - this.timeline.length > MAX_FRAMES / 2) {
        this.#drop(this.branches);
        continue;
      }
      this.timeline.splice(0, DROPPED_AT_ONCE);
      for (const { frames } of this.branches) {
        frames.splice(0, Math.max(this.oldest - frames[0].number, 0));
      }
      this.branches = this.branches.filter(({ frames }) => frames.length);
    }
  }

  // Unless a branch contains all of the timeline already.
  #leave() {
    if (!this.branches.some((b) => this.lastShared(b) === this.newest.number)) this.#add(false);
  }

  #add(kept) {
    this.#branchesSoFar += 1;
    this.branches.push({ number: this.#branchesSoFar, frames: [...this.timeline], kept });
    if (this.branches.length > MAX_BRANCHES) this.#drop(this.branches.slice(0, -1));
  }

  // The oldest goes first; those that the player kept go last.
  #drop(candidates) {
    const out = candidates.find(({ kept }) => !kept) ?? candidates[0];
    this.branches.splice(this.branches.indexOf(out), 1);
  }
}

/** A command that is not possible; nothing has changed. */
export class Refusal extends Error {}
