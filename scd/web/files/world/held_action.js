// The action that a player holds or taps, and what it means for the next frame, as
// scd/play/held_actions.py.

const TAP_SECONDS = 1; // that a tap is remembered; or a frame's time, if that is longer

export class HeldAction {
  seq = 0; // of the newest input
  #held = null;
  #tapped = null;
  #tappedAt = 0;

  /** `idle`: the action of a player who presses nothing; null: there is none. */
  constructor(idle) {
    this.idle = idle;
  }

  /** Take over an input message; `now` in seconds. */
  update({ action, seq }, now) {
    this.#held = action === undefined || action === this.idle ? null : action;
    if (this.#held !== null) [this.#tapped, this.#tappedAt] = [this.#held, now];
    this.seq = seq;
  }

  /** The next frame's action; null: the world waits. */
  action(now, fps) {
    const recent = now - this.#tappedAt < Math.max(TAP_SECONDS, 1 / fps);
    return this.#held ?? (recent ? this.#tapped : null) ?? this.idle;
  }

  clearTaps() {
    this.#tapped = null;
  }
}
