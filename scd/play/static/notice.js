// Messages about the server: busy, unreachable, or a session that has ended.

import { WHO } from "./server.js";

function position(before) {
  if (before === 0) return "You are next";
  return before === 1 ? "One player is ahead of you" : `${before} players are ahead of you`;
}

const ENDED = {
  4401: ["A token is missing", "Open the complete address that the server printed."],
  4408: ["Closed, as nobody played", "After some minutes without input, the place goes to others."],
  4510: ["This browser cannot show the world"],
  4409: ["Open in another page", "This session has moved to another tab or window.", "Play here"],
};

/** Describe a connection's status: title, text and button; null if there is nothing to say. */
function describe(status) {
  switch (status.phase) {
    case "busy": {
      const all = status.places === 1 ? "The only place is" : `All ${status.places} places are`;
      return [`${all} taken`, `${position(status.before)}; play begins as soon as one is free.`];
    }
    case "loading": {
      const [done, total] = [status.done, status.total].map((bytes) => (bytes / 1e6).toFixed(1));
      return ["Loading the world", `${done} of ${total} MB.`];
    }
    case "full":
      return ["Very busy", "Many players are waiting for a place. This page keeps trying."];
    case "silent":
      return [`${WHO} does not answer`, "Play goes on as soon as it does.", "Reconnect"];
    case "lost":
      return [
        `${WHO} cannot be reached`,
        "This page keeps trying, and goes on where you were.",
        "Try now",
      ];
    case "ended": {
      const [title, text, button] = ENDED[status.code] ?? [
        `${WHO} ended this session`, `Reason: ${status.reason || `code ${status.code}`}.`,
      ];
      const final = [4401, 4510].includes(status.code);
      return [title, text ?? status.reason, final ? null : (button ?? "Play again")];
    }
    default:
      return null;
  }
}

export class Notice {
  #timer = 0;

  constructor(box, act) {
    this.box = box;
    this.part = (name) => box.querySelector(`#notice-${name}`);
    this.part("button").addEventListener("click", act);
  }

  show(status) {
    if (status.phase === "connecting" && !this.box.hidden) return; // one attempt of many
    clearInterval(this.#timer);
    this.part("countdown").textContent = "";
    const message = describe(status);
    this.box.hidden = message === null;
    if (!message) return;
    const [title, text, button] = message;
    if (this.part("title").textContent !== title) this.part("title").textContent = title;
    if (this.part("text").textContent !== text) this.part("text").textContent = text;
    this.part("button").hidden = !button;
    this.part("button").textContent = button ?? "";
    if (status.wait >= 2) this.#count(status.wait);
  }

  #count(seconds) {
    const show = () => {
      this.part("countdown").textContent = seconds > 0 ? `Next attempt in ${seconds} s.` : "";
      seconds -= 1;
    };
    show();
    this.#timer = setInterval(show, 1000);
  }
}
