// What is held: keys, the pad on the page, a gamepad; and the action that it means for a frame.

const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "forward", KeyA: "left", KeyD: "right", KeyW: "forward",
};
const NAMES = { left: "turn left", right: "turn right", forward: "forward" };
const STICK = 0.4; // of its way
const BUTTONS = { rewind: 4, pause: 9, forward: 12, left: 14, right: 15 }; // the standard layout

/** The move of a key, if it is one. */
export const moveOf = (event) => KEYS[event.code];

/** Calls `changed()` when what is held has changed, `pressed(name)` for a gamepad's other buttons. */
export class Controls {
  #held = new Map(); // source (a key, a finger, a gamepad's part) -> move, in the order of pressing
  #actions = [];
  #turned = false;
  #gamepadButtons = new Set();

  constructor(pad, { changed, pressed }) {
    this.pad = pad;
    this.changed = changed;
    this.pressed = pressed;
    for (const kind of ["pointerdown", "pointermove"]) {
      pad.addEventListener(kind, (event) => this.#point(event));
    }
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      pad.addEventListener(kind, (event) => this.#set(`pointer ${event.pointerId}`, null));
    }
    pad.addEventListener("contextmenu", (event) => event.preventDefault());
    addEventListener("keyup", (event) => this.#set(event.code, null));
    addEventListener("blur", () => this.releaseAll());
    addEventListener("gamepadconnected", () => this.#poll());
  }

  /** The server's names of actions; a move that is none of them has no button. */
  set actions(names) {
    this.#actions = names;
    for (const button of this.pad.children) {
      button.hidden = !names.includes(NAMES[button.dataset.move]);
    }
  }

  press(event) {
    this.#set(event.code, moveOf(event));
  }

  releaseAll() {
    for (const source of [...this.#held.keys()]) this.#set(source, null);
  }

  get holding() {
    return this.#held.size > 0;
  }

  /** Forward and a turn are both held: frames take them by turns. */
  get curve() {
    return this.#moves().length > 1;
  }

  /** The number of the next frame's action. */
  next() {
    const moves = this.#moves();
    this.#turned = moves.length > 1 && !this.#turned;
    const move = moves.length > 1 ? moves[this.#turned ? 1 : 0] : moves[0];
    return Math.max(0, this.#actions.indexOf(NAMES[move]));
  }

  #moves() {
    const held = [...this.#held.values()];
    const turn = held.findLast((move) => move !== "forward");
    return [...(held.includes("forward") ? ["forward"] : []), ...(turn ? [turn] : [])];
  }

  #set(source, move) {
    if ((this.#held.get(source) ?? null) === (move ?? null)) return;
    this.#held.delete(source);
    if (move) this.#held.set(source, move);
    const lit = new Set(this.#held.values());
    for (const button of this.pad.children) {
      button.classList.toggle("lit", lit.has(button.dataset.move));
    }
    this.changed();
  }

  // A finger that slides from one button to the next holds the next.
  #point(event) {
    if (event.type === "pointerdown") {
      event.preventDefault();
      this.pad.setPointerCapture(event.pointerId);
    } else if (!this.pad.hasPointerCapture(event.pointerId)) {
      return;
    }
    const button = document.elementFromPoint(event.clientX, event.clientY)?.closest("#pad button");
    this.#set(`pointer ${event.pointerId}`, button?.dataset.move ?? null);
  }

  #poll() {
    const pads = navigator.getGamepads().filter((pad) => pad?.connected);
    const down = (number) => pads.some((pad) => pad.buttons[number]?.pressed);
    const axis = (numbers, sign) => pads.some((p) => numbers.some((n) => sign * p.axes[n] > STICK));
    const moves = {
      left: down(BUTTONS.left) || axis([0, 2], -1),
      right: down(BUTTONS.right) || axis([0, 2], 1),
      forward: down(BUTTONS.forward) || axis([1], -1),
    };
    for (const [move, on] of Object.entries(moves)) this.#set(`gamepad ${move}`, on ? move : null);
    for (const name of ["pause", "rewind"]) {
      const on = down(BUTTONS[name]);
      if (on && !this.#gamepadButtons.has(name)) this.pressed(name);
      this.#gamepadButtons[on ? "add" : "delete"](name);
    }
    if (pads.length) requestAnimationFrame(() => this.#poll());
  }
}
