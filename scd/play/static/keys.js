// The keyboard: moves go to the controls, other keys trigger actions. A click gives the keys back.

const NAMES = {
  " ": "pause", ".": "step", Backspace: "rewind", b: "branch", r: "record", v: "beside",
  f: "full", "?": "help",
};

/** Calls `actions[name]()`, or `start(index)` for a digit; ignores all keys while `silent()`. */
export function listen(controls, actions, start, silent) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || silent()) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    // Leave sliders their own keys, and the space bar to a focused button.
    const sliding = event.target.matches("input:not([type=checkbox]), [role=slider]");
    if (sliding && ![" ", "Escape"].includes(key) && !event.code.startsWith("Key")) return;
    if (key === " " && event.target.matches("button, [type=checkbox]")) return;

    if (key === "ArrowDown") event.preventDefault(); // next to the walking keys: do not scroll the page
    if (key === "Escape") document.getElementById("stage").focus();
    else if (controls.moveOf(event)) controls.press(event);
    else if (event.repeat) return;
    else if (/^[1-9]$/.test(key)) start(key - 1);
    else if (NAMES[key]) actions[NAMES[key]]();
    else return;
    event.preventDefault();
  });

  // After a mouse click (detail > 0), or the space bar would press the same button again.
  addEventListener("click", (event) => {
    if (event.detail && event.target.closest("button, [type=range], [type=checkbox], #timeline")) {
      document.activeElement.blur();
    }
  });
}
