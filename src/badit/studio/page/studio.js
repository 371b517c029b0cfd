// The page: a prompt goes to the server, answers come back word by word, and the mixture that made them is shown.
// All text of data and models is set as textContent, never as markup.
import { ask, get } from "./events.js";
import { HeatMap, showNearest } from "./mixture.js";
import { Sliders } from "./sliders.js";

const at = (id) => document.getElementById(id);
const form = at("ask");
const text = at("text");
const status = at("status");
const SIDES = ["hand", "router", "base"];

let run;
let task = null; // what the server knows of the chosen task
let heatMap = null;
let sliders = null;
let running = null; // what stops the answer that is being written
let asked = ""; // the prompt that the answers of router and base belong to

// ── the theme, as in the report ──
const dark = window.matchMedia("(prefers-color-scheme: dark)");
let theme = dark.matches ? "dark" : "light";

function show(next) {
  theme = next;
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme === "dark" ? "Light" : "Dark";
  at("theme").setAttribute("aria-pressed", String(theme === "dark"));
  heatMap?.draw();
}

at("theme").addEventListener("click", () => show(theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => show(dark.matches ? "dark" : "light"));
show(theme);

// ── the prompt ──
async function chooseTask() {
  const name = at("task").value;
  task = name ? await get(`/api/task?name=${encodeURIComponent(name)}`) : null;
  at("instruction").hidden = !task;
  at("instruction").textContent = task?.instruction ?? "";
  at("text-label").textContent = task ? "Input" : "Prompt";
  at("example-label").hidden = !task?.examples.length;
  at("example").replaceChildren(...(task?.examples ?? []).map(({ input }, i) => new Option(shortened(input), String(i))));
  if (task) chooseExample();
}

function chooseExample() {
  text.value = task.examples[Number(at("example").value)]?.input ?? "";
}

function shortened(input) {
  const line = input.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

function say(message, wrong = false) {
  status.textContent = message;
  status.classList.toggle("wrong", wrong);
}

// ── answers ──
const side = (name) => at(`side-${name}`);

// Asks the sides that have no answer to this prompt yet; a mixture by hand is always asked anew.
async function answer() {
  running?.abort();
  const question = { text: text.value, task: task?.name ?? null, max_new_tokens: Number(at("limit").value) };
  const prompt = JSON.stringify(question);
  const sides = prompt === asked ? [] : ["router", "base"];
  if (sliders?.byHand) sides.unshift("hand");
  if (!sides.length) return;
  const mine = new AbortController();
  running = mine;
  at("stop").disabled = false;
  at("reference").hidden = true;
  for (const name of sides) begin(name);
  if (sides.includes("router")) asked = "";
  say("Answering …");
  try {
    let finished = false;
    for await (const event of ask({ ...question, sides, gates: sliders?.byHand ? sliders.gates : null }, mine.signal)) {
      if (event.name === "error") throw new Error(event.message);
      if (event.name === "done") finished = true;
      else take(event);
    }
    if (!finished) throw new Error("The answer broke off; the terminal that the studio runs in may say why.");
    asked = prompt;
    showReference(question);
    say("Done.");
  } catch (error) {
    if (running !== mine) return; // a newer question has taken its place
    say(mine.signal.aborted ? "Stopped." : error.message, !mine.signal.aborted);
  } finally {
    if (running === mine) {
      running = null;
      at("stop").disabled = true;
      for (const name of SIDES) side(name).setAttribute("aria-busy", "false");
    }
  }
}

function begin(name) {
  side(name).setAttribute("aria-busy", "true");
  side(name).classList.add("old");
  side(name).querySelector(".facts").textContent = "";
}

function take(event) {
  if (event.name === "prompt") {
    at("read").hidden = false;
    at("read").querySelector("pre").textContent = event.text;
    at("read").querySelector("summary").textContent = `What the model reads (${event.tokens} tokens)`;
  } else if (event.name === "gates") {
    if (event.side === "router") sliders.follow(event.gates);
    showMixture(event);
  } else if (event.name === "text") {
    side(event.side).classList.remove("old");
    side(event.side).querySelector(".text").textContent = event.text;
  } else if (event.name === "end") {
    const length = event.tokens === 1 ? "1 token" : `${event.tokens} tokens`;
    const end = event.ended ? "" : ", cut at the limit";
    side(event.side).setAttribute("aria-busy", "false");
    side(event.side).querySelector(".text").textContent = event.text || "(no answer)";
    side(event.side).querySelector(".facts").textContent = `${length}${end}, ${event.seconds.toFixed(1)} s`;
  }
}

const mixtures = {}; // by side, the last event with gates

function showMixture(event) {
  mixtures[event.side] = event;
  const name = sliders.byHand ? "hand" : "router";
  const shown = mixtures[name];
  if (!shown) return;
  at("mixture-lead").textContent = name === "hand"
    ? "The gates that you have set: how much the prompt draws on each expert. 1 is neutral."
    : "How much the prompt draws on each expert: the router’s gates. 1 is neutral.";
  heatMap.show(shown.gates);
  showNearest(shown);
}

function showReference({ text: input }) {
  const references = task?.examples.find((example) => example.input === input)?.references;
  at("reference").hidden = !references;
  at("reference").textContent = references ? `The data’s own answer: ${references.join(" or ")}` : "";
}

function mixtureChanged() {
  side("hand").hidden = !sliders.byHand;
  side("router").querySelector("h3").textContent = sliders.byHand ? "The router’s own mixture" : "With the adapter";
  if (sliders.byHand && text.value.trim()) answer();
  else if (mixtures.router) showMixture(mixtures.router);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  asked = ""; // asked for, so answered anew
  answer();
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
at("stop").addEventListener("click", () => running?.abort());
at("task").addEventListener("change", () => chooseTask().catch((error) => say(error.message, true)));
at("example").addEventListener("change", chooseExample);

// ── the run ──
async function start() {
  run = await get("/api/run");
  document.title = `${run.run} · badit studio`;
  at("run").textContent = run.run;
  at("about").textContent = `${run.method} on ${run.model}`
    + (run.tasks.length ? `, tuned on ${run.tasks.length} ${run.tasks.length === 1 ? "task" : "tasks"}` : "");
  at("remark").hidden = !run.remark;
  at("remark").textContent = run.remark;
  at("choices").hidden = !run.tasks.length;
  if (!run.needs_task) at("task").append(new Option("none: a prompt of my own", ""));
  for (const name of run.tasks) at("task").append(new Option(name, name));
  text.maxLength = run.max_characters;
  at("limit").max = run.max_new_tokens;
  at("limit").value = run.new_tokens;
  at("gates").hidden = !run.experts;
  at("no-gates").hidden = Boolean(run.experts);
  at("no-gates").textContent = `The method of this run, ${run.method}, mixes no experts: it does the same for every `
    + "prompt, and there are no gates to show or to set.";
  if (run.experts) {
    heatMap = new HeatMap(run, () => theme === "dark");
    sliders = new Sliders(run, mixtureChanged);
  }
  if (run.tasks.length) {
    at("task").value = run.tasks[0];
    await chooseTask();
  }
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => say(error.message, true));
