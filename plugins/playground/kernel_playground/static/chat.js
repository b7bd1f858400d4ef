// The conversation.

import { stream } from "./api.js";
import { $, make } from "./dom.js";
import { fields } from "./settings.js";
import { token } from "./tokens.js";

const STARTERS = ["What does os.path.join do?", "Call math.sqrt with 16", "Hello!"];
let conversation = []; // as the API has it
let running = null; // AbortController of the answer in progress

export function start() {
  for (const text of STARTERS) {
    $("starters").append(make("button", { type: "button", onclick: () => ask(text) }, text));
  }
  $("compose").addEventListener("submit", (event) => {
    event.preventDefault();
    ask($("input").value);
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask($("input").value);
  });
  $("input").addEventListener("input", grow);
  $("stop-button").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", clear);
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

function clear() {
  running?.abort();
  conversation = [];
  $("messages").replaceChildren(welcome);
  $("speed").textContent = "";
  $("input").focus();
}
const welcome = $("welcome");

function add(element) {
  welcome.remove();
  $("messages").append(element);
  scroll();
  return element;
}

function scroll() {
  const box = $("messages");
  box.scrollTop = box.scrollHeight;
}

// Measuring the page for every token of a fast answer would leave no time for anything else, such as the Stop button.
let awaited = false;
function scrollWithFrame() {
  if (awaited) return;
  awaited = true;
  requestAnimationFrame(() => {
    awaited = false;
    scroll();
  });
}

function ask(text) {
  text = text.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  conversation.push({ role: "user", content: text });
  add(make("div", { class: "message user" }, text));
  answer();
}

function fail(error, message) {
  message?.remove();
  add(make("p", { class: "error", role: "alert" }, error.message));
}

async function answer() {
  const shown = new Answer();
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...conversation] : conversation;
  running = new AbortController();
  $("send").hidden = true;
  $("stop-button").hidden = false;
  let failed = null;
  try {
    const body = { messages, stream: true, stream_options: { include_usage: true }, ...fields() };
    for await (const event of stream("./v1/chat/completions", body, running.signal)) shown.take(event);
  } catch (error) {
    if (error.name === "AbortError") shown.ending = "stopped";
    else failed = error;
  }
  running = null;
  $("send").hidden = false;
  $("stop-button").hidden = true;
  if (failed) {
    fail(failed, shown.text || shown.calls.length ? null : shown.element);
    if (!shown.text) return;
  }
  shown.finish();
  $("input").focus();
}

class Answer {
  constructor() {
    this.textElement = make("span", { class: "text" });
    this.element = add(make("div", { class: "message assistant running" }, this.textElement));
    this.text = "";
    this.calls = [];
    this.ending = null;
    this.started = performance.now();
    this.first = null;
    this.usage = null;
  }

  take(event) {
    this.usage = event.usage ?? this.usage;
    const choice = event.choices[0];
    if (!choice) return;
    const { content, tool_calls: calls, reasoning } = choice.delta;
    if (content || calls || reasoning) {
      this.first ??= performance.now();
      $("speed").textContent = `${Math.round((performance.now() - this.started) / 100) / 10} s`;
    }
    if (reasoning) this.think(reasoning);
    const details = choice.logprobs?.content;
    if (content) {
      this.text += content;
      if (details?.length) this.textElement.append(...details.map(token));
      else this.textElement.append(content);
    }
    for (const call of calls ?? []) this.call(call);
    this.ending = choice.finish_reason ?? this.ending;
    scrollWithFrame();
  }

  think(text) {
    if (!this.thoughts) this.element.prepend((this.thoughts = make("div", { class: "reasoning" })));
    this.thoughts.append(text);
  }

  call(piece) {
    const call = (this.calls[piece.index] ??= this.begin(piece));
    call.function.arguments += piece.function?.arguments ?? "";
    call.shown.textContent = call.function.arguments;
  }

  begin(piece) {
    const shown = make("pre", { class: "code" });
    const card = make("div", { class: "call" }, make("b", {}, piece.function.name), shown);
    this.element.append(card);
    return { id: piece.id, type: "function", function: { name: piece.function.name, arguments: "" }, shown, card };
  }

  finish() {
    this.element.classList.remove("running");
    const calls = this.calls.map(({ id, type, function: called }) => ({ id, type, function: called }));
    conversation.push({ role: "assistant", content: this.text || null, ...(calls.length && { tool_calls: calls }) });
    if (!this.text && !calls.length) conversation.at(-1).content = "";
    if (this.ending !== "stopped") this.askForResults();
    this.element.append(make("div", { class: "meta" }, this.figures()));
    $("speed").textContent = "";
    scroll();
  }

  figures() {
    const end = performance.now();
    const count = this.usage?.completion_tokens;
    const parts = [];
    if (count) parts.push(`${count} tokens`);
    if (this.first) parts.push(`first after ${Math.round(this.first - this.started)} ms`);
    if (count > 1 && this.first) parts.push(`${Math.round(((count - 1) / Math.max(end - this.first, 1)) * 1000)} tokens/s`);
    if (this.ending && this.ending !== "stop") parts.push({ length: "cut at max tokens", tool_calls: "calls a tool" }[this.ending] ?? this.ending);
    return parts.join(" · ");
  }

  askForResults() {
    this.calls.forEach((call, place) => {
      const input = make("input", { type: "text", "aria-label": `Result of ${call.function.name}`, placeholder: "result" });
      const send = (event) => {
        event.preventDefault();
        if (!input.value || running) return;
        form.remove();
        conversation.push({ role: "tool", tool_call_id: call.id, content: input.value });
        add(make("div", { class: "message tool" }, `${call.function.name} → ${input.value}`));
        call.done = true;
        if (this.calls.every((each) => each.done)) answer();
      };
      const form = make("form", { onsubmit: send }, input, make("button", {}, "Send result"));
      call.card.append(form);
      if (place === 0) setTimeout(() => input.focus());
    });
  }
}
