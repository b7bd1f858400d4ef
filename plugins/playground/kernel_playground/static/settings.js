// What the controls say, as fields of a request.

import { $ } from "./dom.js";

const SLIDERS = { temperature: null, top_p: 1, min_p: 0 }; // left out where the value changes nothing
const NUMBERS = ["top_k", "max_tokens", "seed", "presence_penalty", "frequency_penalty"];
export const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "math.sqrt",
      description: "Return the square root of x.",
      parameters: { type: "object", properties: { x: { type: "number" } }, required: ["x"] },
    },
  },
];
export const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, number: { type: "integer" } },
  required: ["name", "number"],
  additionalProperties: false,
};

export function start() {
  for (const id of Object.keys(SLIDERS)) {
    const output = document.querySelector(`output[for=${id}]`);
    const show = () => (output.textContent = Number($(id).value).toFixed(2));
    $(id).addEventListener("input", show);
    show();
  }
  $("example-tools").addEventListener("click", () => ($("tools").value = JSON.stringify(EXAMPLE_TOOLS, null, 1)));
  $("example-schema").addEventListener("click", () => ($("schema").value = JSON.stringify(EXAMPLE_SCHEMA, null, 1)));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
}

function parsed(id, name) {
  const text = $(id).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: this is not JSON (${error.message})`);
  }
}

// Throws an Error with a sentence for the user.
export function fields() {
  const found = {};
  for (const [id, neutral] of Object.entries(SLIDERS)) {
    if (Number($(id).value) !== neutral) found[id] = Number($(id).value);
  }
  for (const id of NUMBERS) if ($(id).value !== "") found[id] = Number($(id).value);
  if ($("stop").value) found.stop = $("stop").value;
  if ($("logprobs").checked) Object.assign(found, { logprobs: true, top_logprobs: 5 });
  const tools = parsed("tools", "Tools");
  if (tools) found.tools = tools;
  const schema = parsed("schema", "JSON schema");
  if (schema) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  return found;
}
