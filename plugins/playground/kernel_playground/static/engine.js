// The engine at work, asked for twice a second while the page can be seen.

import { get } from "./api.js";
import { $, make, makeSvg } from "./dom.js";

const EVERY = 500; // milliseconds
const SECONDS = 60;
const SHOWN = 150; // steps
let known = 0;
let steps = [];
let cells = "";

export async function start() {
  for (;;) {
    if (!document.hidden) await look();
    await new Promise((resolve) => setTimeout(resolve, EVERY));
  }
}

async function look() {
  try {
    const view = await get(`./playground/view?since=${known}`);
    if (view.count < known) steps = []; // another engine
    known = view.count;
    draw(view);
    status("live", "live");
    $("engine-error").hidden = true;
  } catch (error) {
    status("lost", "no engine");
    $("engine-error").textContent = error.message;
    $("engine-error").hidden = false;
  }
}

function status(kind, text) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = `state ${kind}`;
}

function draw(view) {
  steps = [...steps, ...view.steps].slice(-SHOWN);
  drawRates(view);
  drawSteps(view);
  drawBlocks(view.blocks);
  drawSequences(view);
  $("t-running").textContent = view.num_running;
  $("t-waiting").textContent = view.num_waiting;
}

function drawRates(view) {
  const now = Math.floor(view.now);
  const by = new Map(view.rates.map(([second, prompt, made]) => [second, [prompt, made]]));
  const series = Array.from({ length: SECONDS }, (_, i) => by.get(now - SECONDS + i) ?? [0, 0]);
  const recent = by.get(now - 1) ?? [0, 0];
  const live = by.get(now) ?? [0, 0];
  const share = view.now - now;
  const rate = (i) => Math.round(recent[i] || (share > 0.2 ? live[i] / share : live[i]));
  $("t-generated").textContent = rate(1).toLocaleString("en");
  $("t-prompt").textContent = rate(0).toLocaleString("en");
  const most = Math.max(10, ...series.flat());
  const x = (i) => (600 * i) / (SECONDS - 1);
  const line = (which) => series.map((pair, i) => `${x(i).toFixed(1)},${(84 - (76 * pair[which]) / most).toFixed(1)}`).join(" L");
  const made = line(1);
  $("rates").replaceChildren(
    makeSvg("path", { class: "area", d: `M0,90 L${made} L600,90 Z` }),
    makeSvg("path", { class: "curve prompt", d: `M${line(0)}` }),
    makeSvg("path", { class: "curve", d: `M${made}` }),
  );
}

// A step is [number, planned, committed, rows, prompt tokens, new tokens, running, waiting].
function drawSteps(view) {
  const longest = Math.max(0.001, ...steps.map((step) => step[2] - step[1]));
  const width = 600 / SHOWN;
  const bars = steps.map((step, i) => {
    const height = Math.max(1.5, (54 * (step[2] - step[1])) / longest);
    const x = 600 - (steps.length - i) * width;
    return makeSvg("rect", { class: step[4] ? "step prompt" : "step", x, y: 60 - height, width: width * 0.75, height });
  });
  $("steps").replaceChildren(...bars);
  const last = steps.at(-1);
  $("step-text").textContent = last
    ? `${view.count.toLocaleString("en")} so far, the last ${((last[2] - last[1]) * 1000).toFixed(1)} ms with ${last[3]} row${last[3] === 1 ? "" : "s"}`
    : "none yet";
}

function drawBlocks(blocks) {
  const used = blocks.total - blocks.free;
  const each = blocks.each > 1 ? `, ${blocks.each} a square` : "";
  $("block-text").textContent = `${used.toLocaleString("en")} of ${blocks.total.toLocaleString("en")} in use${each}`;
  const grid = $("blocks");
  if (grid.children.length !== blocks.cells.length) {
    grid.replaceChildren(...Array.from(blocks.cells, () => make("i")));
    cells = "";
  }
  for (let i = 0; i < blocks.cells.length; i++) {
    if (blocks.cells[i] !== cells[i]) grid.children[i].className = `c${blocks.cells[i]}`;
  }
  cells = blocks.cells;
  grid.setAttribute("aria-label", `KV blocks: ${used} of ${blocks.total} in use`);
}

function drawSequences(view) {
  const row = (one, state) =>
    make(
      "tr",
      {},
      make("td", { title: one.id }, one.id),
      make("td", {}, String(one.prompt)),
      make("td", {}, String(one.cached)),
      make("td", {}, state ?? `${one.generated}${one.preempted ? ` (preempted ${one.preempted}×)` : ""}`),
      make("td", {}, `${one.age.toFixed(1)} s`),
    );
  const rows = [...view.running.map((one) => row(one)), ...view.waiting.map((one) => row(one, "waiting"))];
  const none = make("tr", {}, make("td", { class: "none", colspan: 5 }, `none now; ${view.ended.toLocaleString("en")} ended so far`));
  $("sequences").replaceChildren(...(rows.length ? rows : [none]));
}
