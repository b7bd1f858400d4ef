// Tokens that show their alternatives on hover, and with the arrow keys.

import { $, make } from "./dom.js";

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "␣");

export function token(entry) {
  const span = make("span", {
    class: "token",
    tabindex: "-1",
    onmouseenter: () => show(span, entry),
    onmouseleave: hide,
    onfocus: () => show(span, entry),
    onblur: hide,
    onkeydown: move,
  }, entry.token);
  span.style.setProperty("--doubt", (1 - Math.exp(entry.logprob)).toFixed(3));
  if (!document.querySelector(".running .token")) span.tabIndex = 0; // one stop for the Tab key an answer
  return span;
}

function move(event) {
  const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const target = next && event.currentTarget[next];
  if (!target) return;
  event.preventDefault();
  event.currentTarget.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

function show(span, entry) {
  const rows = entry.top_logprobs.map((other) => {
    const chosen = other.token === entry.token ? "chosen" : "";
    return make("div", { class: chosen }, make("span", {}, visible(other.token)), make("span", {}, percent(other.logprob)));
  });
  if (!entry.top_logprobs.some((other) => other.token === entry.token)) {
    rows.push(make("div", { class: "chosen" }, make("span", {}, visible(entry.token)), make("span", {}, percent(entry.logprob))));
  }
  const tip = $("tip");
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const place = span.getBoundingClientRect();
  const below = place.bottom + tip.offsetHeight + 12 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? place.bottom + 6 : place.top - tip.offsetHeight - 6}px`;
}

function hide() {
  $("tip").hidden = true;
}
