"use strict";
// Putting videos in order by keys, taps or dragging. A column has a slot for each rank and a tray of videos without one;
// where its chips lie is all there is to know. Several chips in one slot are equal.
const ranking = (() => {
  const fields = [...document.querySelectorAll("fieldset.ranking")];
  let active = fields[0], count = 0;
  const slots = (field) => [...field.querySelectorAll(".rank")];
  const chips = (place) => [...place.querySelectorAll(".chip:not([hidden])")];
  const tray = (field) => field.querySelector(".tray");
  const tie = (field) => field.querySelector(".tie");
  const isTied = (field) => tie(field).getAttribute("aria-pressed") === "true";
  const letters = (slot) => chips(slot).map((chip) => chip.dataset.letter).sort().join("=");

  function activate(field) {
    active = field;
    fields.forEach((one) => one.classList.toggle("active", one === field));
  }

  function changed(field) {
    const whole = chips(tray(field)).length === 0;
    const text = slots(field).map(letters).filter(Boolean).join(">");
    if (whole) state.choices[field.dataset.column] = text; else delete state.choices[field.dataset.column];
    draw();
  }

  function put(chip, slot) {
    const field = chip.closest("fieldset");
    slot.classList.contains("tray") ? slot.insertBefore(chip, tie(field)) : slot.append(chip);
    changed(field);
  }

  // the next rank, or the last one again after the sign of a tie
  function append(chip) {
    const field = chip.closest("fieldset"), places = slots(field);
    const last = places.findLastIndex((slot) => chips(slot).length);
    const next = isTied(field) && last >= 0 ? last : Math.min(last + 1, count - 1);
    tie(field).setAttribute("aria-pressed", "false");
    put(chip, places[next]);
    const open = fields.find((one) => chips(tray(one)).length);
    activate(chips(tray(field)).length || !open ? field : open);
  }

  function takeOut() {
    const last = slots(active).findLast((slot) => chips(slot).length);
    if (last) put(chips(last).at(-1), tray(active));
  }

  const toggleTie = (field) => tie(field).setAttribute("aria-pressed", String(!isTied(field)));
  const move = (by) => activate(fields[(fields.indexOf(active) + by + fields.length) % fields.length]);
  const ACTION = {
    Backspace: takeOut, "=": () => toggleTie(active), t: () => toggleTie(active), ArrowUp: () => move(-1),
    ArrowDown: () => move(1),
  };

  function action(key) {
    const chip = /^[1-6]$/.test(key) && chips(active).find((one) => one.dataset.letter === "ABCDEF"[key - 1]);
    if (chip) return () => (chip.closest(".tray") ? append(chip) : put(chip, tray(active)));
    return ACTION[key];
  }

  function reset(videos) {
    count = videos;
    fields.forEach((field) => {
      [...field.querySelectorAll(".chip")].sort((a, b) => (a.dataset.letter < b.dataset.letter ? -1 : 1))
        .forEach((chip, i) => { tray(field).insertBefore(chip, tie(field)); chip.hidden = i >= count; });
      slots(field).forEach((slot, i) => { slot.hidden = i >= count; });
      tie(field).setAttribute("aria-pressed", "false");
    });
    activate(fields[0]);
  }

  // pointer events, because touch screens know no other dragging
  document.querySelectorAll(".chip").forEach((chip) => {
    let from = null, dragged = false;
    chip.addEventListener("pointerdown", (event) => {
      from = [event.clientX, event.clientY];
      dragged = false;
      chip.setPointerCapture(event.pointerId);
    });
    chip.addEventListener("pointermove", (event) => {
      if (!from) return;
      const [x, y] = [event.clientX - from[0], event.clientY - from[1]];
      dragged ||= Math.hypot(x, y) > 6;
      if (dragged) chip.style.transform = `translate(${x}px, ${y}px)`;
    });
    const end = (event) => {
      chip.style.transform = "";
      const field = chip.closest("fieldset");
      const under = dragged && event.type === "pointerup" && document.elementsFromPoint(event.clientX, event.clientY);
      const slot = under && under.map((one) => one.closest(".slot")).find((one) => one && field.contains(one));
      from = null;
      if (slot) { activate(field); put(chip, slot); }
    };
    chip.addEventListener("pointerup", end);
    chip.addEventListener("pointercancel", end);
    chip.addEventListener("click", (event) => {
      if (!dragged) {
        activate(chip.closest("fieldset"));
        chip.closest(".tray") ? append(chip) : put(chip, tray(active));
      }
      dragged = false;
      if (event.detail) chip.blur();
    });
  });
  document.querySelectorAll(".tie").forEach((button) => button.addEventListener("click", (event) => {
    activate(button.closest("fieldset"));
    toggleTie(active);
    if (event.detail) button.blur();
  }));
  return { reset, action };
})();
