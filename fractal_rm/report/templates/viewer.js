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

function order() {
  const sign = sort.value === "low" ? 1 : -1;
  const score = (response) => (response.dataset.score === "" ? sign * Infinity : Number(response.dataset.score));
  const sorted = sort.value === "row" ? all : [...all].sort((a, b) => (score(a) === score(b) ? 0 : sign * (score(a) - score(b))));
  list.append(...sorted);
}

function step(by) {
  const shown = Array.from(list.querySelectorAll(".response:not([hidden])"));
  const here = shown.indexOf(document.activeElement.closest(".response"));
  const next = shown[here < 0 ? 0 : Math.min(Math.max(here + by, 0), shown.length - 1)];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
  } else if (event.key === "j" || event.key === "k") {
    step(event.key === "j" ? 1 : -1);
  } else if (event.key === "/") {
    event.preventDefault();
    find.focus();
  }
});
sort.addEventListener("change", order);
for (const control of [show, find]) if (control) control.addEventListener("input", update);
document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
if (all.length) document.getElementById("controls").hidden = false;
order(); // a reloaded page keeps its choices
update();
