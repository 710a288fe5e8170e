// The held keys, buttons and gamepad parts, and the action that they mean for the next frame.

const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "forward", ArrowDown: "back",
  KeyA: "left", KeyD: "right", KeyW: "forward", KeyS: "back",
};
// Names that the actions of the moves may have; the first one that exists counts.
const NAMES = {
  left: ["turn left", "left", "look left", "move left"],
  right: ["turn right", "right", "look right", "move right"],
  forward: ["forward", "move forward", "walk forward", "up", "move up"],
  back: ["back", "backward", "move back", "move backward", "down", "move down"],
};
const OTHER_KEYS = [..."QEZXCGHJKLUIOPTYNM"].map((letter) => `Key${letter}`); // for other actions
const STICK = 0.4; // deflection of a stick that counts
const BUTTONS = { rewind: 4, pause: 9, forward: 12, back: 13, left: 14, right: 15 }; // the standard layout

/** Calls `changed()` when what is held has changed, and `pressed(name)` for a gamepad's other buttons. */
export class Controls {
  #held = new Map(); // source (key, finger or gamepad part) -> move, in the order of pressing
  #keys = {}; // code -> move
  #actions = new Map(); // move -> action number; beside the moves of KEYS: `action NUMBER`
  #idle = null;
  #vectors = false; // several actions can be held at once
  #turned = false;
  #gamepadButtons = new Set();

  /** `pad` holds the buttons of the moves; those of all other actions are added to `others`. */
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
   * Take over what the server offers: the names of actions, the number of the idle one (or null),
   * and whether several can be held at once.
   */
  offer(names, idle, vectors) {
    const called = names.map((name) => name.toLowerCase().replaceAll("_", " "));
    this.#idle = idle;
    this.#vectors = vectors;
    this.#actions = new Map();
    for (const [move, known] of Object.entries(NAMES)) {
      const number = called.indexOf(known.find((name) => called.includes(name)));
      if (number >= 0) this.#actions.set(move, number);
    }
    const taken = new Set([...this.#actions.values(), idle]);
    const others = names.map((name, number) => [name, number]).filter(([, n]) => !taken.has(n));
    this.#keys = Object.fromEntries(Object.entries(KEYS).filter(([, m]) => this.#actions.has(m)));
    this.others.replaceChildren(...others.map(([name, number], index) => {
      this.#actions.set(`action ${number}`, number);
      if (OTHER_KEYS[index]) this.#keys[OTHER_KEYS[index]] = `action ${number}`;
      return this.#button(name, `action ${number}`, OTHER_KEYS[index]);
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

  /** Whether there is an action for a move; "others": for anything that is not a move. */
  has(move) {
    return move === "others" ? this.others.children.length > 0 : this.#actions.has(move);
  }

  /** The move that a key stands for, if any. */
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

  /** Whether forward and a turn are held, but a frame takes only one: frames alternate. */
  get curve() {
    return !this.#vectors && this.#moves().length > 1;
  }

  /** Whether the world waits: nothing is held, and no action stands for that. */
  get waiting() {
    return this.#idle === null && !this.#vectors && !this.holding;
  }

  /** Fields of the next input message: the number of one action, or of all that are held. */
  next() {
    if (this.#vectors) {
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
