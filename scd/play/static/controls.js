// What is held: keys, the pad on the page, a gamepad; and the action that it means for a frame.

const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "forward", ArrowDown: "back",
  KeyA: "left", KeyD: "right", KeyW: "forward", KeyS: "back",
};
// What the actions of the moves may be called; the first name that there is counts.
const NAMES = {
  left: ["turn left", "left", "look left", "move left"],
  right: ["turn right", "right", "look right", "move right"],
  forward: ["forward", "move forward", "walk forward", "up", "move up"],
  back: ["back", "backward", "move back", "move backward", "down", "move down"],
};
const OTHER_KEYS = [..."QEZXCGHJKLUIOPTYNM"].map((letter) => `Key${letter}`); // of other actions
const STICK = 0.4; // of its way
const BUTTONS = { rewind: 4, pause: 9, forward: 12, back: 13, left: 14, right: 15 }; // the standard layout

/** Calls `changed()` when what is held has changed, `pressed(name)` for a gamepad's other buttons. */
export class Controls {
  #held = new Map(); // source (a key, a finger, a gamepad's part) -> move, in the order of pressing
  #keys = {}; // code -> move
  #actions = new Map(); // move -> number; moves beside those of KEYS are the actions' own names
  #idle = null;
  #several = false; // actions can be held at once
  #turned = false;
  #gamepadButtons = new Set();

  /** Its buttons: those of the moves are in `pad`, those of all other actions come into `others`. */
  constructor(pad, others, { changed, pressed }) {
    this.pad = pad;
    this.others = others;
    this.changed = changed;
    this.pressed = pressed;
    for (const box of [pad, others]) {
      for (const kind of ["pointerdown", "pointermove"]) {
        box.addEventListener(kind, (event) => this.#point(event, box));
      }
      for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
        box.addEventListener(kind, (event) => this.#set(`pointer ${event.pointerId}`, null));
      }
      box.addEventListener("contextmenu", (event) => event.preventDefault());
    }
    addEventListener("keyup", (event) => this.#set(event.code, null));
    addEventListener("blur", () => this.releaseAll());
    addEventListener("gamepadconnected", () => this.#poll());
  }

  /**
   * The server's names of actions, the number of the one that no key stands for (or null), and
   * whether several can be held at once.
   */
  offer(names, idle, several) {
    const called = names.map((name) => name.toLowerCase().replaceAll("_", " "));
    this.#idle = idle;
    this.#several = several;
    this.#actions = new Map();
    for (const [move, known] of Object.entries(NAMES)) {
      const number = called.indexOf(known.find((name) => called.includes(name)));
      if (number >= 0) this.#actions.set(move, number);
    }
    const taken = new Set([...this.#actions.values(), idle]);
    const others = names.map((name, number) => [name, number]).filter(([, n]) => !taken.has(n));
    this.#keys = Object.fromEntries(Object.entries(KEYS).filter(([, m]) => this.#actions.has(m)));
    this.others.replaceChildren(...others.map(([name, number], place) => {
      this.#actions.set(`action ${number}`, number);
      if (OTHER_KEYS[place]) this.#keys[OTHER_KEYS[place]] = `action ${number}`;
      return this.#button(name, `action ${number}`, OTHER_KEYS[place]);
    }));
    for (const button of this.pad.children) button.hidden = !this.#actions.has(button.dataset.move);
    this.pad.hidden = [...this.pad.children].every((button) => button.hidden);
  }

  #button(name, move, code) {
    const button = Object.assign(document.createElement("button"), { type: "button", tabIndex: -1 });
    button.dataset.move = move;
    button.append(name.replaceAll("_", " "));
    if (code) button.append(" ", Object.assign(document.createElement("kbd"), { textContent: code.at(-1) }));
    return button;
  }

  /** Whether there is an action for a move; "others": for anything beside the moves. */
  has(move) {
    return move === "others" ? this.others.children.length > 0 : this.#actions.has(move);
  }

  /** The move of a key, if it is one. */
  moveOf(event) {
    return this.#keys[event.code];
  }

  press(event) {
    this.#set(event.code, this.moveOf(event));
  }

  releaseAll() {
    for (const source of [...this.#held.keys()]) this.#set(source, null);
  }

  get holding() {
    return this.#held.size > 0;
  }

  /** Forward and a turn are both held, but only one counts: frames take them by turns. */
  get curve() {
    return !this.#several && this.#moves().length > 1;
  }

  /** Nothing is held, and no action stands for that: the world waits. */
  get waiting() {
    return this.#idle === null && !this.#several && !this.holding;
  }

  /** What to tell the server of the next frame: the number of its action, or of all that are held. */
  next() {
    if (this.#several) {
      return { held: [...new Set(this.#held.values())].map((move) => this.#actions.get(move)) };
    }
    const action = this.#action();
    return action === null ? {} : { action };
  }

  #action() {
    const moves = this.#moves();
    this.#turned = moves.length > 1 && !this.#turned;
    const move = moves.length > 1 ? moves[this.#turned ? 1 : 0] : moves[0];
    return this.#actions.get(move) ?? this.#idle;
  }

  #moves() {
    const held = [...this.#held.values()];
    const newest = held.at(-1);
    if (newest && !["forward", "left", "right"].includes(newest)) return [newest];
    const turn = held.findLast((move) => move === "left" || move === "right");
    return [...(held.includes("forward") ? ["forward"] : []), ...(turn ? [turn] : [])];
  }

  #set(source, wanted) {
    const move = this.#actions.has(wanted) ? wanted : null;
    if ((this.#held.get(source) ?? null) === move) return;
    this.#held.delete(source);
    if (move) this.#held.set(source, move);
    const lit = new Set(this.#held.values());
    for (const button of [...this.pad.children, ...this.others.children]) {
      button.classList.toggle("lit", lit.has(button.dataset.move));
    }
    this.changed();
  }

  // A finger that slides from one button to the next holds the next.
  #point(event, box) {
    if (event.type === "pointerdown") {
      event.preventDefault();
      box.setPointerCapture(event.pointerId);
    } else if (!box.hasPointerCapture(event.pointerId)) {
      return;
    }
    const button = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-move]");
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
      back: down(BUTTONS.back) || axis([1], 1),
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
