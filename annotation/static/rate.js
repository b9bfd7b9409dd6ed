"use strict";
// The page on which people rate: videos play in step, each choice has a key, and nothing needs a mouse.
// In rankings, rank.js makes the choices.
const settings = JSON.parse(document.body.dataset.settings);
const here = location.pathname.replace(/\/$/, "");
const $ = (id) => document.getElementById(id);
const screens = [...document.querySelectorAll("main video")];
let videos = screens; // those in use: a ranking may have fewer
const rows = [...document.querySelectorAll("fieldset[data-column]")];
const KEYS = { pairs: ["123", "456", "789", "iop"], single: ["12345", "67890", "qwert", "yiopn"] };
const CHOICE = {}; // column and choice by key
rows.forEach((row, i) => row.querySelectorAll(".choice").forEach((button, j) => {
  const key = KEYS[settings.kind][i][j];
  CHOICE[key] = [row.dataset.column, button.dataset.choice];
  button.querySelector("kbd").textContent = key;
}));
let task = null, state = { choices: {}, flags: new Set() }, busy = false;

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(here + path, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const text = found.error || found.detail || `the server answered ${answer.status}`;
    throw Object.assign(new Error(text), { status: answer.status });
  }
  return found;
}

function say(text, kind = "") { $("message").textContent = text; $("message").className = kind; }

async function show() {
  const found = await ask("/task");
  const { kind, done, total, round, last_hour } = found.progress;
  $("progress").textContent = `${done} of ${total} ${kind === "review" ? "decided" : "done"}` +
    (kind === "training" ? "" : `, ${last_hour} in the last hour`);
  Object.assign($("share"), { max: total || 1, value: done });
  task = found.task;
  $("rating").hidden = !task;
  $("done").hidden = !!task;
  $("prompt").textContent = task ? task.prompt : "";
  $("kind").textContent = task ? { training: `training round ${round}:`, review: "review:", work: "" }[task.kind] : "";
  state = { choices: {}, flags: new Set() };
  document.querySelectorAll("select").forEach((select) => { select.value = ""; });
  enlarge(null);
  $("image").hidden = !task?.image;
  if (task?.image) $("image").src = `${here}/image/${task.ticket}`;
  videos = screens.slice(0, task ? task.videos : 0);
  screens.forEach((video) => { video.closest("figure").hidden = !videos.includes(video); });
  if (settings.kind === "ranking") ranking.reset(videos.length);
  draw();
  if (!task) return;
  videos.forEach((video) => { video.src = `${here}/video/${task.ticket}/${video.id}`; video.loop = false; });
  // not awaited: keys work while videos load. Some browsers load no picture before they play, but all load the length
  Promise.all(videos.map((video) => new Promise((ready) => {
    video.onloadedmetadata = ready;
    video.onerror = () => say("A video does not play: reload the page, and press b if that does not help.", "bad");
  }))).then(() => { if (task === found.task) play(true); });
}

function draw() {
  rows.forEach((row) => row.querySelectorAll(".choice").forEach((button) => {
    button.setAttribute("aria-pressed", state.choices[row.dataset.column] === button.dataset.choice);
  }));
  document.querySelectorAll(".flag").forEach((button) => {
    button.setAttribute("aria-pressed", state.flags.has(button.dataset.flag));
  });
  const complete = state.flags.size || rows.every((row) => state.choices[row.dataset.column]);
  $("send").disabled = busy || !task || !complete;
}

function choose(column, choice) {
  if (!task) return;
  state.choices[column] = choice;
  draw();
}

function flag(name) {
  if (!task) return;
  state.flags.has(name) ? state.flags.delete(name) : state.flags.add(name);
  draw();
}

// --- videos in step: the left one leads while it lasts ---
const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";
const toggle = (id) => $(id).setAttribute("aria-pressed", !pressed(id));

function play(on) {
  videos.forEach((video) => { video.playbackRate = pressed("slow") ? 0.5 : 1; });
  const atEnd = videos.every((video) => video.ended || video.currentTime >= video.duration);
  if (on && atEnd) videos.forEach((video) => { video.currentTime = 0; });
  // the shorter one of two videos waits at its end: play() would start it again
  videos.forEach((video) => { if (!on) video.pause(); else if (!video.ended) video.play().catch(() => {}); });
}
const playing = () => videos.some((video) => !video.paused && !video.ended);

function step(frames) {
  if (!task) return;
  play(false);
  const now = Math.max(...videos.map((video) => video.currentTime)) + frames / task.fps;
  videos.forEach((video) => { video.currentTime = Math.min(Math.max(now, 0), video.duration || 0); });
}

videos.forEach((video) => video.addEventListener("ended", () => {
  if (pressed("loop") && videos.every((v) => v.ended)) play(true);
}));
setInterval(() => {
  const [lead, ...others] = videos;
  if (!lead) return;
  others.filter((other) => !lead.paused && !lead.ended && !other.ended).forEach((other) => {
    if (Math.abs(lead.currentTime - other.currentTime) > 0.08) other.currentTime = lead.currentTime;
  });
  $("place").textContent = lead.duration ? `${lead.currentTime.toFixed(2)} / ${lead.duration.toFixed(2)} s` : "";
}, 100);

function full() {
  document.fullscreenElement ? document.exitFullscreen() : document.querySelector(".videos").requestFullscreen();
}

// a tap makes one picture as large as the window, another one puts it back
function enlarge(picture) {
  document.querySelectorAll(".enlarged").forEach((one) => one !== picture && one.classList.remove("enlarged"));
  if (picture) picture.classList.toggle("enlarged");
}
document.querySelectorAll(".large").forEach((one) => one.addEventListener("click", () => enlarge(one)));

// seconds of a video that were played, each counted once
function played(video) {
  return [...Array(video.played.length).keys()].reduce((sum, i) => sum + video.played.end(i) - video.played.start(i), 0);
}

// --- sending ---
async function send() {
  if ($("send").disabled) return;
  const scores = {};
  document.querySelectorAll("fieldset[data-side] select").forEach((select) => {
    const { side } = select.closest("fieldset").dataset;
    if (select.value) (scores[side] ||= {})[select.dataset.dimension] = Number(select.value);
  });
  busy = true;
  draw();
  try {
    const watched = videos.map(played);
    const vote = { ticket: task.ticket, choices: state.choices, scores, flags: [...state.flags], watched };
    const { reference } = await ask("/vote", vote);
    const near = settings.kind === "single" ? 1 : 0; // scores that differ by 1 are right
    const isRight = (said, right) => said === right || Math.abs(said - right) <= near;
    const wrong = Object.entries(reference || {}).filter(([column, right]) => !isRight(state.choices[column], right));
    if (wrong.length) {
      const told = wrong.map(([column, right]) => `${settings.words[column]}: ${right}`);
      say(`The right answers were: ${told.join(", ")}`, "bad");
    } else say(reference ? "All your answers were right." : "", "good");
  } catch (error) {
    say(error.message, "bad");
    if (error.status !== 409) { busy = false; draw(); return; } // try again; a dead ticket brings a new pair instead
  }
  await next();
}

async function next() {
  try { await show(); } catch (error) { say(`The next one did not come (${error.message}); reload the page.`, "bad"); }
  busy = false;
  draw();
}

async function undo() {
  busy = true;
  draw();
  try {
    const answer = await ask("/undo", {});
    say(answer.undone ? "Your last vote is taken back; rate it again." : "There is no vote to take back.");
  } catch (error) { say(error.message, "bad"); }
  await next();
}

function guideline() {
  const dialog = $("guideline");
  if (dialog.open) return dialog.close();
  dialog.showModal();
  dialog.scrollTop = 0;
}

// --- keys and buttons ---
const ACTIONS = {
  " ": () => play(!playing()), ArrowLeft: () => step(-1), ArrowRight: () => step(1), l: () => toggle("loop"),
  s: () => { toggle("slow"); play(playing()); }, f: full, h: guideline, u: undo, Enter: send,
  x: () => flag("unsafe"), b: () => flag("broken"), Escape: () => enlarge(null),
};
const BUTTONS = {
  play: " ", back: "ArrowLeft", forward: "ArrowRight", loop: "l", slow: "s", full: "f", help: "h", undo: "u",
  send: "Enter",
};

// Digits count by their place, with Shift or without: some keyboards have other signs there. Letters count as they are
// printed, or by their place where they are not Latin.
function keyOf(event) {
  const place = /^(?:Digit|Numpad|Key)(\w)$/.exec(event.code)?.[1].toLowerCase();
  if (event.key.length > 1) return event.key;
  return place && (/\d/.test(place) || event.key > "~") ? place : event.key.toLowerCase();
}

let pointer = false; // whether the last choice was made by pointing
document.addEventListener("pointerdown", () => { pointer = true; }, true);
document.addEventListener("keydown", (event) => {
  pointer = false;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = keyOf(event);
  if (event.target.tagName === "SELECT") { // a list uses the keys itself; these two leave it
    if (key === "Enter" || key === "Escape") event.target.blur();
    return;
  }
  if (event.repeat && !key.startsWith("Arrow")) return; // a key that is held down counts once
  // a button with the focus is pressed by these keys, unless it is hidden: the button of the guideline keeps the focus
  // until the frame after it was closed
  if ((key === " " || key === "Enter") && event.target.closest("button, summary, a")?.offsetParent) return;
  if ($("guideline").open && key !== "h") return;
  const choice = settings.kind === "ranking" ? task && ranking.action(key) : CHOICE[key] && (() => choose(...CHOICE[key]));
  const action = choice || ACTIONS[key];
  if (!action || (busy && key !== "h")) return;
  event.preventDefault();
  action();
});
for (const [id, key] of Object.entries(BUTTONS)) {
  $(id).addEventListener("click", (event) => {
    if (!busy || key === "h") ACTIONS[key]();
    if (event.detail || id === "undo") $(id).blur(); // or Enter would undo once more
  });
}
rows.forEach((row) => row.querySelectorAll(".choice").forEach((button) => {
  button.addEventListener("click", (event) => {
    choose(row.dataset.column, button.dataset.choice);
    if (event.detail) button.blur();
  });
}));
document.querySelectorAll(".flag").forEach((button) => {
  button.addEventListener("click", (event) => {
    flag(button.dataset.flag);
    if (event.detail) button.blur();
  });
});
document.querySelectorAll("select").forEach((select) => {
  select.addEventListener("change", () => { if (pointer) select.blur(); });
});
if (!document.documentElement.requestFullscreen) $("full").hidden = true;
setInterval(() => { if (!task && !busy) show().catch(() => {}); }, 20000); // there may be a pair by then
show().catch((error) => say(error.message, "bad"));
