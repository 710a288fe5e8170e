// The page: what comes from the server goes to its parts, what the player does goes to the server.

import { Branches } from "./branches.js";
import { Connection } from "./connection.js";
import { Controls } from "./controls.js";
import { listen } from "./keys.js";
import { LONGEST, Memory } from "./memory.js";
import { Notice } from "./notice.js";
import { Panel } from "./panel.js";
import { paint, readPicture } from "./picture.js";
import { Recorder } from "./recorder.js";
import { Stats } from "./stats.js";
import { Timeline } from "./timeline.js";
import { Worlds } from "./worlds.js";

const $ = (id) => document.getElementById(id);
const BACK = "Connected again: going on where you were.";
const ANEW = "Connected again, in a new session: the server had forgotten the old one.";

let hello = null;
let state = null;
let newest = 0; // frame
let picture = null; // the newest one, until it is on the screen
let seq = 0;
let hidden = false; // paused because nobody can see the page
let earlier = null; // what a session was like that is gone
let wasLost = false;
let waiting = false; // for a key: no action stands for none

const memory = new Memory();
const worlds = new Worlds($("worlds"));
const stats = new Stats($("stats"));
const timeline = new Timeline($("timeline"), memory, rewind);
const branches = new Branches($("branches"), memory, returnTo);
const recorder = new Recorder($("record"), say);
const controls = new Controls($("pad"), $("others"), {
  changed: held, pressed: (name) => actions[name](),
});
const panel = new Panel({
  start: (choice) => connection.command({ type: "start", ...choice }),
  settings: (changes) => connection.command({ type: "settings", ...changes }),
});
const notice = new Notice($("notice"), () => connection.open());
const connection = new Connection({
  status: onStatus, hello: onHello, state: onState, picture: onPicture,
});

// ---- from the server

function onStatus(status) {
  document.body.dataset.phase = status.phase;
  for (const id of ["bar", "time", "panel"]) $(id).inert = status.phase !== "open";
  if (status.phase === "lost" && hello) wasLost = true;
  if (status.phase === "ended") wasLost = false;
  picture = null; // its serial means nothing to another connection
  stats.begin(state?.fps ?? 10, status.phase === "open" && running());
  notice.show(status);
}

function onHello(message) {
  if (!message.resumed) {
    earlier = state;
    memory.clear();
    if (wasLost) say(ANEW);
    recorder.drop("its session has ended");
  } else if (wasLost) {
    say(BACK);
  }
  hello = message;
  document.body.classList.add("greeted");
  controls.offer(message.actions, message.idle, message.several);
  $("invitation").classList.toggle("no-walk", $("pad").hidden);
  for (const row of document.querySelectorAll("#keys [data-needs]")) {
    row.hidden = !controls.has(row.dataset.needs);
  }
  worlds.about = message.about;
  panel.offer(message);
  wasLost = false;
}

function onState(message, command, refused) {
  state = message;
  newest = message.frame;
  if (refused) say(`Not done: ${refused}`);
  else memory.follow(message, command);
  if (command.type === "start" && !refused) recorder.drop("another start was chosen");
  if (command.type === "keep" && !refused) say("Kept: return to this moment below the strip.");
  if (command.type === "hello") {
    comeBack();
    input();
  }
  if (command.type !== "keep") stats.begin(message.fps, running());
  worlds.names = message.worlds;
  if (!connection.waiting) panel.follow(message); // else a slider has moved on
  recorder.follow(newest);
  followLine();
  branches.follow(message.moments);
  showPause();
}

// A new session after an old one: the same start, worlds and settings.
function comeBack() {
  const there = (name) => hello.worlds.includes(name);
  if (earlier && hello.starts.includes(earlier.start) && earlier.worlds.every(there)) {
    connection.command({ type: "start", start: earlier.start, worlds: earlier.worlds });
    connection.command({ type: "settings", ...earlier.settings, fps: earlier.fps });
  }
  earlier = null;
}

function onPicture(buffer) {
  const drawing = picture !== null;
  picture = readPicture(buffer);
  newest = picture.frame;
  memory.add(picture.frame, picture.worlds[0].image);
  if (!picture.again && controls.curve) input(); // the other of the two held keys
  if (!drawing) requestAnimationFrame(show);
}

function show() {
  const shown = picture;
  if (!shown) return;
  picture = null;
  worlds.show(shown, hello.worlds);
  connection.send({ type: "seen", serial: shown.serial });
  if (!shown.again) stats.shown(shown, hello.worlds);
  recorder.follow(newest);
  followLine();
  showInvitation();
}

// ---- to the server

function input() {
  seq += 1;
  connection.send({ type: "input", ...controls.next(), seq });
}

function held() {
  if (!state) return;
  if (atStart() && controls.holding) actions.pause();
  if (waiting !== controls.waiting) stats.begin(state.fps, running());
  input();
  if (!state.paused) stats.pressed(seq);
}

function rewind(frame) {
  newest = frame; // a second press goes back from there
  connection.command({ type: "rewind", frame });
}

async function returnTo(moment) {
  await recorder.finish(connection.session); // of the line that is left
  connection.command({ type: "return", moment });
}

const actions = {
  pause: () => connection.command({ type: "pause", paused: !state?.paused }),
  step: () => {
    if (state && !state.paused) connection.command({ type: "pause", paused: true });
    else connection.send({ type: "step" });
  },
  rewind: () => state && rewind(Math.max(firstFrame(), newest - Math.round(stats.rate ?? state.fps))),
  branch: () => connection.command({ type: "keep" }),
  record: () => state && recorder.toggle(connection.session),
  full: () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else document.documentElement.requestFullscreen();
  },
  help: () => $("keys").showModal(),
};
for (const [id, act] of Object.entries(actions)) $(id).addEventListener("click", act);

listen(
  controls,
  { ...actions, beside: () => panel.toggleBeside() },
  (place) => panel.startAt(place),
  () => $("keys").open || document.body.dataset.phase !== "open",
);

$("smooth").addEventListener("change", ({ target }) => (worlds.smooth = target.checked));

document.addEventListener("visibilitychange", () => {
  if (document.hidden && state && !state.paused) {
    hidden = true;
    connection.command({ type: "pause", paused: true });
  } else if (!document.hidden && hidden) {
    hidden = false;
    connection.command({ type: "pause", paused: false });
  }
});

// ---- on the page

function firstFrame() {
  return Math.max(state.oldest, state.given - 1, newest - LONGEST + 1);
}

function running() {
  waiting = controls.waiting;
  return state?.paused === false && !waiting;
}

function atStart() {
  return state.paused && newest === state.given - 1;
}

function followLine() {
  timeline.follow(firstFrame(), newest, state.moments.map(({ shared }) => shared));
}

function showPause() {
  const name = state.paused ? "play" : "pause";
  $("pause").setAttribute("aria-label", state.paused ? "Play" : "Pause");
  $("pause").querySelector("use").setAttribute("href", `#icon-${name}`);
  document.body.classList.toggle("paused", state.paused);
  showInvitation();
}

function showInvitation() {
  $("invitation").hidden = !atStart();
}

let saying = 0;
function say(text, forSeconds = 6) {
  clearTimeout(saying);
  $("status").textContent = text;
  saying = setTimeout(() => ($("status").textContent = ""), 1000 * forSeconds);
}

$("full").hidden = !document.fullscreenEnabled;
worlds.names = ["model"];
connection.open();
