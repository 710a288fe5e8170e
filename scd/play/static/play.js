// The page: passes messages from the server to its parts, and the player's input to the server.

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
import { nameWorlds, Worlds } from "./worlds.js";

const $ = (id) => document.getElementById(id);
const RESUMED = "Connected again: going on where you were.";
const NEW_SESSION = "Connected again, in a new session: the old one had expired.";

let hello = null;
let state = null;
let newest = 0; // frame number
let picture = null; // the newest one, until it is drawn
let seq = 0;
let hidden = false; // paused because the page is hidden
let earlier = null; // the last state of a session that has expired
let wasLost = false;
let waiting = false; // for a key, where there is no idle action

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
  picture = null; // its serial belongs to the old connection
  stats.begin(state?.fps ?? 10, status.phase === "open" && running());
  notice.show(status);
}

function onHello(message) {
  if (!message.resumed) {
    earlier = state;
    memory.clear();
    if (wasLost) say(NEW_SESSION);
    recorder.drop("its session has ended");
  } else if (wasLost) {
    say(RESUMED);
  }
  hello = message;
  document.body.classList.add("greeted");
  controls.offer(message.actions, message.idle, message.action_vectors);
  $("invitation").classList.toggle("no-walk", $("pad").hidden);
  for (const row of document.querySelectorAll("#keys [data-needs]")) {
    row.hidden = !controls.has(row.dataset.needs);
  }
  nameWorlds(message.about);
  worlds.about = message.about;
  panel.offer(message);
  wasLost = false;
}

function onState(message, command, refused) {
  state = message;
  newest = message.frame;
  if (refused) say(`Not possible: ${refused}`);
  else memory.follow(message, command);
  if (command.type === "start" && !refused) recorder.drop("another start was chosen");
  if (command.type === "keep" && !refused) say("Branch kept: return to it below the timeline.");
  if (command.type === "hello") {
    restoreEarlier();
    input();
  }
  if (command.type !== "keep") stats.begin(message.fps, running());
  worlds.names = message.worlds;
  if (!connection.waiting) panel.follow(message); // or a slider has moved again
  recorder.follow(newest);
  followTimeline();
  branches.follow(message.branches);
  showPause();
}

// Give a new session the start, worlds and settings of the one that expired.
function restoreEarlier() {
  const exists = (name) => hello.worlds.includes(name);
  if (earlier && hello.starts.includes(earlier.start) && earlier.worlds.every(exists)) {
    connection.command({ type: "start", start: earlier.start, worlds: earlier.worlds });
    const chosen = Object.entries(earlier.settings).filter(([, value]) => value !== null);
    connection.command({ type: "settings", ...Object.fromEntries(chosen), fps: earlier.fps });
  }
  earlier = null;
}

function onPicture(buffer) {
  const drawing = picture !== null;
  picture = readPicture(buffer);
  newest = picture.frame;
  memory.add(picture.frame, picture.worlds[0].image);
  if (!picture.again && controls.curve) input(); // alternate between the two held keys
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
  followTimeline();
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
  newest = frame; // so that a second press goes back further
  connection.command({ type: "rewind", frame });
}

async function returnTo(branch) {
  await recorder.finish(connection.session); // before its timeline is left
  connection.command({ type: "return", branch });
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
  (index) => panel.startAt(index),
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

function followTimeline() {
  timeline.follow(firstFrame(), newest, state.branches.map(({ shared }) => shared));
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
