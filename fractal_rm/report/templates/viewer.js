"use strict";
const list = document.getElementById("responses");
const all = Array.from(list.querySelectorAll(".response"));
const [sort, show, find, count] = ["sort", "show", "find", "count"].map((id) => document.getElementById(id));

const shows = {
  all: () => true,
  good: (data) => data.label !== "" && Number(data.label) >= 0.5,
  bad: (data) => data.label !== "" && Number(data.label) < 0.5,
  unlabelled: (data) => data.label === "",
  disagrees: (data) => data.state === "disagrees",
  alarm: (data) => data.mistakes.includes("false alarm"),
  missed: (data) => data.mistakes.includes("missed error"),
  error: (data) => data.state === "error",
};

function update() {
  const wanted = shows[show ? show.value : "all"];
  const words = find.value.toLowerCase();
  let shown = 0;
  for (const response of all) {
    response.hidden = !(wanted(response.dataset) && response.textContent.toLowerCase().includes(words));
    shown += response.hidden ? 0 : 1;
  }
  count.textContent = `${shown} of ${all.length} shown`;
}

// What each way of sorting goes by, the largest first; responses without it come last.
const keys = {
  low: (data) => (data.score === "" ? -Infinity : -Number(data.score)),
  high: (data) => (data.score === "" ? -Infinity : Number(data.score)),
  worst: (data) => (data.worst === "" ? -Infinity : -Number(data.worst)),
  wrong: (data) => (data.score === "" || data.label === "" ? -Infinity : Math.abs(Number(data.score) - Number(data.label))),
  apart: (data) => (data.apart === "" ? -Infinity : Number(data.apart)),
};

function order() {
  const key = keys[sort.value];
  const by = (one, two) => (key(one.dataset) === key(two.dataset) ? 0 : key(two.dataset) - key(one.dataset));
  list.append(...(key ? [...all].sort(by) : all));
}

function focus(shown, here, by, block) {
  const next = shown[here < 0 ? 0 : Math.min(Math.max(here + by, 0), shown.length - 1)];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block });
  }
}

function response(by) {
  const shown = Array.from(list.querySelectorAll(".response:not([hidden])"));
  focus(shown, shown.indexOf(document.activeElement.closest(".response")), by, "start");
}

function step(by) {
  const here = document.activeElement.closest(".response:not([hidden])") || list.querySelector(".response:not([hidden])");
  const steps = here ? Array.from(here.querySelectorAll(".step")) : [];
  focus(steps, steps.indexOf(document.activeElement), by, "nearest");
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
  } else if (event.key === "j" || event.key === "k") {
    response(event.key === "j" ? 1 : -1);
  } else if (event.key === "n" || event.key === "p") {
    step(event.key === "n" ? 1 : -1);
  } else if (event.key === "/") {
    event.preventDefault();
    find.focus();
  }
});
sort.addEventListener("change", order);
for (const control of [show, find]) if (control) control.addEventListener("input", update);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
if (all.length) document.getElementById("controls").hidden = false;
if (sort.value !== "row") order(); // a reloaded page keeps its choices
update();
