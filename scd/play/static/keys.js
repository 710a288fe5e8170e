// The keyboard: moves go to the controls, other keys do what they name; after a click keys walk again.

const NAMES = {
  " ": "pause", ".": "step", Backspace: "rewind", b: "branch", r: "record", v: "beside",
  f: "full", "?": "help",
};

/** Calls `actions[name]()`, or `start(place)` for a digit. Nothing while `silent()`. */
export function listen(controls, actions, start, silent) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || silent()) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    // A slider's own keys, and those that press what has the focus.
    const sliding = event.target.matches("input:not([type=checkbox]), [role=slider]");
    if (sliding && ![" ", "Escape"].includes(key) && !event.code.startsWith("Key")) return;
    if (key === " " && event.target.matches("button, [type=checkbox]")) return;

    if (key === "ArrowDown") event.preventDefault(); // beside the keys that walk: the page stays
    if (key === "Escape") document.getElementById("stage").focus();
    else if (controls.moveOf(event)) controls.press(event);
    else if (event.repeat) return;
    else if (/^[1-9]$/.test(key)) start(key - 1);
    else if (NAMES[key]) actions[NAMES[key]]();
    else return;
    event.preventDefault();
  });

  // With the mouse (detail > 0): otherwise the space bar would press the same button once more.
  addEventListener("click", (event) => {
    if (event.detail && event.target.closest("button, [type=range], [type=checkbox], #timeline")) {
      document.activeElement.blur();
    }
  });
}
