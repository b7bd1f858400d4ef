// The page: theme, views, key, and what serves.

import { get } from "./api.js";
import * as chat from "./chat.js";
import { $, make } from "./dom.js";
import * as engine from "./engine.js";
import * as settings from "./settings.js";

const dark = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const chosen = localStorage.getItem("theme");
  document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light");
}

function show(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === view));
  }
}

async function describe() {
  try {
    const [models, about] = await Promise.all([get("./v1/models"), get("./playground/about")]);
    $("model").textContent = models.data[0].id;
    document.title = `${models.data[0].id} · kernel`;
    $("summary").textContent = about.summary.split("; ").slice(0, 1).join("");
    $("plugins").replaceChildren(...about.explanation.map(reason));
  } catch (error) {
    $("summary").textContent = error.message;
  }
}

function reason(line) {
  const [, subject, rest] = line.match(/^([^:]+:)?(.*)$/);
  return make("li", {}, make("b", {}, (subject ?? "").replace(/^plugin /, "")), rest);
}

paint();
dark.addEventListener("change", paint);
$("theme").addEventListener("click", () => {
  localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
});
for (const button of document.querySelectorAll("nav button")) button.addEventListener("click", () => show(button.dataset.show));
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  describe();
});
settings.start();
chat.start();
describe();
engine.start();
