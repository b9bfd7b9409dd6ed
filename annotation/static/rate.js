"use strict";
// The page that rates a pair: two videos in step, one key for every choice, nothing that needs a mouse.
const settings = JSON.parse(document.body.dataset.settings);
const here = location.pathname.replace(/\/$/, "");
const $ = (id) => document.getElementById(id);
const videos = [$("left"), $("right")];
const rows = [...document.querySelectorAll("fieldset[data-column]")];
const CHOICE = {}; // key -> [column, choice]
rows.forEach((row, i) => row.querySelectorAll(".choice").forEach((button, j) => {
  const key = { 0: "123", 1: "456", 2: "789", 3: "iop" }[i][j];
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
  if (!answer.ok) throw Object.assign(new Error(found.error || found.detail || `the server answered ${answer.status}`), { status: answer.status });
  return found;
}

function say(text, kind = "") { $("message").textContent = text; $("message").className = kind; }

async function show() {
  const found = await ask("/task");
  const p = found.progress;
  $("progress").textContent = `${p.mine} rated by you, ${p.last_hour} in the last hour; ${p.open} of ${p.pairs} pairs open` +
    (p.review ? `, ${p.review} to review` : "");
  task = found.task;
  $("rating").hidden = !task;
  $("done").hidden = !!task;
  $("prompt").textContent = task ? task.prompt : "";
  $("kind").textContent = task ? { training: "training round:", review: "review:", work: "" }[task.kind] : "";
  state = { choices: {}, flags: new Set() };
  document.querySelectorAll("select").forEach((select) => { select.value = ""; });
  draw();
  if (!task) return;
  videos.forEach((video) => { video.src = `${here}/video/${task.ticket}/${video.id}`; video.loop = false; });
  // not awaited: keys work while videos load. Some browsers load no picture before it plays, but all of them the length
  Promise.all(videos.map((video) => new Promise((ready) => {
    video.onloadedmetadata = ready;
    video.onerror = () => say("a video does not play: reload the page, and press b if it stays so", "bad");
  }))).then(() => { if (task === found.task) play(true); });
}

function draw() {
  rows.forEach((row) => row.querySelectorAll(".choice").forEach((button) => {
    button.setAttribute("aria-pressed", state.choices[row.dataset.column] === button.dataset.choice);
  }));
  document.querySelectorAll(".flag").forEach((button) => button.setAttribute("aria-pressed", state.flags.has(button.dataset.flag)));
  $("send").disabled = busy || !task || !(state.flags.size || rows.every((row) => state.choices[row.dataset.column]));
}

function choose(column, choice) { if (!task) return; state.choices[column] = choice; draw(); }
function flag(name) { if (!task) return; state.flags.has(name) ? state.flags.delete(name) : state.flags.add(name); draw(); }

// --- two videos in step: the left one leads while it lasts ---
const pressed = (id) => $(id).getAttribute("aria-pressed") === "true";
const toggle = (id) => $(id).setAttribute("aria-pressed", !pressed(id));

function play(on) {
  videos.forEach((video) => { video.playbackRate = pressed("slow") ? 0.5 : 1; });
  if (on && videos.every((video) => video.ended || video.currentTime >= video.duration)) videos.forEach((video) => { video.currentTime = 0; });
  // of two lengths the shorter one waits at its end: play() would begin it anew
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
  if (pressed("loop") && videos.every((v) => v.ended)) { videos.forEach((v) => { v.currentTime = 0; }); play(true); }
}));
setInterval(() => {
  const [lead, other] = videos;
  if (!lead.paused && !lead.ended && !other.ended && Math.abs(lead.currentTime - other.currentTime) > 0.08) other.currentTime = lead.currentTime;
  $("place").textContent = lead.duration ? `${lead.currentTime.toFixed(2)} / ${lead.duration.toFixed(2)} s` : "";
}, 100);

function full() { document.fullscreenElement ? document.exitFullscreen() : document.querySelector(".videos").requestFullscreen(); }

// --- sending ---
async function send() {
  if ($("send").disabled) return;
  const scores = {};
  document.querySelectorAll("fieldset[data-side] select").forEach((select) => {
    if (select.value) (scores[select.closest("fieldset").dataset.side] ||= {})[select.dataset.dimension] = Number(select.value);
  });
  busy = true;
  draw();
  try {
    const answer = await ask("/vote", { ticket: task.ticket, choices: state.choices, scores, flags: [...state.flags] });
    const wrong = answer.reference ? Object.entries(answer.reference).filter(([c, right]) => state.choices[c] !== right) : [];
    if (answer.reference && wrong.length) {
      say("Reference for the last pair: " + wrong.map(([c, right]) => `${settings.words[c]}: ${right}`).join(", "), "bad");
    } else say(answer.reference ? "As the reference has it." : "", "good");
  } catch (error) {
    say(error.message, "bad");
    if (error.status !== 409) { busy = false; draw(); return; } // try again; a dead ticket brings a new pair instead
  }
  await next();
}

async function next() {
  try { await show(); } catch (error) { say(`the next pair did not come: ${error.message}; reload the page`, "bad"); }
  busy = false;
  draw();
}

async function undo() {
  busy = true;
  draw();
  try {
    const answer = await ask("/undo", {});
    say(answer.undone ? "Taken back; rate it again." : "There is nothing to take back.");
  } catch (error) { say(error.message, "bad"); }
  await next();
}

function guideline() { const d = $("guideline"); d.open ? d.close() : d.showModal(); }

const ACTIONS = {
  " ": () => play(!playing()), ArrowLeft: () => step(-1), ArrowRight: () => step(1), l: () => toggle("loop"),
  s: () => { toggle("slow"); play(playing()); }, f: full, h: guideline, u: undo, Enter: send, x: () => flag("unsafe"), b: () => flag("broken"),
};
// digits by their place, with Shift or without: some keyboards have other signs there; letters as printed, or by place where not Latin
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
  if (event.target.tagName === "SELECT") { // keys are its own; these leave it
    if (key === "Enter" || key === "Escape") event.target.blur();
    return;
  }
  if (event.repeat && !key.startsWith("Arrow")) return; // a key that is held down is pressed once
  // that is pressed; but a closed guideline's button keeps the focus until the next frame, and is not
  if ((key === " " || key === "Enter") && event.target.closest("button, summary, a")?.offsetParent) return;
  if ($("guideline").open && key !== "h") return;
  const action = ACTIONS[key] || (CHOICE[key] && (() => choose(...CHOICE[key])));
  if (!action || (busy && key !== "h")) return;
  event.preventDefault();
  action();
});
for (const [id, key] of Object.entries({ play: " ", back: "ArrowLeft", forward: "ArrowRight", loop: "l", slow: "s", full: "f", help: "h", undo: "u", send: "Enter" })) {
  $(id).addEventListener("click", (event) => { if (!busy || key === "h") ACTIONS[key](); if (event.detail || id === "undo") $(id).blur(); }); // or Enter would undo once more
}
rows.forEach((row) => row.querySelectorAll(".choice").forEach((button) =>
  button.addEventListener("click", (event) => { choose(row.dataset.column, button.dataset.choice); if (event.detail) button.blur(); })));
document.querySelectorAll(".flag").forEach((button) => button.addEventListener("click", (event) => { flag(button.dataset.flag); if (event.detail) button.blur(); }));
document.querySelectorAll("select").forEach((select) => select.addEventListener("change", () => { if (pointer) select.blur(); }));
if (!document.documentElement.requestFullscreen) $("full").hidden = true;
setInterval(() => { if (!task && !busy) show().catch(() => {}); }, 20000); // there may be more soon
show().catch((error) => say(error.message, "bad"));
