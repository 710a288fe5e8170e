// Plain words about the server: busy, gone, or a session that has ended.

function place(before) {
  if (before === 0) return "You are next";
  return before === 1 ? "One player waits before you" : `${before} players wait before you`;
}

const ENDED = {
  4401: ["A token is missing", "Open the whole address that the server printed."],
  4408: ["Closed, as nobody played", "After some minutes without a key the place is given to others."],
  4409: ["Played in another page", "This session has moved to another tab or window.", "Play here"],
};

/** What to say about a connection's status: title, text, button; null: nothing. */
function words(status) {
  switch (status.phase) {
    case "busy": {
      const all = status.places === 1 ? "The only place is" : `All ${status.places} places are`;
      return [`${all} taken`, `${place(status.before)}; play begins by itself when one is free.`];
    }
    case "full":
      return ["Very busy", "Many players wait for a place. This page tries again by itself."];
    case "silent":
      return ["The server does not answer", "Play goes on by itself when it does.", "Connect anew"];
    case "lost":
      return [
        "The server cannot be reached",
        "This page tries again by itself, and goes on where you were.",
        "Try now",
      ];
    case "ended": {
      const [title, text, button] = ENDED[status.code] ?? [
        "The server ended this session", `It says: ${status.reason || `code ${status.code}`}.`,
      ];
      return [title, text, status.code === 4401 ? null : (button ?? "Play again")];
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
    if (status.phase === "connecting" && !this.box.hidden) return; // one try of many
    clearInterval(this.#timer);
    this.part("countdown").textContent = "";
    const said = words(status);
    this.box.hidden = said === null;
    if (!said) return;
    const [title, text, button] = said;
    if (this.part("title").textContent !== title) this.part("title").textContent = title;
    if (this.part("text").textContent !== text) this.part("text").textContent = text;
    this.part("button").hidden = !button;
    this.part("button").textContent = button ?? "";
    if (status.wait >= 2) this.#count(status.wait);
  }

  #count(seconds) {
    const tell = () => {
      this.part("countdown").textContent = seconds > 0 ? `Again in ${seconds} s.` : "";
      seconds -= 1;
    };
    tell();
    this.#timer = setInterval(tell, 1000);
  }
}
