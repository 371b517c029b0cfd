// The page sends a prompt to the server, receives the answers token by token and shows the gates that were used.
// All text from data and models is set as textContent, never as markup.

const SIDES = ["hand", "router", "base"];
const NEUTRAL = 1; // the neutral gate
const REACH = 2; // the maximum of the sliders, unless a gate is larger
const WRITTEN = 20; // the most rows and columns of a heat map whose cells show their values
const FEW = 6; // the most columns whose values also fit a phone
const MEASURING = 2000; // milliseconds until the tasks' gates are requested again

const at = (id) => document.getElementById(id);
const side = (name) => at(`side-${name}`);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

let run; // the server's description of the run
let task = null; // the server's description of the chosen task
let theme = "light";
let asking = null; // the AbortController of the running answer
let asked = ""; // the question that the shown answers of router and base belong to
let byHand = null; // the gates set by hand, as in a question; null for the prompt's own
let ofTasks = {}; // by task, the shares of its prompts by cluster, or its mean gates, by place
const mixtures = {}; // the last event with gates, by side

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function say(message, wrong = false) {
  at("status").textContent = message;
  at("status").classList.toggle("wrong", wrong);
}

function useTheme(next) {
  theme = next;
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme === "dark" ? "Light" : "Dark";
  at("theme").setAttribute("aria-pressed", String(theme === "dark"));
  drawHeatMap();
}

// ── the server ──

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The studio does not answer; is it still running?");
  }
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

const get = async (address) => (await request(address)).json();

// Requests an answer and yields its server-sent events as they arrive. (EventSource supports only GET.)
async function* ask(question, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await request("/api/answer", { method: "POST", headers, body: JSON.stringify(question), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      const events = (rest + next.value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const [name, data] = event.split("\n");
        yield { name: name.slice("event: ".length), ...JSON.parse(data.slice("data: ".length)) };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // if the stream was interrupted, its error is already known
  }
}

// ── the prompt ──

async function chooseTask() {
  const name = at("task").value;
  const chosen = name ? await get(`/api/task?name=${encodeURIComponent(name)}`) : null;
  if (at("task").value !== name) return; // another task was chosen meanwhile
  task = chosen;
  at("instruction").hidden = !task;
  at("instruction").textContent = task?.instruction ?? "";
  at("text-label").textContent = task ? "Input" : "Prompt";
  at("example-label").hidden = !task?.examples.length;
  at("example").replaceChildren(...(task?.examples ?? []).map(({ input }, i) => {
    const line = input.trim().replace(/\s+/g, " ");
    return new Option(line.length > 60 ? `${line.slice(0, 59)}…` : line, String(i));
  }));
  if (task) chooseExample();
}

function chooseExample() {
  at("text").value = task.examples[Number(at("example").value)]?.input ?? "";
}

// ── answers ──

// Requests answers from the sides that have none to this prompt yet. Gates set by hand are always answered again.
async function answer() {
  asking?.abort();
  const question = { text: at("text").value, task: task?.name ?? null, max_new_tokens: Number(at("limit").value) };
  const prompt = JSON.stringify(question);
  const sides = [...(byHand ? ["hand"] : []), ...(prompt === asked ? [] : ["router", "base"])];
  if (!sides.length) return;
  const mine = new AbortController();
  asking = mine;
  at("stop").disabled = false;
  at("reference").hidden = true;
  for (const name of sides) {
    side(name).setAttribute("aria-busy", "true");
    side(name).classList.add("old");
    side(name).querySelector(".facts").textContent = "";
  }
  if (sides.includes("router")) asked = "";
  say("Answering …");
  try {
    let finished = false;
    for await (const event of ask({ ...question, sides, ...byHand }, mine.signal)) {
      if (event.name === "error") throw new Error(event.message);
      finished = event.name === "done";
      EVENTS[event.name]?.(event);
    }
    if (!finished) throw new Error("The answer was interrupted; see the studio’s terminal for the reason.");
    asked = prompt;
    const references = task?.examples.find((example) => example.input === question.text)?.references;
    at("reference").hidden = !references;
    at("reference").textContent = references ? `Reference answer: ${references.join(" or ")}` : "";
    say("Done.");
  } catch (error) {
    if (asking === mine) say(mine.signal.aborted ? "Stopped." : error.message, !mine.signal.aborted);
  } finally {
    if (asking === mine) { // otherwise a newer question is running
      asking = null;
      at("stop").disabled = true;
      for (const name of SIDES) side(name).setAttribute("aria-busy", "false");
    }
  }
}

const EVENTS = {
  prompt({ text, tokens }) {
    at("read").hidden = false;
    at("read").querySelector("pre").textContent = text;
    at("read").querySelector("summary").textContent = `What the model reads (${tokens} tokens)`;
  },
  gates(event) {
    mixtures[event.side] = event;
    if (event.side === "router" && !byHand) placeSliders(ownGates());
    showMixture();
  },
  text(event) {
    side(event.side).classList.remove("old");
    side(event.side).querySelector(".text").textContent = event.text;
  },
  end(event) {
    const length = event.tokens === 1 ? "1 token" : `${event.tokens} tokens`;
    side(event.side).setAttribute("aria-busy", "false");
    side(event.side).querySelector(".text").textContent = event.text || "(no answer)";
    side(event.side).querySelector(".facts").textContent =
      `${length}${event.ended ? "" : ", cut at the limit"}, ${event.seconds.toFixed(1)} s`;
  },
};

// ── the gates: a heat map of the prompt and the tasks by cluster or by expert, and the nearest tasks ──

function showMixture() {
  const mixture = mixtures[byHand ? "hand" : "router"];
  if (mixture) {
    at("nearest").hidden = !mixture.nearest.length && !mixture.unmeasured;
    at("unmeasured").hidden = !mixture.unmeasured;
    at("nearest").querySelector("ol").replaceChildren(...mixture.nearest.map(({ task: name, difference }) =>
      element("li", {}, element("span", { textContent: name }), element("span", { textContent: difference.toFixed(4) }))));
  }
  drawHeatMap();
}

async function loadMixtures() {
  const answer = await get("/api/mixtures");
  ofTasks = answer.tasks;
  at("gates-of").append(...Object.keys(ofTasks).map((name) => new Option(name, name)));
  at("gates-of-label").hidden = !Object.keys(ofTasks).length;
  drawHeatMap();
  if (answer.unmeasured) setTimeout(() => loadMixtures().catch(() => {}), MEASURING);
}

// Returns the index of the chosen layer and module.
function place() {
  if (run.places.length === 1) return 0;
  return run.places.findIndex(([layer, module]) => String(layer) === at("layer").value && module === at("module").value);
}

// Offers the modules of the chosen layer.
function chooseLayer() {
  const chosen = at("module").value;
  const modules = run.places.filter(([layer]) => String(layer) === at("layer").value).map(([, module]) => module);
  at("module").replaceChildren(...modules.map((module) => new Option(module, module)));
  if (modules.includes(chosen)) at("module").value = chosen;
  drawHeatMap();
}

// Returns the rows of the heat map: name and values. Gates by hand of no cluster have no row.
function rowsOfMap() {
  const mixture = mixtures[byHand ? "hand" : "router"];
  const index = place();
  const rows = Object.entries(ofTasks).map(([name, places]) => [name, places[index]]);
  if (!mixture || (run.clusters && byHand)) return rows;
  const values = run.clusters
    ? Array.from({ length: run.clusters }, (_, cluster) => Number(cluster === mixture.clusters[index]))
    : mixture.gates[index];
  return [[byHand ? "Set by hand" : "This prompt", values], ...rows];
}

// The heat map is a table, so that screen readers can read its cells; the arrow keys move between them.
function drawHeatMap() {
  const rows = run?.experts ? rowsOfMap() : [];
  at("heat-map").hidden = !rows.length;
  if (!rows.length) return;
  const kind = run.clusters ? "cluster" : "expert";
  const colours = run.colours[theme][run.clusters ? "heatmap" : "diverging"];
  const text = (value) => (run.clusters ? `${Math.round(100 * value)}%` : value.toFixed(2));
  const end = run.clusters ? 1 : 2; // of the scale, which is the same for all prompts and runs
  const body = rows.map(([name, values]) => element("tr", {},
    element("th", { scope: "row", title: name }, element("span", { textContent: name })),
    ...values.map((value, column) => {
      const cell = element("td", { tabIndex: -1 }, element("span", { textContent: text(value) }));
      const exact = run.clusters ? `share ${text(value)}` : `gate ${value.toFixed(3)}`;
      cell.dataset.said = `${name}, ${kind} ${column}: ${exact}`;
      const [colour, ink] = coloursOf(colours, value / end);
      cell.style.backgroundColor = colour;
      cell.style.color = ink;
      return cell;
    })));
  body[0].cells[1].tabIndex = 0;
  const columns = rows[0][1].length;
  const step = columns > WRITTEN ? 5 : 1; // fewer labels, so that they fit above narrow cells
  const heads = rows[0][1].map((_, i) =>
    element("th", { textContent: i % step ? "" : i, scope: "col", ariaLabel: `${kind} ${i}` }));
  const table = at("heat-map").querySelector("table");
  const written = columns <= WRITTEN && rows.length <= WRITTEN + 1; // one is the prompt
  table.classList.toggle("written", written);
  table.classList.toggle("few", written && columns <= FEW);
  table.replaceChildren(
    element("thead", {}, element("tr", {}, element("th", { scope: "col", textContent: kind }), ...heads)),
    element("tbody", {}, ...body));
  at("heat-map").querySelector(".bar").style.background = `linear-gradient(to right, ${colours.join(", ")})`;
  const furthest = Math.max(...rows.flatMap(([, values]) => values));
  at("low").textContent = text(0);
  at("high").textContent = text(end) + (furthest > end ? " or more" : "");
  at("readout").textContent = "Point at a cell, or select it with the arrow keys, to see its value.";
}

function readOut({ target }) {
  const cell = target.closest("td");
  if (cell) at("readout").textContent = cell.dataset.said;
}

function moveInHeatMap(event) {
  const cell = event.target.closest("td");
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
  if (!cell || down === undefined) return;
  event.preventDefault();
  const next = cell.closest("tbody").rows[cell.parentElement.sectionRowIndex + down]?.cells[cell.cellIndex + right];
  if (next?.tagName !== "TD") return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// Returns the colour for a value from 0 to 1 on a scale of colour stops, such as #8f3b00, and that of text on it.
function coloursOf(stops, value) {
  const place = Math.min(1, value) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [stops[below], stops[below + 1]].map((stop) =>
    [1, 3, 5].map((start) => Number.parseInt(stop.slice(start, start + 2), 16)));
  const colour = from.map((part, i) => Math.round(part + (to[i] - part) * (place - below)));
  const [red, green, blue] = colour;
  return [`rgb(${colour.join(" ")})`, 0.3 * red + 0.6 * green + 0.1 * blue > 135 ? "#15171a" : "#ffffff"];
}

// ── gates set by hand: those of a task or, where an expert means the same everywhere, one slider for each expert ──

const all = (selector) => [...document.querySelectorAll(selector)];
const hasSliders = () => run.can_set_gates && run.places.length === 1 && !run.clusters;
const sliderGates = () => all(".slider input[type=number]").map((number) => Number(number.value));
const neutralGates = () => Array(run.experts).fill(NEUTRAL);
const ownGates = () => mixtures.router?.gates[0] ?? neutralGates();

// The sliders show the gates in use. They are for a single module.
function placeSliders(gates) {
  const reach = Math.max(...gates) > REACH ? run.experts : REACH;
  all(".slider").forEach((row, expert) => {
    const [range, number] = row.querySelectorAll("input");
    range.max = String(reach);
    number.value = String(Number(gates[expert].toFixed(3)));
    range.value = number.value;
  });
}

// Uses the prompt's own gates (null), those of a task ({gates_of}), or given ones ({gates}).
function setMixture(gates) {
  byHand = gates;
  delete mixtures.hand; // of other gates
  at("gates-of").value = byHand?.gates_of ?? "";
  placeSliders(byHand?.gates ?? ofTasks[byHand?.gates_of]?.[0] ?? ownGates());
  at("own").disabled = !byHand;
  side("hand").hidden = !byHand;
  side("hand").querySelector("h3").textContent = byHand?.gates_of ? `With the gates of ${byHand.gates_of}` : "With gates set by hand";
  side("router").querySelector("h3").textContent = byHand ? "With the prompt’s gates" : "With the adapter";
  showMixture();
  if (byHand && at("text").value.trim()) answer();
}

function slider(expert) {
  const gate = { min: 0, value: NEUTRAL };
  const label = element("label", { textContent: `Expert ${expert}`, htmlFor: `gate-${expert}` });
  const range = element("input", { type: "range", id: `gate-${expert}`, max: REACH, step: 0.01, ...gate });
  const number = element("input", {
    type: "number", ariaLabel: `Gate of expert ${expert}`, max: run.experts, step: 0.001, ...gate,
  });
  const only = element("button", {
    type: "button", textContent: "Only", ariaLabel: `Only expert ${expert}: all others off`,
  });
  range.addEventListener("input", () => { number.value = range.value; });
  range.addEventListener("change", () => setMixture({ gates: sliderGates() }));
  number.addEventListener("change", () => {
    if (!number.value || !number.checkValidity()) number.value = range.value;
    setMixture({ gates: sliderGates() });
  });
  only.addEventListener("click", () => setMixture({ gates: neutralGates().map((gate, i) => (i === expert ? gate : 0)) }));
  const said = run.abilities[expert] ? [element("p", { className: "said", textContent: `Used most by ${run.abilities[expert]}` })] : [];
  return element("div", { className: "slider" }, label, range, number, only, ...said);
}

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
  if (!run.needs_task) at("task").append(new Option("none: write a complete prompt", ""));
  for (const name of run.tasks) at("task").append(new Option(name, name));
  at("text").maxLength = run.max_characters;
  at("limit").max = run.max_new_tokens;
  at("limit").value = run.new_tokens;
  at("gates").hidden = !run.experts;
  at("no-gates").hidden = Boolean(run.experts);
  at("no-gates").textContent = `The method of this run, ${run.method}, mixes no experts. It has no gates `
    + "to show or to set.";
  at("mixture-lead").textContent = run.clusters
    ? "The share of each task’s prompts in each cluster. Answer a prompt to see its cluster."
    : "The mean gate of each task’s prompts for each expert: 1 is neutral. Answer a prompt to see its gates.";
  at("heat-map-title").textContent = run.clusters ? "Tasks by cluster of prompts" : "Mean gates by task";
  at("places").hidden = run.places.length < 2;
  if (run.places.length > 1) {
    const layers = [...new Set(run.places.map(([layer]) => layer))];
    at("layer").append(...layers.map((layer) => new Option(layer < 0 ? "–" : layer, layer)));
    chooseLayer();
  }
  at("hand").hidden = !run.can_set_gates;
  at("no-hand").hidden = run.can_set_gates;
  at("hand-lead").textContent = hasSliders()
    ? "One gate for each expert: 1 is neutral, 0 switches the expert off. The answer is updated when a slider is released."
    : "Every layer numbers its experts by itself, so the gates of all layers are set together.";
  if (hasSliders()) document.querySelector(".sliders").append(...neutralGates().map((_, expert) => slider(expert)));
  if (run.tasks.length) {
    at("task").value = run.tasks[0];
    await chooseTask();
  }
  if (run.experts) await loadMixtures();
  document.documentElement.dataset.ready = "true";
}

const fail = (error) => say(error.message, true);

at("theme").addEventListener("click", () => useTheme(theme === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => useTheme(dark.matches ? "dark" : "light"));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  asked = ""; // answer again, because the user asked for it
  answer();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("stop").addEventListener("click", () => asking?.abort());
at("task").addEventListener("change", () => chooseTask().catch(fail));
at("example").addEventListener("change", chooseExample);
at("layer").addEventListener("change", chooseLayer);
at("module").addEventListener("change", drawHeatMap);
at("heat-map").addEventListener("keydown", moveInHeatMap);
at("heat-map").addEventListener("pointerover", readOut);
at("heat-map").addEventListener("focusin", readOut);
at("own").addEventListener("click", () => setMixture(null));
at("neutral").addEventListener("click", () => setMixture({ gates: neutralGates() }));
at("gates-of").addEventListener("change", ({ target }) => setMixture(target.value ? { gates_of: target.value } : null));

useTheme(dark.matches ? "dark" : "light");
start().catch(fail);
